"""What the vendor's fused dispatch and combine take, by chip, as its pages say.

Sources: OPD is op-plugin torch_npu-npu_moe_distribute_dispatch_v2.md (A2, A3), OT is
ops-transformer mc2/moe_distribute_dispatch_v2/docs/aclnnMoeDistributeDispatchV4.md (950DT
too) and, beside it, the design document of the A2 operators. Where they differ, what all of
them allow is taken. Of the ways to send, A2 uses ``fullmesh`` and the others their default:
``hierarchy`` takes no mask, and so no ranks that have fewer tokens.
"""

from __future__ import annotations

import os
from collections.abc import Container
from dataclasses import dataclass

import torch

from v4_ascend.backends.ascend.soc import A2, A3, A5
from v4_ascend.ops import Group
from v4_ascend.supernode.collective_buffers import DEFAULT_MB, MAX_TOKENS, MB, needed_bytes

DTYPES = (torch.bfloat16, torch.float16)  # OPD: x, without quantisation
MAX_TOPK, MAX_EXPERTS = 16, 1024  # OPD, OT


@dataclass(frozen=True, slots=True)
class Limits:
    """One chip's.

    Attributes:
        comm_alg: how tokens are sent.
        ep_sizes, dims: of the group and of a row, and the same in words.
        max_local: experts of one rank.
        max_slots: experts of one rank, times ranks.
        takes_scales: whether the weights of the choices must go along (else error 561002).
    """

    comm_alg: str
    ep_sizes: Container[int]
    ep_words: str
    dims: Container[int]
    dim_words: str
    max_local: int
    max_slots: int
    takes_scales: bool


LIMITS = {
    A2: Limits(
        comm_alg="fullmesh",
        ep_sizes=(2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, 256),
        ep_words="2 to 8, 16, 32, 64, 128 or 256",
        dims=range(32, 7168 + 1, 32),
        dim_words="a multiple of 32 up to 7168",
        max_local=24,  # OT design document 2.2.2, FLAG_OFFSET
        max_slots=MAX_EXPERTS,
        takes_scales=True,
    ),
    A3: Limits(
        comm_alg="",
        ep_sizes=range(2, 768 + 1),
        ep_words="2 to 768",
        dims=range(1024, 8192 + 1),
        dim_words="1024 to 8192",
        max_local=MAX_EXPERTS,
        max_slots=2048,
        takes_scales=False,
    ),
    A5: Limits(
        comm_alg="",
        ep_sizes=range(2, 1024 + 1),
        ep_words="2 to 1024",
        dims=range(1024, 8192 + 1),
        dim_words="1024 to 8192",
        max_local=MAX_EXPERTS,
        max_slots=2048,
        takes_scales=False,
    ),
}


def why_no_call(
    chip: str, dtype: torch.dtype, dim: int, topk: int, n_experts: int, group: Group
) -> str | None:
    """Return the limit that a dispatch breaks by what is the same on every rank, or None."""
    limits = LIMITS[chip]
    if group.size == 1:
        return "one rank: nothing travels"
    if group.hccl_name is None:
        return "the group has no HCCL communicator to name in group_ep (OPD)"
    if group.size not in limits.ep_sizes:
        return f"ep_world_size is {group.size}, {chip} takes {limits.ep_words} (OPD, OT)"
    if dtype not in DTYPES:
        return f"x is {str(dtype)[6:]}, must be bf16 or fp16 (OPD)"
    if dim not in limits.dims:
        return f"H is {dim}, {chip} takes {limits.dim_words} (OPD, OT)"
    if not 0 < topk <= min(MAX_TOPK, n_experts):
        return f"K is {topk}, must be 1 to {min(MAX_TOPK, n_experts)} (OPD)"
    if n_experts > MAX_EXPERTS:
        return f"moe_expert_num is {n_experts}, must be at most {MAX_EXPERTS} (OPD)"
    if n_experts % group.size:
        return f"moe_expert_num {n_experts} is no multiple of ep_world_size {group.size} (OPD)"
    local = n_experts // group.size
    if local > limits.max_local:
        return f"{local} experts on a rank, {chip} takes {limits.max_local} (OT)"
    if local * group.size > limits.max_slots:
        return f"{local} experts on {group.size} ranks, must be {limits.max_slots} in all (OT)"
    return None


def why_no_batch(
    chip: str, n_tokens: int, dim: int, topk: int, n_local_experts: int, ep_size: int
) -> str | None:
    """Return the limit that the fullest rank's tokens break, or None."""
    if not n_tokens:
        return "no rank has tokens, BS must be at least 1 (OPD)"
    if n_tokens > MAX_TOKENS[chip]:
        return f"BS is {n_tokens}, {chip} takes {MAX_TOKENS[chip]} (OPD, OT)"
    need = needed_bytes(
        chip,
        ep_size=ep_size,
        n_local_experts=n_local_experts,
        n_tokens=n_tokens,
        dim=dim,
        topk=topk,
    )
    # The same on all ranks, or the vendor's operators do not work either.
    has = int(os.environ.get("HCCL_BUFFSIZE", DEFAULT_MB))
    if need > has * MB:
        return f"HCCL_BUFFSIZE is {has}, {n_tokens} tokens a rank need {-(-need // MB)} (OPD)"
    return None
