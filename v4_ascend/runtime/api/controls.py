"""What every API says about drawing tokens, and how bodies are checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from v4_ascend.errors import RequestError

MAX_SHOWN = 60  # characters of a wrong value
Bias = Annotated[float, Field(ge=-100, le=100)]
B = TypeVar("B", bound=BaseModel)


class Controls(BaseModel):
    """How tokens are drawn and when it ends; None is the checkpoint's own default."""

    model_config = ConfigDict(extra="forbid")

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
    priority: int = Field(default=0, ge=-1000, le=1000)  # lower ones go first
    timeout: float | None = Field(default=None, gt=0)  # seconds for the whole answer

    @property
    def stops(self) -> list[str]:
        """Stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def require_stops(self, param: str) -> None:
        """Refuse what cannot be looked for."""
        if len(self.stops) > 4 or "" in self.stops:
            raise RequestError(f"{param}: at most 4 strings, none of them empty", param=param)


def parse_body(kind: type[B], raw: Any, ignored: frozenset[str] = frozenset()) -> B:
    """Validate a request; `ignored` are names that change nothing about the answer.

    Raises:
        RequestError: naming the parameter, what is wrong with it, and the value.
    """
    if not isinstance(raw, Mapping):
        raise RequestError("the body must be a JSON object")
    # null is the same as nothing, in all these APIs
    kept = {k: v for k, v in raw.items() if not (k in ignored or v is None)}
    try:
        return kind.model_validate(kept)
    except ValidationError as e:
        problem = e.errors()[0]
        param = ".".join(map(str, problem["loc"]))
        given = "" if problem["type"] == "missing" else f", got {_shown(problem['input'])}"
        raise RequestError(f"{param}: {problem['msg']}{given}", param=param) from None


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
