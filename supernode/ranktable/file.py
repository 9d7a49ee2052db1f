"""Rank table files: JSON to the internal form and back, whichever version it is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn

from v4_ascend.errors import ConfigError, RankTableError
from v4_ascend.supernode.ranktable.findings import Findings, JsonObject, Key, one_of, show
from v4_ascend.supernode.ranktable.model import VERSIONS, RankTable
from v4_ascend.supernode.ranktable.v1 import read_v1, write_v1
from v4_ascend.supernode.ranktable.v2 import read_v2, write_v2

MAX_BYTES = 1 << 30  # HCCL reads no larger file


def read_table(file: Path, *, allow_planned: bool = False) -> RankTable:
    """Read a rank table.

    Raises:
        ConfigError: at ``file:line``, it is not JSON, or cannot be read.
        RankTableError: with each rule it breaks.
    """
    try:
        if (n := file.stat().st_size) > MAX_BYTES:
            raise ConfigError(str(file), f"has {n} bytes; a rank table has at most {MAX_BYTES}")
        text = file.read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError(str(file), f"cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise ConfigError(str(file), f"is not UTF-8 text: {e.reason}") from e
    return parse_table(text, str(file), allow_planned=allow_planned)


def parse_table(text: str, file: str, *, allow_planned: bool = False) -> RankTable:
    """Read the text of a rank table; `file` is its name in errors.

    Raises:
        ConfigError: at ``file:line``, it is not JSON.
        RankTableError: with each rule it breaks.
    """
    data = _document(text, file)
    found = Findings()
    if not isinstance(data, dict):
        raise RankTableError(file, [f"must be an object, got {show(data)}"])
    try:
        version = one_of(*VERSIONS)(data.get("version"))
    except ValueError as e:
        raise RankTableError(
            file, [f"version: must be {e}, got {show(data.get('version'))}"]
        ) from None
    header = {
        "version": Key(one_of(version)),
        "status": Key(_usable if not allow_planned else _status, version != "2.0"),
    }
    if version == "2.0":
        return read_v2(found, data, file, header)
    return read_v1(found, data, file, "1.2" if version == "1.2" else "1.0", header)


def table_json(table: RankTable) -> str:
    """Return the text of a table's file."""
    if table.version == "2.0":
        document = write_v2(table.status, table.hosts)
    else:
        document = write_v1(table.version, table.status, table.hosts)
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def write_table(table: RankTable, file: Path) -> None:
    """Write a table whole or not at all.

    Raises:
        ConfigError: the folder is not there, or cannot be written to.
    """
    if not file.parent.is_dir():
        raise ConfigError("--out", f"no folder {file.parent}")
    half = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        half.write_text(table_json(table), encoding="utf-8")
        half.replace(file)
    except OSError as e:
        half.unlink(missing_ok=True)
        raise ConfigError("--out", f"cannot write {file}: {e.strerror}") from e


def _document(text: str, file: str) -> Any:
    def not_json(word: str) -> NoReturn:
        line = text[: text.find(word)].count("\n") + 1
        raise ConfigError(f"{file}:{line}", f"is not JSON: {word} is no JSON value")

    try:
        return json.loads(text, object_pairs_hook=JsonObject.of, parse_constant=not_json)
    except json.JSONDecodeError as e:
        raise ConfigError(f"{file}:{e.lineno}", f"is not JSON: {e.msg}") from e
    except (RecursionError, ValueError) as e:  # nested too deep; a number of too many digits
        raise ConfigError(f"{file}:1", f"is not JSON that can be read: {e}") from e


def _usable(value: Any) -> str:
    if value == "planned":
        raise ValueError('"completed" (a planned table has placeholders; generate one from dumps)')
    return one_of("completed")(value)


def _status(value: Any) -> str:
    return one_of("completed", "planned")(value)
