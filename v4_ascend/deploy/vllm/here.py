"""What only a host itself knows of a launch's environment."""

from __future__ import annotations

import os
from collections.abc import Mapping

from v4_ascend.deploy.torchrun import address_of, interface_of


def filled_in(env: Mapping[str, str], host: str) -> dict[str, str]:
    """Fill in this host's address and its network interface.

    V4_ASCEND_ADDRESS and V4_ASCEND_NIC win over what the host's name resolves to.

    Raises:
        DeployError: the name does not resolve, or to no address of this machine.
    """
    if not any(v in ("{address}", "{interface}") for v in env.values()):
        return dict(env)
    address = address_of(host)
    interface = os.environ.get("V4_ASCEND_NIC") or interface_of(address, host)
    known = {"{address}": address, "{interface}": interface}
    return {k: known.get(v, v) for k, v in env.items()}
