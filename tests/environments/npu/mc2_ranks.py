"""One rank of test_mc2: ``python mc2_ranks.py CHIP RANK SIZE PORT OUT``.

Every batch goes through moe_dispatch and moe_combine as the backend chooses, and through the
references on the CPU; then calls that the vendor's page does not allow. OUT/RANK.json is what
this rank saw.
"""

import json
import os
import sys
from pathlib import Path

import torch

from v4_ascend import emulation
from v4_ascend.backends import BACKENDS

CHIP, RANK, SIZE, PORT, OUT = sys.argv[1:]
RANK, SIZE = int(RANK), int(SIZE)
torch.set_num_threads(1)
emulation.install(CHIP)

import torch.distributed as dist  # noqa: E402
import torch_npu  # noqa: E402

from v4_ascend.backends.ascend import mc2  # noqa: E402
from v4_ascend.emulation import calls, reset_calls  # noqa: E402
from v4_ascend.ops import act_quant, moe_combine, moe_dispatch, use_policy  # noqa: E402
from v4_ascend.ops.check import assert_close  # noqa: E402
from v4_ascend.ops.formats import dequantize_groups  # noqa: E402
from v4_ascend.ops.op import ROUNDED  # noqa: E402
from v4_ascend.runtime.comm import CommGroup, _hccl_name  # noqa: E402
from v4_ascend.runtime.flight import Flight  # noqa: E402

N_EXPERTS, TOPK, DIM = 12, 3, 1024
# Of ranks 0, 1, ...: alike; uneven with one idle; nobody has any; too many for one call.
BATCHES = [(4, 4, 4, 4), (5, 0, 7, 2), (0, 0, 0, 0), (600, 3, 1, 1)]


class Everyone:
    """The references' group, on the CPU: all ranks' inputs are known here."""

    def __init__(self, parts):
        self.rank, self.size, self.parts, self.asked = RANK, SIZE, parts, 0

    def all_gather(self, x):
        self.asked += 1
        return [part[self.asked - 1] for part in self.parts]

    def all_reduce(self, x):
        self.asked += 1
        return torch.stack(self.parts).sum(0)


def inputs(g, n):
    ids = torch.rand(n, N_EXPERTS, generator=g).argsort(-1)[:, :TOPK].contiguous()
    return torch.randn(n, DIM, generator=g).bfloat16(), ids, torch.rand(n, TOPK, generator=g)


def worked(rows, row_weights):
    """What stands for the experts: rows differ by where they go, too."""
    return (rows.float() * row_weights.unsqueeze(1) + row_weights.unsqueeze(1)).bfloat16()


def wanted(parts):
    """What the references give this rank, its dispatch and its combine."""
    got = moe_dispatch.reference(*parts[RANK], N_EXPERTS, Everyone(parts), False)
    n_pairs = sum(len(p[0]) for p in parts) * TOPK
    shares = []
    for rank in range(SIZE):
        group = Everyone(parts)
        group.rank = rank
        rows, row_weights, _, source, _ = moe_dispatch.reference(
            *parts[rank], N_EXPERTS, group, False
        )
        pairs = torch.zeros(n_pairs, DIM)
        pairs[source] = worked(rows, row_weights).float()
        shares.append(pairs)
    out = moe_combine.reference(worked(got[0], got[1]), got[3], TOPK, got[4], Everyone(shares))
    return got, out


def rounded(x):
    return dequantize_groups(*act_quant.reference(x, 128)).to(x.dtype)


def batch(group, parts, fp8):
    """Run one batch on the device; return which vendor operators it called."""
    reset_calls()
    rows, row_weights, sizes, source, tokens = moe_dispatch(
        *(t.to("npu") for t in parts[RANK]), N_EXPERTS, group, fp8
    )
    out = moe_combine(worked(rows, row_weights), source, TOPK, tokens, group)
    found = {name.removeprefix("npu::npu_"): n for name, n in calls("npu").items()}
    got, summed = wanted([(rounded(x), *rest) for x, *rest in parts] if fp8 else parts)
    here = (rows, row_weights, sizes, source, tokens)
    assert_close(tuple(t.cpu() for t in here), got, moe_dispatch.tolerance)
    # The vendor rounds the sum to the rows' dtype.
    if "moe_distribute_combine_v2" in found:
        assert_close(out.cpu().bfloat16(), summed.bfloat16(), ROUNDED)
    else:
        assert_close(out.cpu(), summed, moe_combine.tolerance)
    return found


def shapes_of_meta(call):
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    out = torch.ops.npu.npu_moe_distribute_dispatch_v2(**meta)
    return [(list(t.shape), str(t.dtype)) for t in out]


def refusals(name):
    """Return what the operator says to calls that its page rules out; all ranks make them."""
    x, ids, _ = inputs(torch.Generator().manual_seed(1), 4)
    good = {
        "x": x.to("npu"), "expert_ids": ids.int().to("npu"), "group_ep": name,
        "ep_world_size": SIZE, "ep_rank_id": RANK, "moe_expert_num": N_EXPERTS,
        "comm_alg": "fullmesh" if CHIP == "a2" else "",
        "expert_scales": torch.ones(4, TOPK, device="npu") if CHIP == "a2" else None,
    }  # fmt: skip
    out = torch.ops.npu.npu_moe_distribute_dispatch_v2(**good)
    assert [(list(t.shape), str(t.dtype)) for t in out] == shapes_of_meta(good)
    many = {"x": good["x"].repeat(200, 1), "expert_ids": good["expert_ids"].repeat(200, 1)}
    if CHIP == "a2":
        many["expert_scales"] = torch.ones(800, TOPK, device="npu")
    late = torch.tensor([True, False, True, True], device="npu")
    bad = {
        "dtype": {"x": good["x"].float()},
        "ids": {"expert_ids": good["expert_ids"].long()},
        "twice": {"expert_ids": torch.zeros_like(good["expert_ids"])},
        "batch": many,
        "ranks": {"ep_world_size": SIZE + 1},
        "rank": {"ep_rank_id": (RANK + 1) % SIZE},
        "group": {"group_ep": "hccl_world_group"},
        "no group": {"group_ep": ""},
        "width": {"x": good["x"][:, :1000].contiguous()},
        "mask": {"x_active_mask": late},
        "quant": {"quant_mode": 2},
        "shared": {"shared_expert_rank_num": 1},
        "experts": {"moe_expert_num": N_EXPERTS + 1},
        "differ": {"global_bs": SIZE * (4 + RANK)},
        "scales": {"expert_scales": None if CHIP == "a2" else torch.ones(4, TOPK, device="npu")},
    }  # fmt: skip
    said = {
        what: refused(torch.ops.npu.npu_moe_distribute_dispatch_v2, good | c)
        for what, c in bad.items()
    }
    back = {k: v for k, v in good.items() if k != "x"} | {
        "expand_x": out[0], "assist_info_for_combine": out[2], "ep_send_counts": out[4],
        "expert_scales": torch.ones(4, TOPK, device="npu"),
        "expand_scales": out[6] if CHIP == "a2" else None,
    }  # fmt: skip
    other = {
        "other info": {"assist_info_for_combine": torch.zeros_like(out[2])},
        "few rows": {"expand_x": out[0][:1]},
        "fp32 rows": {"expand_x": out[0].float()},
    }
    for what, change in other.items():
        said[what] = refused(torch.ops.npu.npu_moe_distribute_combine_v2, back | change)
    torch.ops.npu.npu_moe_distribute_combine_v2(**back)
    return said


def refused(operator, call):
    try:
        operator(**call)
    except RuntimeError as e:
        return str(e)
    return "accepted"


def main():
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": PORT}
    dist.init_process_group("hccl", rank=RANK, world_size=SIZE)
    BACKENDS["ascend"].use_chip(None)
    handle, own = dist.new_group(list(range(SIZE))), dist.new_group(list(range(SIZE)))
    name = _hccl_name(own, torch.device("npu"))
    group = CommGroup("ep", range(SIZE), RANK, handle, Flight(), name)
    g = torch.Generator().manual_seed(9)
    has_fp8 = CHIP.startswith("950")
    found = []
    with torch.inference_mode(), use_policy(backend="ascend"):
        for number, tokens in enumerate(BATCHES):
            parts = [inputs(g, n) for n in tokens[:SIZE]]
            found.append(batch(group, parts, fp8=has_fp8 and number % 2 == 1))
        seen = {"calls": found, "said": refusals(name), "name": name}
        seen["misordered"] = misordered(group)
    dist.barrier()
    dist.destroy_process_group()
    (Path(OUT) / f"{RANK}.json").write_text(json.dumps(seen))


def misordered(group):
    """Return what is said of an operator that gives rows in another order."""
    true = torch_npu.npu_moe_distribute_dispatch_v2

    def backwards(*args, **kwargs):
        rows, *rest = true(*args, **kwargs)
        n = int(rest[2].sum())
        return torch.cat((rows[:n].flip(0), rows[n:])), *rest

    mc2._proven.clear()
    torch_npu.npu_moe_distribute_dispatch_v2 = backwards
    try:
        x, ids, weights = (t.to("npu") for t in inputs(torch.Generator().manual_seed(2), 4))
        moe_dispatch(x, ids, weights, N_EXPERTS, group, False)
    except Exception as e:  # noqa: BLE001  # the test wants its type and words
        return f"{type(e).__name__}: {e}"
    finally:
        torch_npu.npu_moe_distribute_dispatch_v2 = true
    return "accepted"


if __name__ == "__main__":
    main()
