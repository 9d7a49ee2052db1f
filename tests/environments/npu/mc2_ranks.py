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
from v4_ascend.ops import (  # noqa: E402
    act_quant,
    expert_layer,
    int8_act_quant,
    moe_combine,
    moe_dispatch,
    swiglu,
    use_policy,
)
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


def layers(name):
    """Return the fused layer's error on INT8 and bf16 experts, and what it says of bad calls."""
    g = torch.Generator().manual_seed(3)
    local, inner, limit = N_EXPERTS // SIZE, 64, 2.0
    w13 = torch.randn(N_EXPERTS, DIM, 2 * inner, generator=g) / DIM**0.5 * 3
    w2 = torch.randn(N_EXPERTS, inner, DIM, generator=g) / inner**0.5
    parts = [inputs(g, 5 + r) for r in range(SIZE)]  # tokens of each rank differ
    mine = slice(RANK * local, (RANK + 1) * local)
    active = torch.arange(5 + RANK) % 3 != 1
    ids = parts[RANK][1].int()
    ids[0, 0] = N_EXPERTS  # nobody
    seen = {}
    for kind in ("int8", "bf16"):
        first, second = (_stored(w, kind) for w in (w13, w2))
        out = torch.full((5 + RANK, DIM), 7.0, dtype=torch.bfloat16, device="npu")
        call = {
            "x": parts[RANK][0].to("npu"),
            "weight1": [first[0][mine].to("npu")], "weight2": list(second[0][mine].to("npu")),
            "expert_idx": ids.to("npu"),
            "scale1": [_bits(first[1][mine])], "scale2": list(_bits(second[1][mine])),
            "bias1": [], "bias2": [], "probs": parts[RANK][2].to("npu"), "group": name,
            "max_output_size": 512, "out": out,
            "expert_token_nums": torch.zeros(1, local, dtype=torch.int32, device="npu"),
            "x_active_mask": active.to("npu"), "swiglu_limit": limit,
        }  # fmt: skip
        fused = torch.ops._C_ascend.dispatch_ffn_combine.default
        torch.library.opcheck(fused, (), call, test_utils="test_faketensor")
        out.fill_(7.0)
        fused(**call)
        want = torch.zeros(5 + RANK, DIM)
        for t, k in (ids < N_EXPERTS).nonzero().tolist():
            e = int(ids[t, k])
            row = _product(parts[RANK][0][t : t + 1], first, e, kind)
            row = _product(swiglu.reference(row, limit, None), second, e, kind)
            want[t] += row[0] * parts[RANK][2][t, k]
        assert_close(out.cpu()[active], want.bfloat16()[active], ROUNDED)
        assert bool(out.cpu()[~active].isnan().all())
        counted = call["expert_token_nums"].flatten().tolist()
        everyones = [p[1].int() for p in parts]
        for theirs in everyones:
            theirs[0, 0] = N_EXPERTS
        going = torch.cat([p[torch.arange(5 + r) % 3 != 1] for r, p in enumerate(everyones)])
        rows = torch.bincount(going.flatten().long(), minlength=N_EXPERTS + 1)
        assert counted == rows[mine].tolist()
        bad = {
            "ids": {"expert_idx": call["expert_idx"] + N_EXPERTS},
            "rows": {"max_output_size": 1},
            "out": {"out": out.float()},
            "group": {"group": "hccl_world_group"},
            "depth": {"x": call["x"][:, : DIM // 2].contiguous()},
            "nobody": {"weight1": []},
        }
        seen[kind] = {what: refused(fused, call | change) for what, change in bad.items()}
    return seen


def whole(group, n_tokens):
    """Compare the operator with every choice computed by itself; return how often it was called."""
    g = torch.Generator().manual_seed(4)
    local, inner, limit = N_EXPERTS // SIZE, 64, 2.0
    parts = [inputs(g, n) for n in n_tokens]
    first = torch.randn(N_EXPERTS, DIM, 2 * inner, generator=g) / DIM**0.5 * 3
    stored = [_stored(w, "int8") for w in (first, torch.randn(N_EXPERTS, inner, DIM, generator=g))]
    mine = slice(RANK * local, (RANK + 1) * local)
    weights = [
        t[mine].to("npu")
        for values, scale in stored
        for t in (values.transpose(1, 2).contiguous(), scale)
    ]
    expert_layer.prepare(*weights)
    call = (*(t.to("npu") for t in parts[RANK]), *weights, limit, group)
    with use_policy(parts=True):
        assert not expert_layer.is_taken(*call), "a trace tells parts apart"
    assert expert_layer.is_taken(*call)
    reset_calls()
    y, load = expert_layer(*call)
    x, ids, by_choice = parts[RANK]
    want = torch.zeros(len(x), DIM)
    for t, k in torch.ones_like(ids).nonzero().tolist():
        e = int(ids[t, k])
        row = swiglu.reference(_product(x[t : t + 1], stored[0], e, "int8"), limit, None)
        want[t] += _product(row, stored[1], e, "int8")[0] * by_choice[t, k]
    if "_C_ascend::dispatch_ffn_combine" in calls("_C_ascend"):
        assert_close(y.cpu(), want.bfloat16(), expert_layer.tolerance)
    else:  # each row is rounded to bf16 before the sum
        assert float((y.cpu().float() - want).norm() / want.norm().clamp_min(1)) < 0.005
    rows = torch.bincount(torch.cat([p[1] for p in parts]).flatten(), minlength=N_EXPERTS)
    assert load.tolist() == rows[mine].tolist()
    return calls("_C_ascend").get("_C_ascend::dispatch_ffn_combine", 0)


def wholes(group):
    """Alike; one idle; nobody has any; no room in HCCL's buffer."""
    taken = [whole(group, n) for n in ((3, 3, 3), (5, 0, 2), (0, 0, 0))]
    os.environ["HCCL_BUFFSIZE"] = "10"
    try:
        return [*taken, whole(group, (3, 1, 2))]
    finally:
        del os.environ["HCCL_BUFFSIZE"]


def _stored(weight, kind):
    """A weight as its experts store it, and its factors [e, n]."""
    if kind == "bf16":
        return weight.bfloat16(), torch.ones(len(weight), weight.shape[2])
    values, scale = int8_act_quant.reference(weight.transpose(1, 2))
    return values.transpose(1, 2).contiguous(), scale


def _bits(scale):
    """Factors as the vendor takes them: fp32 in the low halves of int64."""
    return (scale.contiguous().view(torch.int32).long() & 0xFFFFFFFF).to("npu")


def _product(x, stored, expert, kind):
    weight, scale = stored[0][expert].float(), stored[1][expert]
    if kind == "bf16":
        return x.float() @ weight
    values, by_row = int8_act_quant.reference(x)
    return (values.float() @ weight) * scale * by_row.unsqueeze(1)


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
        seen["layer"] = layers(name) if CHIP == "a3" else None
        seen["whole"] = wholes(group) if CHIP == "a3" else []
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
