"""The API key of vLLM's servers: one, read from the environment, which `ps` does not show."""

from __future__ import annotations

from v4_ascend.config.topology import Topology
from v4_ascend.errors import NotYetError

VARIABLE = "VLLM_API_KEY"


def only_key(topology: Topology) -> str | None:
    """Return the key of a topology, None if it has none.

    Raises:
        NotYetError: it has several.
    """
    keys = topology.serve.api_keys
    if len(keys) > 1:
        raise NotYetError(
            topology.where("serve.api_keys"),
            f"serve.api_keys: {len(keys)}; vLLM takes one from its environment",
        )
    return keys[0] if keys else None
