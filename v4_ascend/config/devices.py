"""Device profiles: what one device can hold and move. Every figure says where it is from."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from v4_ascend.config.load import Section, did_you_mean, load_yaml
from v4_ascend.errors import ConfigError

WeightFormat = Literal["native", "mx", "w8a8", "w4a8", "bf16"]
KVRecord = Literal["plain", "bf16", "fp8_584", "fp8_640"]
IndexRecord = Literal["plain", "bf16", "fp4_68", "fp8_132", "int8"]


class Figure(Section):
    """A number, how it is known, and from where; `low` and `high` where it is not public."""

    value: float = Field(gt=0)
    label: Literal["measured", "cited", "derived", "assumed"]
    source: str = Field(min_length=1)
    low: float | None = Field(default=None, gt=0)
    high: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Figure:
        if not (self.low or self.value) <= self.value <= (self.high or self.value):
            raise ValueError(f"value {self.value:g} must lie in {self.low:g} .. {self.high:g}")
        return self


class Link(Section):
    """What joins devices: bytes per second and device in one direction, seconds of latency."""

    bytes_per_s: Figure
    latency_s: Figure


class Level(Link):
    """One all-to-all level of a fabric: groups of `n_devices`, counted from the first device."""

    n_devices: int = Field(ge=2)


class Records(Section):
    """Row formats of the caches; `plain` is the stream's type."""

    kv: KVRecord
    index: IndexRecord
    source: str = Field(min_length=1)


class DeviceProfile(Section):
    """One entry of the framework's device list. Units: bytes, seconds, operations per second.

    `family` is what layout rules apply to. `fabric` goes from the innermost level outwards,
    `inter` joins hosts or supernodes beyond it. `weight_formats` has the preferred one first.
    """

    name: str = Field(min_length=1)
    kind: Literal["cpu", "npu", "cuda"]
    family: Literal["a2", "a3", "950", "hopper", "cpu"]
    emulated: bool = False
    soc: str | None = None
    devices_per_host: int = Field(ge=1)
    weight_formats: tuple[WeightFormat, ...] = Field(min_length=1)
    records: Records
    memory_bytes: Figure
    memory_bytes_per_s: Figure
    fp32_flops: Figure | None = None
    bf16_flops: Figure | None = None
    int8_flops: Figure | None = None
    fp8_flops: Figure | None = None
    fp4_flops: Figure | None = None
    fabric: dict[str, Level] = Field(default_factory=dict)
    inter: Link | None = None

    @model_validator(mode="after")
    def _nested(self) -> DeviceProfile:
        check_levels({name: level.n_devices for name, level in self.fabric.items()})
        return self


def check_levels(sizes: Mapping[str, int]) -> None:
    """Require each level of a fabric to be made of whole inner ones."""
    for (inner, small), (outer, large) in pairwise([("a device", 1), *sizes.items()]):
        if large < small or large % small:
            raise ValueError(f"fabric: {outer} ({large}) must be a multiple of {inner} ({small})")


def bundled_devices() -> list[str]:
    """Return the names of the bundled profiles."""
    return sorted(p.stem for p in _folder().glob("*.yaml"))


def device_profile(device: str | DeviceProfile, where: str) -> DeviceProfile:
    """Return a bundled profile by name, or the inline one as it is.

    Raises:
        ConfigError: at `where`, no such profile.
    """
    if isinstance(device, DeviceProfile):
        return device
    if device not in (names := bundled_devices()):
        raise ConfigError(where, f"no device profile {device!r}{did_you_mean(device, names)}")
    return load_yaml(DeviceProfile, _folder() / f"{device}.yaml").value


def _folder() -> Path:
    return Path(str(files("v4_ascend.configs") / "devices"))
