"""Layouts of the tiny model that tests run, and plans of them."""

import json

from v4_ascend.checkpoint.synthetic import write_synthetic
from v4_ascend.config.model import ModelConfig
from v4_ascend.config.presets import preset_path
from v4_ascend.config.topology import ParallelConfig, load_topology
from v4_ascend.supernode.experts import place_layer
from v4_ascend.supernode.plan import Rank, plan_of
from v4_ascend.supernode.stages import balance

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
    "pp2-dp2-tp2-dsa-ep2": {
        "pp_size": 2,
        "dp_size": 2,
        "tp_size": 2,
        "ep_size": 2,
        "dsa_cp": True,
    },
    "dp8-ep8": {"dp_size": 8, "ep_size": 8},
}


def write_tiny(folder, seed=3, raw=None, preset="tiny"):
    raw = raw or json.loads(preset_path(preset).read_text()) | CHANGES
    file = folder.with_suffix(".config.json")
    file.write_text(json.dumps(raw))
    write_synthetic(ModelConfig.read(file), folder, seed=seed)
    return folder


def make_plan(checkpoint, layout, **changes):
    p = ParallelConfig(**layout)
    config = ModelConfig.read(checkpoint)
    topology = load_topology(
        "laptop",
        [f"model.checkpoint={checkpoint}", "serve.max_model_len=256", "runtime.dtype=fp32"],
    )
    stages = balance([1.0] * config.n_layers, p.pp_size)
    share = config.n_routed_experts // p.ep_size
    ranks = []
    for rank in range(p.world_size):
        stage, within = divmod(rank, p.stage_size)
        first = within % p.ep_size * share
        ranks.append(
            Rank(rank=rank, host="here", layers=stages[stage], experts=(first, first + share))
        )
    placement = None
    if p.n_redundant_experts:
        counts = [100 - 9 * e for e in range(config.n_routed_experts)]
        placement = (place_layer(counts, p.ep_size, p.n_redundant_experts),) * config.n_layers
    plan = plan_of(topology, p, tuple(ranks), placement=placement)
    few = {"quant_sim": "off", "max_batch_size": 2 * p.dp_size, "max_chunk": 96, **changes}
    return plan.model_copy(update=few)
