"""The chips that can be emulated, as torch_npu sees them."""

from __future__ import annotations

from dataclasses import dataclass

from v4_ascend.errors import ConfigError

CANN_VERSION = "9.2.0"  # the first that takes every call of the pinned torch_npu


@dataclass(frozen=True, slots=True)
class Chip:
    """One chip: what ACL reports, and which operators its libraries have.

    Attributes:
        name: what the user writes.
        generation: a2, a3 or 950; operators and their limits differ by it.
        soc_name: what aclrtGetSocName returns.
        soc_version: what torch_npu makes of that name; vendor code branches on it.
        memory_gib: of one device, unless told otherwise.
        cube_cores: matrix cores, vector cores are twice as many.
    """

    name: str
    generation: str
    soc_name: str
    soc_version: int
    memory_gib: int
    cube_cores: int


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("a2", "a2", "Ascend910B3", 223, 64, 20),
        Chip("a3", "a3", "Ascend910_9391", 250, 64, 24),
        Chip("950dt", "950", "Ascend950DT_9582", 260, 96, 32),
        Chip("950pr", "950", "Ascend950PR_9589", 260, 128, 32),
    )
}


def chip(name: str) -> Chip:
    """Return a chip by its name.

    Raises:
        ConfigError: no such chip.
    """
    if name not in CHIPS:
        raise ConfigError("emulation", f"no chip {name!r}; there is {', '.join(CHIPS)}")
    return CHIPS[name]
