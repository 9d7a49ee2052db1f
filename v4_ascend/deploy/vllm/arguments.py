"""Whether a release of vLLM accepts a command: judged by what was read from its wheel.

The data is configs/vllm/arguments-<version>.json, written by `extract_arguments`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from v4_ascend.config.load import did_you_mean
from v4_ascend.errors import ConfigError, DeployError

READERS: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "json": json.loads,
    "str": str,
}


class Flag(BaseModel):
    """One flag of `vllm serve`: its type, and its choices where they are fixed."""

    model_config = ConfigDict(frozen=True)

    type: str
    source: str
    choices: tuple[Any, ...] = ()
    nargs: str | None = None
    default: Any = None
    aliases: tuple[str, ...] = ()


class Arguments(BaseModel):
    """What one release accepts."""

    model_config = ConfigDict(frozen=True)

    wheels: tuple[str, ...]
    flags: dict[str, Flag]
    speculative_methods: tuple[str, ...]
    cudagraph_modes: tuple[str, ...]
    kv_connectors: tuple[str, ...]
    additional_config: tuple[str, ...]
    environment: tuple[str, ...]


@lru_cache(maxsize=4)
def arguments(version: str) -> Arguments:
    """Read the bundled data of a release.

    Raises:
        ConfigError: there is none.
    """
    folder = Path(str(files("v4_ascend.configs") / "vllm"))
    file = folder / f"arguments-{version}.json"
    if not file.is_file():
        known = sorted(p.stem.removeprefix("arguments-") for p in folder.glob("arguments-*"))
        raise ConfigError("vllm", f"no arguments of {version} here; there are {', '.join(known)}")
    return Arguments.model_validate_json(file.read_text(encoding="utf-8"))


def parse(argv: Sequence[str], accepted: Arguments) -> dict[str, Any]:
    """Parse ``vllm serve MODEL --flag value ...`` as that release would.

    Returns:
        The value of each flag given, by its name without dashes; JSON and numbers are read.

    Raises:
        DeployError: it would be refused: the flag, its value, and what would be right.
    """
    if list(argv[:2]) != ["vllm", "serve"] or len(argv) < 3 or argv[2].startswith("-"):
        raise DeployError(f"{' '.join(argv[:3])}: must be vllm serve MODEL --flag value ...")
    values: dict[str, Any] = {}
    rest = list(argv[3:])
    while rest:
        word, equals, inline = rest.pop(0).partition("=")
        name = word.removeprefix("--")
        flag, is_negated = accepted.flags.get(name), False
        if flag is None and name.startswith("no-"):
            name, is_negated = name.removeprefix("no-"), True
            flag = accepted.flags.get(name)
            flag = flag if flag is not None and flag.type == "bool" else None
        if not word.startswith("--") or flag is None:
            near = did_you_mean(word.removeprefix("--"), list(accepted.flags))
            raise DeployError(f"{word}: {accepted.wheels[0]} has no such flag{near}")
        if flag.type in ("bool", "switch"):
            values[name] = not is_negated
            continue
        if not equals and (not rest or rest[0].startswith("--")):
            raise DeployError(f"{word}: needs a value of type {flag.type}")
        values[name] = _value(word, flag, inline if equals else rest.pop(0))
    _check_json(values, accepted)
    return values


def _value(word: str, flag: Flag, text: str) -> Any:
    try:
        value = READERS[flag.type](text)
    except ValueError as e:
        raise DeployError(f"{word} {text}: must be of type {flag.type}") from e
    if flag.choices and value not in flag.choices:
        raise DeployError(f"{word} {text}: must be one of {', '.join(map(str, flag.choices))}")
    return value


def _check_json(values: Mapping[str, Any], accepted: Arguments) -> None:
    """Check what stands inside JSON, where a wrong word is ignored or fails minutes later."""
    method = values.get("speculative-config", {}).get("method")
    mode = values.get("compilation-config", {}).get("cudagraph_mode")
    connector = values.get("kv-transfer-config", {}).get("kv_connector")
    for where, given, known in (
        ("--speculative-config method", method, accepted.speculative_methods),
        ("--compilation-config cudagraph_mode", mode, accepted.cudagraph_modes),
        ("--kv-transfer-config kv_connector", connector, accepted.kv_connectors),
        *(
            ("--additional-config", key, accepted.additional_config)
            for key in values.get("additional-config", {})
        ),
    ):
        if given is not None and given not in known:
            near = did_you_mean(given, list(known))
            raise DeployError(f"{where}: {accepted.wheels[0]} does not know {given!r}{near}")
    if mode is not None and "PIECEWISE" in mode and "additional-config" in values:
        raise DeployError(f"--compilation-config cudagraph_mode {mode}: not for V4 on Ascend (R10)")


def unknown_variables(env: Mapping[str, str], accepted: Arguments) -> list[str]:
    """Return the VLLM_ variables that no file of the release reads."""
    return sorted(v for v in env if v.startswith("VLLM_") and v not in accepted.environment)
