"""Any legal layout computes what one process computes, over real processes and gloo."""

import json

import pytest
import torch
from parallel_plans import make_plan, run_ranks

from v4_ascend.checkpoint.synthetic import write_synthetic
from v4_ascend.config.model import ModelConfig
from v4_ascend.config.presets import preset_path
from v4_ascend.config.topology import ParallelConfig
from v4_ascend.ops import use_policy
from v4_ascend.runtime.engine import Engine
from v4_ascend.runtime.kv_cache import Chunk
from v4_ascend.supernode.holdings import bytes_read, holdings

# Wide enough that TP of 4 splits whole FP8 blocks.
CHANGES = {"num_attention_heads": 8, "o_groups": 4, "o_lora_rank": 128}
LAYOUTS = {
    "ep2": {"dp_size": 2, "ep_size": 2},
    "ep4": {"dp_size": 4, "ep_size": 4},
    "dp2": {"dp_size": 2},
    "pp2": {"pp_size": 2},
    "pp4": {"pp_size": 4},
    "tp2": {"tp_size": 2},
    "tp4-ep4": {"tp_size": 4, "ep_size": 4},
    "tp2-dsa-ep2": {"tp_size": 2, "ep_size": 2, "dsa_cp": True},
    "tp4-dsa": {"tp_size": 4, "dsa_cp": True},
    "cp2-ep2": {"cp_size": 2, "ep_size": 2},
    "cp4": {"cp_size": 4},
    "pp2-ep2": {"pp_size": 2, "dp_size": 2, "ep_size": 2},
    "pp2-tp2-ep2": {"pp_size": 2, "tp_size": 2, "ep_size": 2},
    "dp2-tp2-ep4": {"dp_size": 2, "tp_size": 2, "ep_size": 4},
    "cp2-tp2-dsa-ep4": {"cp_size": 2, "tp_size": 2, "ep_size": 4, "dsa_cp": True},
    "dp2-cp2-ep4": {"dp_size": 2, "cp_size": 2, "ep_size": 4},
    "ep4-copies": {"dp_size": 4, "ep_size": 4, "n_redundant_experts": 4},
    "pp2-dp2-tp2-ep4": {"pp_size": 2, "dp_size": 2, "tp_size": 2, "ep_size": 4},
    "pp2-cp2-tp2-ep2": {"pp_size": 2, "cp_size": 2, "tp_size": 2, "ep_size": 2},
    "pp6": {"pp_size": 6},  # a hash-routed layer on a later stage
    "dp8-ep8": {"dp_size": 8, "ep_size": 8},
}
WIDE = [name for name, layout in LAYOUTS.items() if ParallelConfig(**layout).world_size > 4]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    raw = json.loads(preset_path("tiny").read_text()) | CHANGES
    file = tmp_path_factory.mktemp("config") / "config.json"
    file.write_text(json.dumps(raw))
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    write_synthetic(ModelConfig.read(file), folder, seed=3)
    return folder


def alone(checkpoint, steps, dp, kernels):
    """What one process computes of one DP group's sequences."""
    plan = make_plan(checkpoint, {}, kernels=kernels)
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
        n_tokens = sum(len(c[1]) for step in cases[name]["steps"] for dp in step for c in dp)
        check_facts(folder, checkpoint, name, plan, n_tokens)
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
        n_local = (config.n_routed_experts + p.n_redundant_experts) // p.ep_size
        of_one = 3 * config.dim * config.moe_inter_dim
        assert facts["expert_values"] == (rank.layers[1] - rank.layers[0]) * n_local * of_one
        for layer, load in enumerate(facts["load"], rank.layers[0]):
            assert len(load) == n_local
            routed[layer] += sum(load)
    assert routed == [n_tokens * config.n_activated_experts] * config.n_layers


@pytest.mark.parametrize("kernels", ["reference", "fast"])
def test_layouts_of_up_to_4_ranks_compute_what_one_process_computes(tmp_path, checkpoint, kernels):
    names = [n for n in LAYOUTS if n not in WIDE]
    if kernels == "fast":  # other kernels for dispatch and combine alone
        names = ["ep4", "tp4-ep4", "ep4-copies"]
    plans = {n: make_plan(checkpoint, LAYOUTS[n], kernels=kernels) for n in names}
    cases = run_ranks(tmp_path, plans, 4)
    check(tmp_path, checkpoint, plans, cases)


@pytest.mark.slow
def test_layouts_of_8_ranks_compute_what_one_process_computes(tmp_path, checkpoint):
    plans = {n: make_plan(checkpoint, LAYOUTS[n], kernels="reference") for n in WIDE}
    cases = run_ranks(tmp_path, plans, 8, timeout=500)
    check(tmp_path, checkpoint, plans, cases)
