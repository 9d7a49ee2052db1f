"""Turns this process into one that has emulated NPUs."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import warnings

from v4_ascend.emulation.chips import Chip, chip
from v4_ascend.errors import V4AscendError

# torch.library forgets what it registered when these go.
_kept: list[object] = []
_installed: list[tuple[Chip, int]] = []


def install(soc: str = "950dt", devices: int = 1, memory_gib: float | None = None) -> Chip:
    """Give this process `devices` emulated NPUs, before anything imports torch_npu.

    Args:
        soc: a name of `chips.CHIPS`: a2, a3, 950dt or 950pr.
        devices: how many torch.npu.device_count() reports.
        memory_gib: of each; more does not fit, as on hardware. The chip's own by default.

    Returns:
        the chip. Asking for the same again changes nothing.

    Raises:
        ConfigError: no such chip.
        V4AscendError: torch_npu is not installed, or imported already, or no C compiler.
    """
    wanted = chip(soc), devices
    if _installed:
        if _installed[0] != wanted:
            was = _installed[0]
            raise V4AscendError(
                f"emulation: this process has {was[1]} x {was[0].name} already, "
                f"and cannot become {devices} x {soc}: torch_npu loads once"
            )
        return wanted[0]
    from v4_ascend.emulation import acl  # which needs `environment`, a command of its own

    # torch imports torch_npu by itself otherwise, and before its libraries are there.
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    gib = wanted[0].memory_gib if memory_gib is None else memory_gib
    acl.load(wanted[0], devices, int(gib * 2**30))
    # No CANN folder and no driver: so it is meant, and stdout is for data.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        importlib.import_module("torch_npu")
        from v4_ascend.emulation import collectives, device, stand_in

        importlib.import_module("v4_ascend.emulation.vendor")
        _kept.extend((device.install(), collectives.install(), stand_in.install(wanted[0])))
    _installed.append(wanted)
    return wanted[0]
