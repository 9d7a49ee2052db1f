"""Requests of the OpenAI API as this server takes them: known, refused or ignored by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from v4_ascend.errors import RequestError

# Change nothing about the answer.
IGNORED = {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier"}
# Would change it, if not at this value.
NEUTRAL: dict[str, Any] = {
    "response_format": {"type": "text"},
    "echo": False,
    "best_of": 1,
    "suffix": None,
}
MAX_SHOWN = 60  # characters of a wrong value
B = TypeVar("B", bound="_Body")
Bias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(BaseModel):
    """What a stream adds."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    top_k: int = Field(default=0, ge=-1)  # -1 and 0: all
    min_p: float = Field(default=0, ge=0, le=1)
    presence_penalty: float = Field(default=0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0, ge=-2, le=2)
    repetition_penalty: float = Field(default=1, gt=0, le=2)
    logit_bias: dict[int, Bias] = Field(default_factory=dict, max_length=1024)
    min_tokens: int = Field(default=0, ge=0)
    ignore_eos: bool = False
    stop: str | list[str] | None = None
    n: int = Field(default=1, ge=1, le=16)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> list[str]:
        """Stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatBody(_Body):
    """``/v1/chat/completions``."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "max"] | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)


class CompletionBody(_Body):
    """``/v1/completions``."""

    prompt: str | list[int]
    max_tokens: int | None = Field(default=16, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=5)


def parse_body(kind: type[B], raw: Any) -> B:
    """Validate a request.

    Raises:
        RequestError: naming the parameter, what is wrong with it, and what would be right.
    """
    if not isinstance(raw, Mapping):
        raise RequestError("the body must be a JSON object")
    for name, neutral in NEUTRAL.items():
        if raw.get(name, neutral) not in (neutral, None):
            raise RequestError(f"{name} is not supported yet; leave it out", param=name)
    # null is the same as nothing, in OpenAI's API
    kept = {k: v for k, v in raw.items() if not (k in IGNORED or k in NEUTRAL or v is None)}
    try:
        body = kind.model_validate(kept)
    except ValidationError as e:
        problem = e.errors()[0]
        param = ".".join(map(str, problem["loc"]))
        given = "" if problem["type"] == "missing" else f", got {_shown(problem['input'])}"
        raise RequestError(f"{param}: {problem['msg']}{given}", param=param) from None
    if len(body.stops) > 4 or "" in body.stops:
        raise RequestError("stop: at most 4 strings, none of them empty", param="stop")
    return body


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
