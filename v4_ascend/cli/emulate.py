"""`--emulate`: give this process an NPU in host memory, in the environment that has torch_npu."""

from __future__ import annotations

import importlib.util

from v4_ascend.errors import ConfigError

DEFAULT_SOC = "950dt"


def emulate_npu(backend: str, soc: str | None) -> None:
    """Emulate a chip, before anything imports torch; starts this command again if it must.

    Raises:
        ConfigError: the backend is another one, or there is no such chip to emulate.
    """
    if backend != "ascend":
        raise ConfigError("--emulate", "emulates an NPU: needs --backend ascend")
    from v4_ascend.emulation.environment import reenter

    if importlib.util.find_spec("torch_npu") is None:
        reenter("npu")
    from v4_ascend.emulation import install

    install(soc or DEFAULT_SOC)
