"""The official strings: markers, templates, reasoning-effort texts, added tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

Release = Literal["april", "0731"]
Effort = Literal["low", "high", "max"]


@dataclass(frozen=True, kw_only=True)
class AddedToken:
    """One added token of tokenizer.json, with the flags that differ between them."""

    content: str
    special: bool
    normalized: bool


def _data(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((files("v4_ascend.chat") / name).read_text("utf-8"))
    return loaded


_STRINGS = _data("strings.json")

BOS: str = _STRINGS["bos"]
EOS: str = _STRINGS["eos"]
USER: str = _STRINGS["user"]
ASSISTANT: str = _STRINGS["assistant"]
LATEST_REMINDER: str = _STRINGS["latest_reminder"]
THINK_START: str = _STRINGS["think_start"]
THINK_END: str = _STRINGS["think_end"]
DSML: str = _STRINGS["dsml_token"]
TASKS: Mapping[str, str] = _STRINGS["task_tokens"]

TOOLS_TEMPLATE: str = _STRINGS["tools_template"]
RESPONSE_FORMAT_TEMPLATE: str = _STRINGS["response_format_template"]
TOOL_CALLS_TEMPLATE: str = _STRINGS["tool_calls_template"]
TOOL_CALL_TEMPLATE: str = _STRINGS["tool_call_template"]
PARAMETER_TEMPLATE: str = _STRINGS["parameter_template"]
TOOL_OUTPUT_TEMPLATE: str = _STRINGS["tool_output_template"]
TOOL_CALLS_BLOCK: str = _STRINGS["tool_calls_block_name"]

# What stands before the first message in thinking mode. The April encoder knows "high" and
# "max"; the later one turned April's "max" into "high" and wrote a stronger "max".
EFFORT_PREFIXES: Mapping[Release, Mapping[Effort, str]] = {
    "april": {"low": "", "high": "", "max": _STRINGS["reasoning_effort_max_apr2026"]},
    "0731": _STRINGS["reasoning_effort_prompts_0731"],
}

# The markers a prompt may contain: a tokenizer without one of them cannot serve V4.
CONTROL_MARKERS: tuple[str, ...] = (
    BOS,
    EOS,
    USER,
    ASSISTANT,
    LATEST_REMINDER,
    THINK_START,
    THINK_END,
    DSML,
    *TASKS.values(),
)

ADDED_TOKENS: tuple[AddedToken, ...] = tuple(
    AddedToken(**token) for token in _data("added_tokens.json")["tokens"]
)


def to_json(value: Any) -> str:
    """Write JSON as the official encoder does: other separators or escapes are other tokens."""
    return json.dumps(value, ensure_ascii=False)
