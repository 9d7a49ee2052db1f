"""The front's log: one JSON object a line, on stdout."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime


def log_json(event: str, **fields: object) -> None:
    """Write a line; nothing a client said but its request id is in it."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    line = {"time": now, "event": event, **fields}
    sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
    sys.stdout.flush()
