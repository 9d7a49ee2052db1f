"""Device profiles: what one device can hold and move. Every figure says where it is from."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal

from pydantic import Field

from v4_ascend.config.load import Section, did_you_mean, load_yaml
from v4_ascend.errors import ConfigError


class Figure(Section):
    """A number, how it is known, and from where."""

    value: float = Field(gt=0)
    label: Literal["measured", "cited", "derived", "assumed"]
    source: str = Field(min_length=1)


class Link(Section):
    """What joins devices: bytes per second and device in one direction, seconds of latency."""

    bytes_per_s: Figure
    latency_s: Figure | None = None


class DeviceProfile(Section):
    """One entry of the framework's device list. Units: bytes, seconds, operations per second."""

    name: str = Field(min_length=1)
    kind: Literal["cpu", "npu", "cuda"]
    emulated: bool = False
    soc: str | None = None
    memory_bytes: Figure
    memory_bytes_per_s: Figure
    fp32_flops: Figure | None = None
    bf16_flops: Figure | None = None
    int8_flops: Figure | None = None
    fp8_flops: Figure | None = None
    fp4_flops: Figure | None = None
    link: Link | None = None


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
