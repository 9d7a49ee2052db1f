"""What a container needs on each kind of device: configs/containers.yaml."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

from pydantic import Field

from v4_ascend import __version__
from v4_ascend.config.devices import DeviceProfile
from v4_ascend.config.load import Section, load_yaml
from v4_ascend.deploy.doctor.matrix import matrix


class _Sourced(Section):
    source: str = Field(min_length=1)
    date: str = Field(pattern=r"^\d{4}-\d\d-\d\d$")


class Fact(_Sourced):
    """A path or a name, from where it is known, and of when."""

    value: str = Field(min_length=1)


class Mount(Fact):
    """A path of the host that is seen inside at the same place, read-only."""

    kind: Literal["file", "folder"]


class SharedMemory(_Sourced):
    """The size of /dev/shm."""

    gib: int = Field(ge=1)


class User(_Sourced):
    """Who runs inside: root, or whoever owns the files that are mounted."""

    value: Literal["root", "files"]


class MindCluster(_Sourced):
    """Names of Huawei's scheduler: a label, and the policy for one host and for a supernode."""

    ring_controller: str
    one_host: str
    supernode: str


class Platform(Section):
    """A kind of device. `devices` may have ``{n}``, a device's number; resources: usual first.

    `entry` is what a shell does before a command, which it has as ``"$0" "$@"``.
    """

    family: str
    dockerfile: str
    entry: Fact | None = None
    image: Fact | None = None
    devices: tuple[Fact, ...]
    mounts: tuple[Mount, ...]
    gpu_driver: Fact | None = None
    shared_memory: SharedMemory
    user: User
    resources: tuple[Fact, ...]
    mindcluster: MindCluster | None = None

    def base_image(self) -> str | None:
        """Return the published image of the engine, in the newest version that fits."""
        if self.image is None:
            return None
        newest = matrix().stacks[0]
        return self.image.value.format(vllm=newest.vllm, vllm_ascend=newest.vllm_ascend)

    def own_image(self) -> str:
        """Return what an image with v4-ascend is called on the machine that builds it."""
        return f"v4-ascend:{__version__}-{self.family}"

    def build_command(self, tag: str) -> str:
        """Return how that image is built, in a clone of the repository."""
        argument = f"--build-arg SOC={self.family} " if self.mindcluster is not None else ""
        return f"docker build -f {self.dockerfile} {argument}-t {tag} ."

    def started(self, argv: tuple[str, ...]) -> tuple[list[str], list[str]]:
        """Return what starts a command, and what it is given: no image's entrypoint is needed."""
        if self.entry is None:
            return [argv[0]], list(argv[1:])
        return ["/bin/bash", "-c", self.entry.value], list(argv)

    def device_files(self, numbers: tuple[int, ...]) -> list[str]:
        """Return the device files of some devices."""
        found = []
        for device in self.devices:
            several = numbers if "{n}" in device.value else (0,)
            found += [device.value.format(n=n) for n in several]
        return found


class Platforms(Section):
    """The file configs/containers.yaml."""

    dated: str = Field(pattern=r"^\d{4}-\d\d-\d\d$")
    proxy_folder: Fact
    families: tuple[Platform, ...]


@cache
def platforms() -> Platforms:
    """Read the bundled file."""
    path = Path(str(files("v4_ascend.configs") / "containers.yaml"))
    return load_yaml(Platforms, path).value


def platform_of(profile: DeviceProfile) -> Platform:
    """Return what a device's containers need; an emulated one is a CPU."""
    family = "cpu" if profile.emulated else profile.family
    return next(p for p in platforms().families if p.family == family)
