"""HCCL_BUFFSIZE: what the MoE's dispatch and combine need, and what all groups take together.

Source: the constraints of aclnnMoeDistributeDispatchV2 and CombineV2 (ops-transformer), HCCL's
own page on HCCL_BUFFSIZE: default 200 MB, every communicator allocates twice that.
"""

from __future__ import annotations

from v4_ascend.config.devices import DeviceProfile
from v4_ascend.config.model import ModelConfig
from v4_ascend.config.topology import ParallelConfig

MB = 1024 * 1024
DEFAULT_MB = 200
MAX_TOKENS = {
    "a2": 256,
    "a3": 512,
    "950": 512,
}  # of one rank in one dispatch; more goes another way
NCCL_BYTES = 400 * MB  # assumed: a few channels of 8 to 16 MB for each peer class


def min_buffsize_mb(
    config: ModelConfig, family: str, ep_size: int, n_local_experts: int, n_tokens: int
) -> int:
    """Return the least HCCL_BUFFSIZE, in MB, for `n_tokens` a rank brings to a dispatch."""
    need = needed_bytes(
        family,
        ep_size=ep_size,
        n_local_experts=n_local_experts,
        n_tokens=n_tokens,
        dim=config.dim,
        topk=config.n_activated_experts,
        n_shared_experts=config.n_shared_experts,
    )
    return max(DEFAULT_MB, -(-need // MB))


def needed_bytes(
    family: str,
    *,
    ep_size: int,
    n_local_experts: int,
    n_tokens: int,
    dim: int,
    topk: int,
    n_shared_experts: int = 1,
) -> int:
    """Return the bytes of a communicator's buffer that a dispatch and its combine fill."""
    n = n_tokens
    if family == "a2":
        return 2 * (n * ep_size * min(n_local_experts, topk) * dim * 2 + 2 * MB)
    row = _align(_align(2 * dim, 32) + 64, 512)
    sent = n_local_experts * n * ep_size * row
    back = (topk + n_shared_experts) * n * _align(2 * dim, 512)
    return 2 * (sent + back)


def buffer_bytes(
    config: ModelConfig,
    profile: DeviceProfile,
    parallel: ParallelConfig,
    n_local_experts: int,
    n_tokens: int,
) -> int:
    """Sum what the communicators of one rank allocate."""
    if parallel.world_size == 1 or profile.kind == "cpu" or profile.emulated:
        return 0
    if profile.kind == "cuda":
        return NCCL_BYTES * len(group_names(parallel))
    mb = DEFAULT_MB
    if parallel.ep_size > 1:
        capped = min(n_tokens, MAX_TOKENS[profile.family])
        mb = min_buffsize_mb(config, profile.family, parallel.ep_size, n_local_experts, capped)
    # The variable holds for a process: a communicator that needs less takes as much.
    return 2 * mb * MB * n_hccl_communicators(parallel)


def group_names(parallel: ParallelConfig) -> tuple[str, ...]:
    """Name the groups a rank is in."""
    p = parallel
    sizes = {"world": p.world_size, "ep": p.ep_size, "tp": p.tp_size, "cp": p.cp_size}
    names = [name for name, size in sizes.items() if size > 1]
    return (*names, "pp") if p.pp_size > 1 else tuple(names)


def n_hccl_communicators(parallel: ParallelConfig) -> int:
    """Count them: the vendor's dispatch and combine want one of their own."""
    return len(group_names(parallel)) + (parallel.ep_size > 1)


def _align(n: int, to: int) -> int:
    return -(-n // to) * to
