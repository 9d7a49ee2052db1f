"""Requests of OpenAI's chat and text completions, with the extras that vLLM's users know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from v4_ascend.chat.grammar import Piece, choice_piece, json_piece, lark_piece, regex_piece
from v4_ascend.errors import RequestError
from v4_ascend.runtime.api.ask import Answer
from v4_ascend.runtime.api.controls import Controls

# Change nothing about the answer.
IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier"})
# Would change it, if not at this value.
NEUTRAL: dict[str, Any] = {"echo": False, "best_of": 1, "suffix": None}


class StreamOptions(BaseModel):
    """What a stream adds."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class StructuredOutputs(BaseModel):
    """vLLM's way to say what an answer may be: exactly one of these."""

    model_config = ConfigDict(extra="forbid")

    json_schema: Any = Field(default=None, alias="json")
    json_object: bool = False
    regex: str | None = None
    choice: list[str] | None = Field(default=None, min_length=1)
    grammar: str | None = None

    def piece(self) -> Piece:
        """Return the one that is given."""
        given = []
        if self.json_schema is not None:
            given.append(json_piece(self.json_schema))
        if self.json_object:
            given.append(json_piece({"type": "object"}))
        if self.regex is not None:
            given.append(regex_piece(self.regex))
        if self.choice is not None:
            given.append(choice_piece(self.choice))
        if self.grammar is not None:
            given.append(lark_piece(self.grammar))
        if len(given) != 1:
            names = "json, json_object, regex, choice, grammar"
            raise RequestError(
                f"structured_outputs: {len(given)} given; say exactly one of {names}",
                param="structured_outputs",
            )
        return given[0]


class _Body(Controls):
    model: str
    n: int = Field(default=1, ge=1, le=16)
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the tokens counted."""
        return self.stream_options is not None and self.stream_options.include_usage

    def answer(self) -> Answer | None:
        """Return what the answer may be, where that is limited."""
        ways: list[Answer] = []
        if self.response_format is not None:
            found = answer_of_format(self.response_format, "response_format")
            ways += [found] if found is not None else []
        if self.structured_outputs is not None:
            ways.append(Answer(self.structured_outputs.piece(), "structured_outputs"))
        for name in ("json", "regex", "choice", "grammar"):
            if (value := getattr(self, f"guided_{name}")) is not None:
                piece = StructuredOutputs.model_validate({name: value}).piece()
                ways.append(Answer(piece, f"guided_{name}"))
        if len(ways) > 1:
            names = " and ".join(w.param for w in ways)
            raise RequestError(f"{names}: say one of them", param=ways[1].param)
        return ways[0] if ways else None


class ChatBody(_Body):
    """``/v1/chat/completions``."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] = "none"
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @property
    def named_tool(self) -> str | None:
        """The function that must be called, if one is named."""
        if isinstance(self.tool_choice, str):
            return None
        function = self.tool_choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if self.tool_choice.get("type") != "function" or not isinstance(name, str):
            message = "tool_choice: must be auto, none, required or "
            raise RequestError(
                message + '{"type": "function", "function": {"name": ...}}', param="tool_choice"
            )
        return name


class CompletionBody(_Body):
    """``/v1/completions``."""

    prompt: str | list[int]
    max_tokens: int | None = Field(default=16, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=5)


def answer_of_format(response_format: Any, param: str) -> Answer | None:
    """Read OpenAI's ``response_format``; None where any text will do."""
    if not isinstance(response_format, Mapping):
        raise RequestError(f"{param}: must be an object with a type", param=param)
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return Answer(json_piece({"type": "object"}), param, shown=dict(response_format))
    if kind == "json_schema":
        # Chat completions nest what responses do not.
        inner = response_format.get("json_schema", response_format)
        schema = inner.get("schema") if isinstance(inner, Mapping) else None
        if not isinstance(schema, Mapping):
            raise RequestError(f"{param}: json_schema needs a schema object", param=param)
        return Answer(json_piece(schema), param, shown=dict(schema))
    raise RequestError(
        f"{param}: type must be text, json_object or json_schema, got {kind!r}", param=param
    )


def require_neutral(raw: Any) -> Any:
    """Refuse what is not built; return the rest of the body."""
    if not isinstance(raw, Mapping):
        return raw
    for name, neutral in NEUTRAL.items():
        if raw.get(name, neutral) not in (neutral, None):
            raise RequestError(f"{name} is not supported yet; leave it out", param=name)
    return {k: v for k, v in raw.items() if k not in NEUTRAL}
