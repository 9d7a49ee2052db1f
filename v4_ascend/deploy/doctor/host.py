"""A host's part: reads a question from standard input, prints its facts.

Started as ``python -m v4_ascend.deploy.doctor.host``, here or over ssh.
"""

from __future__ import annotations

import sys

import msgspec

from v4_ascend.deploy.doctor.facts import Question
from v4_ascend.deploy.doctor.gathering import gather


def main() -> None:
    """Answer one question."""
    question = msgspec.json.decode(sys.stdin.buffer.readline(), type=Question)
    sys.stdout.buffer.write(msgspec.json.encode(gather(question)) + b"\n")


if __name__ == "__main__":
    main()
