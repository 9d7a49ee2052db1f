"""Any legal layout computes what one process computes, over real processes and gloo."""

import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from layouts import LAYOUTS, make_plan, write_tiny
from parallel_plans import run_ranks

from v4_ascend.backends.exchange import FEW_RANKS
from v4_ascend.checkpoint.folder import CheckpointFolder
from v4_ascend.checkpoint.reader import Checkpoint
from v4_ascend.checkpoint.shard import Sharding
from v4_ascend.config.model import ModelConfig
from v4_ascend.config.topology import ParallelConfig
from v4_ascend.model.numerics import Numerics
from v4_ascend.model.resident import resident_bytes
from v4_ascend.model.shard import Shard
from v4_ascend.model.transformer import Transformer
from v4_ascend.ops import Solo, use_policy
from v4_ascend.runtime.engine import Engine
from v4_ascend.runtime.kv_cache import Chunk
from v4_ascend.supernode.holdings import bytes_read, holdings
from v4_ascend.supernode.traffic import Routing, Traffic

WIDE = [name for name, layout in LAYOUTS.items() if ParallelConfig(**layout).world_size > 4]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny") / "checkpoint")


def alone(checkpoint, steps, dp, kernels, **changes):
    """What one process computes of one DP group's sequences."""
    plan = make_plan(checkpoint, {}, kernels=kernels, **changes)
    with use_policy(kernels=kernels):
        engine = Engine.load(plan, lambda done, total: None)
        return [engine.logits([Chunk(*c) for c in step[dp]]) for step in steps]


def check(folder, checkpoint, plans, cases):
    worst = {}
    for name, plan in plans.items():
        for dp in range(plan.parallel.dp_size):
            got = torch.load(folder / f"{name}-dp{dp}.pt")
            want = alone(checkpoint, cases[name]["steps"], dp, plan.kernels)
            for a, b in zip(got, want, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    worst[name] = max(worst.get(name, 0.0), float((a - b).abs().max()))
        steps = cases[name]["steps"]
        n_tokens = [
            sum(len(c[1]) for step in steps for c in step[dp])
            for dp in range(plan.parallel.dp_size)
        ]
        check_facts(folder, checkpoint, name, plan, n_tokens)
        check_wire(folder, checkpoint, name, plan, steps)
    assert {name: error for name, error in worst.items() if not error < 1e-5} == {}
    # Other sizes of products sum in another order; DP and PP alone change none.
    alike = [n for n in plans if not set(LAYOUTS[n]) - {"dp_size", "pp_size"}]
    assert all(worst[n] == 0.0 for n in alike), worst


def check_facts(folder, checkpoint, name, plan, n_tokens):
    config = ModelConfig.read(checkpoint)
    p, routed = plan.parallel, [0] * config.n_layers
    for rank in plan.ranks:
        facts = json.loads((folder / f"{name}-rank{rank.rank}.json").read_text())
        held = holdings(config, plan, rank)
        assert facts["read"] == [bytes_read(held)] * 2
        check_read(facts["read_by_process"])
        check_resident(facts["resident"], held)
        n_local = (config.n_routed_experts + p.n_redundant_experts) // p.ep_size
        for layer, load in enumerate(facts["load"], rank.layers[0]):
            assert len(load) == n_local
            routed[layer] += sum(load)
    assert routed == [sum(n_tokens) * config.n_activated_experts] * config.n_layers


def check_read(noted):
    """From before the first tensor to the last the process read them, and nothing else."""
    (first, before), (last, after) = noted
    assert after - before == pytest.approx(last - first, rel=0.02)


def check_wire(folder, checkpoint, name, plan, steps):
    """What ranks count is what the plan says, and what their sockets carried is what they count."""
    config, p = ModelConfig.read(checkpoint), plan.parallel
    facts = [json.loads((folder / f"{name}-rank{r.rank}.json").read_text()) for r in plan.ranks]
    traffic = traffic_of(config, plan)
    slots = [{c[0] for step in steps for c in step[dp]} for dp in range(p.dp_size)]
    for rank, found in enumerate(facts):
        stage, within = divmod(rank, p.stage_size)
        first = rank - within % p.ep_size
        routed = routings([facts[r]["routed"] for r in range(first, first + p.ep_size)])
        n_layers = plan.ranks[rank].layers[1] - plan.ranks[rank].layers[0]
        want = Counter()
        for number, step in enumerate(steps):
            n_tokens = [sum(len(ids) for _, ids, _ in chunks) for chunks in step]
            of_step = routed[number * n_layers : (number + 1) * n_layers]
            want.update(traffic.forward(rank, n_tokens, of_step))
            if stage == p.pp_size - 1:
                n = n_tokens[within // (p.cp_size * p.tp_size)]
                want.update(logits_of_all(config, p, n, rank))
        assert found["bytes_sent"] == {k: n for k, n in want.items() if n}, (name, rank)
        of_step = routed[len(steps) * n_layers :]
        want = traffic.decode(rank, [len(s) for s in slots], of_step)
        assert found["bytes_sent_decoding"] == {k: n for k, n in want.items() if n}, (name, rank)
        for group, exchanges in found["wire"].items():
            for what, (counted, on_wire) in exchanges.items():
                assert on_wire == pytest.approx(counted, rel=0.02), (name, rank, group, what)


def traffic_of(config, plan):
    p = plan.parallel
    stages = [plan.ranks[s * p.stage_size].layers for s in range(p.pp_size)]
    gathers = plan.kernels == "reference" or p.ep_size <= FEW_RANKS
    fp8 = plan.quant_sim == "on"
    return Traffic(
        config=config, parallel=p, layers=stages, value_bytes=4, gathers=gathers, fp8=fp8
    )


def routings(routed):
    """Join what the ranks of an EP group noted of each dispatch."""
    return [
        Routing([tokens for tokens, _ in calls], [rows for _, rows in calls])
        for calls in zip(*routed, strict=True)
    ]


def logits_of_all(config, p, n, rank):
    """Serving draws from some rows; these tests gather the logits of every token."""
    cp = rank % p.stage_size // p.tp_size % p.cp_size
    own = n // p.cp_size + (cp < n % p.cp_size)
    words = 4 * config.vocab_size
    return {
        "tp": (p.tp_size - 1) * own * words // p.tp_size,
        "cp": (p.cp_size - 1) * -(-n // p.cp_size) * words,
    }


def check_resident(nbytes, held):
    """A rank that widens to fp32 keeps four bytes for each value it holds, and nothing twice."""
    values = 0
    for name, h in held.items():
        if not name.endswith(".scale"):
            per_value = {"I8": 0.5, "F8_E4M3": 1, "BF16": 2, "F32": 4, "I64": 4}[h.spec.dtype]
            values += h.nbytes / per_value
    assert nbytes == pytest.approx(4 * values, rel=0.02)


def test_a_rank_with_one_expert_too_many_is_noticed(checkpoint):
    plan = make_plan(checkpoint, {"dp_size": 2, "ep_size": 2}, kernels="reference")
    config, reader = ModelConfig.read(checkpoint), Checkpoint(checkpoint)
    held = holdings(config, plan, plan.ranks[0])
    source, numerics = reader.tensor, Numerics(dtype=torch.float32, quant_sim=False)
    for own, is_right in (((0, 1, 2, 3), True), ((0, 1, 2, 3, 4), False)):
        placed = (own, (4, 5, 6, 7))
        shard = replace(Shard.whole(config), placement=(placed,) * config.n_layers, ep=Solo())
        model = Transformer.read(source, config, numerics, with_drafter=False, shard=shard)
        with nullcontext() if is_right else pytest.raises(AssertionError):
            check_resident(resident_bytes(model), held)


@pytest.mark.parametrize("kernels", ["reference", "fast"])
def test_layouts_of_up_to_4_ranks_compute_what_one_process_computes(tmp_path, checkpoint, kernels):
    names = [n for n in LAYOUTS if n not in WIDE]
    if kernels == "fast":  # other kernels for dispatch and combine alone
        names = ["ep4", "tp4-ep4", "ep4-copies"]
    plans = {n: make_plan(checkpoint, LAYOUTS[n], kernels=kernels) for n in names}
    cases = run_ranks(tmp_path, plans, 4)
    check(tmp_path, checkpoint, plans, cases)


def test_rows_travel_in_fp8_and_change_nothing(tmp_path, checkpoint):
    """Experts that round their input get it rounded: a byte a value and a scale for 128."""
    plans = {
        f"ep4-{sim}": make_plan(checkpoint, LAYOUTS["ep4"], kernels="fast", quant_sim=sim)
        for sim in ("on", "off")
    }
    cases = run_ranks(tmp_path, plans, 4)
    sent = {}
    for name, plan in plans.items():
        check_wire(tmp_path, checkpoint, name, plan, cases[name]["steps"])
        facts = [json.loads((tmp_path / f"{name}-rank{r}.json").read_text()) for r in range(4)]
        sent[plan.quant_sim] = sum(f["bytes_sent"]["ep"] for f in facts)
    for dp in range(4):
        want = alone(checkpoint, cases["ep4-on"]["steps"], dp, "fast", quant_sim="on")
        for a, b in zip(torch.load(tmp_path / f"ep4-on-dp{dp}.pt"), want, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)
    # Of what goes out and comes back in fp32, the way out is a quarter.
    assert 0.6 < sent["on"] / sent["off"] < 0.7


@pytest.mark.slow
def test_layouts_of_8_ranks_compute_what_one_process_computes(tmp_path, checkpoint):
    plans = {n: make_plan(checkpoint, LAYOUTS[n], kernels="reference") for n in WIDE}
    cases = run_ranks(tmp_path, plans, 8, timeout=500)
    check(tmp_path, checkpoint, plans, cases)


def test_ranks_that_load_their_own_files_compute_the_same(tmp_path, checkpoint):
    names, out = ["pp2-tp2-ep2", "ep4-copies"], tmp_path / "sharded"
    plans = {}
    for name in names:
        plan = make_plan(checkpoint, LAYOUTS[name], kernels="reference")
        Sharding(CheckpointFolder(checkpoint), plan).run(out / name)
        plans[name] = plan.model_copy(update={"checkpoint": str(out / name)})
    cases = run_ranks(tmp_path, plans, 4)
    check(tmp_path, checkpoint, plans, cases)
