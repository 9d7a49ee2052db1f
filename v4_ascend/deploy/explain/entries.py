"""Known errors as data: configs/errors.yaml, each with its meaning, next steps and source."""

from __future__ import annotations

import re
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

from pydantic import Field

from v4_ascend.config.load import Section, load_yaml

Layer = Literal[
    "driver", "CANN", "HCCL", "torch_npu", "vllm-ascend", "vLLM", "triton",
    "NCCL", "CUDA", "torch", "host", "v4-ascend",
]  # fmt: skip
# Words after which a number is an error code; "507034 tokens" is none.
ANNOUNCED = r"(?i:code(?: is)?|result|ret(?:urn)?(?: ?code)?(?: is)?|failed|error)\W{0,3}"


class Entry(Section):
    """One known error.

    A line shows it if it has one of `needles` (default: the id) and matches `pattern`, where there
    is one. Without a pattern a numeric id must be announced as a code, and another id must stand
    alone. `symbol` is the vendor's name of a number. A consequence is what ranks say because
    another failed; a wrapper is what a layer adds to the error of the layer below. `date` is the
    source's where it shows one, else the day the entry was written.
    """

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9-]*$")
    symbol: str | None = None
    needles: tuple[str, ...] = ()
    pattern: str | None = None
    layer: Layer
    title: str
    cause: str
    next: tuple[str, ...] = Field(min_length=1)
    source: str = Field(min_length=1)
    date: str = Field(pattern=r"^\d{4}-\d\d-\d\d$")
    evidence: Literal["vendor", "thread", "ours"]
    is_consequence: bool = False
    is_wrapper: bool = False

    @property
    def words(self) -> tuple[str, ...]:
        """Exact texts one of which is in every line that shows the error."""
        return self.needles or (self.id, *([self.symbol] if self.symbol else []))

    @property
    def stems(self) -> frozenset[str]:
        """Return what to look for in its stead: few short texts that many entries share."""
        return frozenset(_stem(word) for word in self.words)

    def shows_in(self, text: str) -> bool:
        """Whether a line shows this error."""
        return any(w in text for w in self.words) and self.regex.search(text) is not None

    @cached_property
    def regex(self) -> re.Pattern[str]:
        """What a line that shows the error matches."""
        if self.pattern is not None:
            return re.compile(self.pattern)
        if self.needles:
            return re.compile("|".join(map(re.escape, self.needles)))
        alone = rf"(?<![A-Za-z0-9]){re.escape(self.id)}(?![A-Za-z0-9])"
        if self.id.isdigit():
            alone = rf"{ANNOUNCED}{self.id}(?!\d)"
        return re.compile(rf"{alone}|\b{self.symbol}\b" if self.symbol else alone)


def _stem(word: str) -> str:
    for stem in (r"\d{4}(?=\d\d$)", r"[A-Z]{2}\d\d(?=\d\d$)", r"ACL_ERROR|ACLNN_ERR"):
        if found := re.match(stem, word):
            return found[0]
    return "Error: " if word.endswith("Error: ") else word


class Errors(Section):
    """The file configs/errors.yaml; of two entries that a line shows, the earlier is meant."""

    errors: tuple[Entry, ...] = Field(min_length=1)


@lru_cache(maxsize=1)
def all_entries() -> tuple[Entry, ...]:
    """Read the bundled errors."""
    path = Path(str(files("v4_ascend.configs") / "errors.yaml"))
    return load_yaml(Errors, path).value.errors


def find(code: str) -> Entry | None:
    """Return the entry of a code, a symbol or an id, however it is capitalised."""
    wanted = code.casefold()
    for entry in all_entries():
        if wanted in (entry.id.casefold(), (entry.symbol or "").casefold()):
            return entry
    return None
