"""What a rank reads, and in which order."""

from dataclasses import replace

import pytest
import torch

from v4_ascend.checkpoint.reader import Checkpoint
from v4_ascend.checkpoint.synthetic import in_format, write_synthetic
from v4_ascend.config.model import ModelConfig
from v4_ascend.config.presets import preset_path
from v4_ascend.config.topology import load_topology
from v4_ascend.errors import ConfigError, NotYetError
from v4_ascend.model.numerics import Numerics
from v4_ascend.model.shard import Shard
from v4_ascend.model.transformer import Transformer
from v4_ascend.supernode.holdings import holdings, reading_order
from v4_ascend.supernode.planning import deploy_plan

TINY = ModelConfig.read(preset_path("tiny"))
SPARK = ModelConfig.read(preset_path("tiny-dspark"))
TWO = "cluster.supernodes=[{name: a, host_count: 1, devices_per_host: 2}]"


@pytest.mark.parametrize(
    ("model", "format", "n_drafts", "n_stages"),
    [
        (TINY, "fp8", 0, 1),
        (TINY, "fp8", 1, 1),
        (TINY, "fp32", 1, 2),
        (SPARK, "fp8", 5, 1),
        (SPARK, "fp8", 5, 2),
        (SPARK, "fp32", 0, 2),
    ],
)
def test_the_order_is_that_in_which_a_model_asks(tmp_path, model, format, n_drafts, n_stages):
    """The drafter, and the embedding for it, are the last stage's."""
    config = in_format(model, format)
    write_synthetic(config, tmp_path / "c", seed=0)
    checkpoint, numerics = Checkpoint(tmp_path / "c"), Numerics.of(config, "fp32", "auto")
    asked = []

    def source(name: str) -> torch.Tensor:
        asked.append(name)
        return checkpoint.tensor(name)

    settings = [f"serve.n_draft_tokens={n_drafts}", f"layout={{pp_size: {n_stages}}}", TWO]
    plan = deploy_plan(load_topology("laptop", settings), config)
    for rank in plan.ranks:
        asked.clear()
        shard = replace(Shard.whole(config), layers=rank.layers)
        Transformer.read(source, config, numerics, with_drafter=n_drafts > 0, shard=shard)
        held = holdings(config, plan, rank)
        assert list(held) == asked
        if n_stages == 1:
            assert list(reading_order(config, with_drafter=n_drafts > 0)) == asked
        for name, h in held.items():
            header = checkpoint.headers[name]
            assert (h.spec.dtype, h.spec.shape, h.part) == (header.dtype, header.shape, None)


@pytest.mark.parametrize(
    ("preset", "n_drafts"), [("flash", 0), ("pro", 0), ("flash-0731", 0), ("flash-0731", 5)]
)
def test_one_rank_of_a_real_model_reads_all_but_a_drafter_it_does_not_run(preset, n_drafts):
    from v4_ascend.config.inventory import inventory

    config = ModelConfig.read(preset_path(preset))
    plan = deploy_plan(load_topology("laptop", []), TINY)
    whole = plan.ranks[0].model_copy(
        update={"layers": (0, config.n_layers), "experts": (0, config.n_routed_experts)}
    )
    changes = {"ranks": (whole,), "n_draft_tokens": n_drafts}
    held = holdings(config, plan.model_copy(update=changes), whole)
    main = [t for t in inventory(config) if n_drafts or not t.name.startswith("mtp.")]
    assert sorted((t.name, t.dtype, t.shape) for t in main) == sorted(
        (h.spec.name, h.spec.dtype, h.spec.shape) for h in held.values()
    )


def test_caches_for_less_than_one_request_are_refused():
    with pytest.raises(ConfigError, match="1024 tokens for each of 1 DP groups; one request"):
        deploy_plan(load_topology("laptop", ["serve.cache_tokens=1024"]), TINY)


@pytest.mark.parametrize(
    ("config", "asked", "says"),
    [
        (TINY, ["serve.n_draft_tokens=128"], "128; no draft ends a group of 128 tokens"),
        (SPARK, ["serve.n_draft_tokens=6"], "6; the checkpoint's drafter guesses 5"),
    ],
)
def test_drafts_that_cannot_be_made_are_refused(config, asked, says):
    with pytest.raises(ConfigError, match=says):
        deploy_plan(load_topology("laptop", asked), config)


def test_dspark_is_refused_where_the_vendors_attention_has_no_room_for_it():
    model = ModelConfig.read(preset_path("flash-0731"))
    host = "cluster.supernodes=[{name: a, host_count: 1, devices_per_host: 8}]"
    asked = ["cluster.device=ascend-950dt-96", host, "layout={dp_size: 8, ep_size: 8}"]
    asked.append("serve.n_draft_tokens=5")
    with pytest.raises(NotYetError, match="DSpark on ascend-950dt-96: not yet; .* tokens see 133"):
        deploy_plan(load_topology("laptop", asked), model)
    plan = deploy_plan(load_topology("laptop", [*asked, "runtime.fallback=reference"]), model)
    assert plan.n_draft_tokens == 5
