"""Which calls the fused dispatch and combine get, by the vendor's pages, without an NPU."""

from dataclasses import dataclass

import pytest
import torch

from v4_ascend.backends import BACKENDS
from v4_ascend.backends.ascend import mc2_limits
from v4_ascend.ops import Solo, moe_combine, moe_dispatch

ASCEND = BACKENDS["ascend"]
BF16 = torch.bfloat16


@dataclass
class Ranks:
    size: int
    hccl_name: str | None = "comm"
    rank: int = 0


@pytest.fixture(autouse=True)
def _default_chip():
    yield
    ASCEND.use_chip(None)


FLASH = {"dtype": BF16, "dim": 4096, "topk": 6, "n_experts": 256}
PRO = {"dtype": BF16, "dim": 7168, "topk": 6, "n_experts": 384}


@pytest.mark.parametrize("chip", mc2_limits.LIMITS)
@pytest.mark.parametrize("model", [FLASH, PRO], ids=["flash", "pro"])
@pytest.mark.parametrize("ep_size", [16, 64])
def test_both_models_are_within_the_limits(chip, model, ep_size):
    assert mc2_limits.why_no_call(chip, group=Ranks(ep_size), **model) is None
    local = model["n_experts"] // ep_size
    batch = (model["dim"], model["topk"], local, ep_size)
    assert mc2_limits.why_no_batch(chip, 1, *batch) is None


@pytest.mark.parametrize(
    ("chip", "size", "changes", "said"),
    [
        ("a3", 1, {}, "one rank"),
        ("a3", 769, {}, "ep_world_size is 769, a3 takes 2 to 768"),
        ("950", 1025, {}, "ep_world_size is 1025, 950 takes 2 to 1024"),
        ("a2", 9, {}, "ep_world_size is 9, a2 takes 2 to 8, 16, 32, 64, 128 or 256"),
        ("a3", 4, {"dtype": torch.float32}, "x is float32, must be bf16 or fp16"),
        ("a3", 4, {"dim": 512}, "H is 512, a3 takes 1024 to 8192"),
        ("950", 4, {"dim": 8224}, "H is 8224, 950 takes 1024 to 8192"),
        ("a2", 4, {"dim": 4100}, "H is 4100, a2 takes a multiple of 32 up to 7168"),
        ("a2", 4, {"dim": 7200}, "H is 7200"),
        ("a3", 4, {"topk": 17}, "K is 17, must be 1 to 16"),
        ("a3", 4, {"n_experts": 4, "topk": 5}, "K is 5, must be 1 to 4"),
        ("a3", 4, {"n_experts": 1028}, "moe_expert_num is 1028, must be at most 1024"),
        ("a3", 3, {}, "moe_expert_num 256 is no multiple of ep_world_size 3"),
        ("a2", 8, {}, "32 experts on a rank, a2 takes 24"),
    ],
)
def test_a_refusal_names_the_limit_and_the_page(chip, size, changes, said):
    why = mc2_limits.why_no_call(chip, group=Ranks(size), **(FLASH | changes))
    assert said in why
    assert size == 1 or "(O" in why


def test_a_group_without_a_communicator_is_refused():
    why = mc2_limits.why_no_call("a3", group=Ranks(4, hccl_name=None), **FLASH)
    assert "no HCCL communicator" in why


@pytest.mark.parametrize(
    ("chip", "n_tokens", "said"),
    [
        ("a2", 0, "no rank has tokens"),
        ("a2", 257, "BS is 257, a2 takes 256"),
        ("a3", 513, "BS is 513, a3 takes 512"),
        ("950", 513, "BS is 513, 950 takes 512"),
    ],
)
def test_a_batch_is_refused_by_its_fullest_rank(chip, n_tokens, said):
    assert said in mc2_limits.why_no_batch(chip, n_tokens, 4096, 6, 16, 16)


def test_a_buffer_that_is_too_small_is_refused_not_overrun(monkeypatch):
    """128 tokens of Flash over 16 ranks of A3: 2 (16 128 16 8704 + 7 128 8192) bytes."""
    monkeypatch.delenv("HCCL_BUFFSIZE", raising=False)
    call = ("a3", 128, 4096, 6, 16, 16)
    assert mc2_limits.why_no_batch(*call) == (
        "HCCL_BUFFSIZE is 200, 128 tokens a rank need 558 (OPD)"
    )
    monkeypatch.setenv("HCCL_BUFFSIZE", "558")
    assert mc2_limits.why_no_batch(*call) is None


def _dispatch(group, chip="a3"):
    ASCEND.use_chip(chip)
    x, ids = torch.zeros(2, 4096, dtype=BF16), torch.zeros(2, 6, dtype=torch.int64)
    arguments = (x, ids, torch.zeros(2, 6), 256, group, False)
    for kernel in moe_dispatch.tried("ascend"):
        if kernel.name == "distribute_dispatch" and group.hccl_name is not None:
            continue  # it would ask the device for its name
        if kernel.why_not(*arguments) is None:
            return kernel.name
    return None


def test_without_it_many_ranks_exchange_and_few_gather():
    names = [k.name for k in moe_dispatch.tried("ascend")]
    assert names[:3] == ["distribute_dispatch", "gather_and_route", "exchange_tokens"]
    assert _dispatch(Ranks(4, hccl_name=None)) == "exchange_tokens"
    assert _dispatch(Ranks(3, hccl_name=None)) == "gather_and_route"
    assert _dispatch(Solo()) == "gather_and_route"


def test_rows_go_back_the_way_they_came():
    """A combine that its dispatch did not prepare is another kernel's, on every rank alike."""
    ASCEND.use_chip("a3")
    (kernel,) = [k for k in moe_combine.tried("ascend") if k.name == "distribute_combine"]
    rows, source = torch.zeros(2, 4096, dtype=BF16), torch.arange(2)
    why = kernel.why_not(rows, source, 6, torch.tensor([2, 0]), Ranks(2))
    assert why == "the rows did not come by npu_moe_distribute_dispatch_v2"
