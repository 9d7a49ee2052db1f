"""Layouts over many ranks, each on an emulated NPU of its own, groups asked of HCCL.

HCCL's calls are carried by gloo and the vendor's fused dispatch and combine by their stand-ins:
this proves the calls, the placement and the numbers they should give, not what HCCL does. The
chip is the A2, whose fused operators take rows as narrow as the tiny model's.
"""

import json

import pytest
import torch
from layouts import make_plan
from parallel_plans import run_ranks

from v4_ascend.checkpoint.synthetic import in_format, write_synthetic
from v4_ascend.config.model import ModelConfig
from v4_ascend.config.presets import preset_path
from v4_ascend.ops import use_policy
from v4_ascend.runtime.engine import Engine
from v4_ascend.runtime.kv_cache import Chunk

RAGGED = ((40, 3), (5, 30), (1, 1), (1, 0))
REFERENCES = {
    "pp2": {"pp_size": 2},
    "tp2": {"tp_size": 2},
    "cp2-ep2": {"cp_size": 2, "ep_size": 2},
    "ep4": {"dp_size": 4, "ep_size": 4},
    "pp2-dp2-tp2-ep4": {"pp_size": 2, "dp_size": 2, "tp_size": 2, "ep_size": 4},
}
# A DP group has the same sequences in each: what one rank computes of it is the measure.
FAST = {
    "one": {},
    "fast-ep2": {"dp_size": 2, "ep_size": 2},
    "fast-ep4": {"dp_size": 4, "ep_size": 4},
}
ON_NPU = {"device": "cpu-emulated-npu", "backend": "ascend", "chip": "a2", "emulated": True}
DISPATCH, COMBINE = "npu::npu_moe_distribute_dispatch_v2", "npu::npu_moe_distribute_combine_v2"
WORLD = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A2 has no FP8, so bf16; wide enough for TP."""
    wide = {"num_attention_heads": 8, "o_groups": 4, "o_lora_rank": 128}
    raw = json.loads(preset_path("tiny").read_text()) | wide
    file = tmp_path_factory.mktemp("config") / "config.json"
    file.write_text(json.dumps(raw))
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    write_synthetic(in_format(ModelConfig.read(file), "bf16"), folder, seed=3)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, checkpoint):
    """All layouts on the same processes: a folder of results, and the cases with their steps."""
    folder = tmp_path_factory.mktemp("runs")
    plans = {
        n: make_plan(checkpoint, layout, kernels="reference", dtype="fp32", **ON_NPU)
        for n, layout in REFERENCES.items()
    } | {
        n: make_plan(checkpoint, layout, kernels="fast", dtype="bf16", **ON_NPU)
        for n, layout in FAST.items()
    }
    return folder, run_ranks(folder, plans, WORLD, ragged=RAGGED)


def _logits(runs, name, dp=0):
    return [x for x in torch.load(runs[0] / f"{name}-dp{dp}.pt") if x is not None]


def _facts(runs, name):
    folder, cases = runs
    n_ranks = len(cases[name]["plan"]["ranks"])
    return [json.loads((folder / f"{name}-rank{r}.json").read_text()) for r in range(n_ranks)]


def _on_cpu(checkpoint, steps, dp):
    with use_policy(kernels="reference"):
        plan = make_plan(checkpoint, {}, kernels="reference", dtype="fp32")
        engine = Engine.load(plan, lambda done, total: None)
        found = [engine.logits([Chunk(*c) for c in step[dp]]) for step in steps]
    return [x for x in found if x is not None]


@pytest.mark.parametrize("name", REFERENCES)
def test_logits_are_those_of_one_process_on_the_cpu(runs, checkpoint, name):
    case = runs[1][name]
    for dp in range(case["plan"]["parallel"]["dp_size"]):
        got, want = _logits(runs, name, dp), _on_cpu(checkpoint, case["steps"], dp)
        assert len(got) == len(want) > 0
        assert max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True)) < 1e-5


@pytest.mark.parametrize("name", [*REFERENCES, "fast-ep2", "fast-ep4"])
def test_every_group_is_asked_of_hccl_and_every_rank_computes_on_its_npu(runs, name):
    for facts in _facts(runs, name):
        assert facts["groups"]
        assert set(facts["groups"].values()) == {"hccl"}
        assert facts["device"] == "npu:0"
        assert any(n.startswith("c10d::") for n in facts["calls"])
        ep_size = runs[1][name]["plan"]["parallel"]["ep_size"]
        assert (facts["hccl_name"] is not None) == (ep_size > 1)


@pytest.mark.parametrize("name", ["fast-ep2", "fast-ep4"])
def test_experts_are_reached_by_the_fused_operators(runs, checkpoint, name):
    layers = ModelConfig.read(checkpoint).n_layers
    for facts in _facts(runs, name):
        calls = facts["calls"]
        # A layer and step each; once more to prove the order of rows.
        assert calls[DISPATCH] == calls[COMBINE] == layers * len(RAGGED) + 1
    assert all(DISPATCH not in f["calls"] for n in REFERENCES for f in _facts(runs, n))


@pytest.mark.parametrize("name", ["fast-ep2", "fast-ep4"])
def test_with_them_logits_are_those_of_one_emulated_npu(runs, name):
    """Whose sums of experts are rounded to bf16 too: most tokens are the same bits.

    Experts get rows of all groups in one product, which may then sum in another order.
    """
    assert runs[1][name]["steps"][0][0] == runs[1]["one"]["steps"][0][0]
    errors = torch.cat(
        [
            (a - b).norm(dim=-1) / b.norm(dim=-1)
            for a, b in zip(_logits(runs, name), _logits(runs, "one"), strict=True)
        ]
    )
    assert float(errors.median()) == 0.0
    assert float(errors.max()) < 1e-3
