"""The matrix of versions that go together: configs/software.yaml."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

from pydantic import Field

from v4_ascend.config.load import Section, load_yaml


class Rule(Section):
    """How a rule is known, and from where."""

    label: Literal["cited", "assumed"]
    source: str = Field(min_length=1)


class Stack(Section):
    """The versions one vllm-ascend was released with; what is not published is None."""

    vllm_ascend: str
    vllm: str
    cann: str
    torch: str
    torch_npu: str | None = None
    triton_ascend: str | None = None
    source: str = Field(min_length=1)


class Drivers(Section):
    """The drivers, by their first two numbers, that a CANN works with and does not."""

    cann: str
    works: tuple[str, ...] = Field(min_length=1)
    fails: tuple[str, ...]
    source: str = Field(min_length=1)


class Image(Section):
    """A base image: ``repository:version``, and behind it what a SoC's image is called."""

    repository: str
    version: str
    suffixes: dict[str, str] = {}
    python: str
    source: str = Field(min_length=1)


class Images(Section):
    """What our images are built on."""

    ascend: Image
    cuda: Image


class Matrix(Section):
    """All that is published, at a date."""

    dated: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    torch_npu_rule: Rule
    stacks: tuple[Stack, ...]
    images: Images
    drivers: tuple[Drivers, ...]

    def drivers_of(self, cann: tuple[int, ...]) -> Drivers | None:
        """Return what is known of a CANN's drivers."""
        name = ".".join(map(str, cann[:2]))
        return next((d for d in self.drivers if d.cann == name), None)


@cache
def matrix() -> Matrix:
    """Read the bundled matrix."""
    return load_yaml(Matrix, Path(str(files("v4_ascend.configs") / "software.yaml"))).value
