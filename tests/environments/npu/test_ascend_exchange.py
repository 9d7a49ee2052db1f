"""Rows of a few ranks through the vendor's routing: each rank takes its experts' share."""

from dataclasses import dataclass

import pytest
import torch

from v4_ascend.backends import BACKENDS
from v4_ascend.emulation import calls
from v4_ascend.ops import moe_combine, moe_dispatch, use_policy
from v4_ascend.ops.check import assert_close

N_EXPERTS, TOPK, DIM = 12, 3, 64
TOKENS = (5, 0, 7)  # of each rank


@dataclass
class Everyone:
    """A group whose ranks' tensors are all here; `asked` says in which order they are wanted."""

    rank: int
    parts: list
    device: str
    asked: int = 0
    hccl_name: str | None = None

    @property
    def size(self):
        return len(TOKENS)

    def all_gather(self, x):
        self.asked += 1
        gathered = [p[self.asked - 1] for p in self.parts]
        assert torch.equal(gathered[self.rank], x.cpu())
        return [p.to(self.device) for p in gathered]


def _ranks():
    g = torch.Generator().manual_seed(9)
    for n in TOKENS:
        ids = torch.rand(n, N_EXPERTS, generator=g).argsort(-1)[:, :TOPK].contiguous()
        yield torch.randn(n, DIM, generator=g).bfloat16(), ids, torch.rand(n, TOPK, generator=g)


@pytest.mark.parametrize("rank", range(len(TOKENS)))
def test_a_rank_gets_the_rows_of_its_experts(rank):
    BACKENDS["ascend"].use_chip(None)
    parts = list(_ranks())
    mine = parts[rank]
    want = moe_dispatch.reference(*mine, N_EXPERTS, Everyone(rank, parts, "cpu"), False)
    with torch.inference_mode(), use_policy(backend="ascend"):
        there = [t.to("npu") for t in mine]
        got = moe_dispatch(*there, N_EXPERTS, Everyone(rank, parts, "npu"), False)
    assert_close(tuple(t.cpu() for t in got), want, moe_dispatch.tolerance)
    assert calls("npu")["npu::npu_moe_init_routing_v2"] == 1


def test_sums_over_ranks_are_left_to_torch():
    """The vendor's sum needs every row of a token on one rank."""
    BACKENDS["ascend"].use_chip(None)
    (kernel,) = [k for k in moe_combine.tried("ascend") if k.name == "local_unpermute"]
    rows, source = torch.zeros(2, DIM), torch.arange(2)
    group = Everyone(0, [], "cpu")
    assert "3 ranks" in kernel.why_not(rows, source, TOPK, torch.tensor(TOKENS), group)
