"""What a rank reads, and in which order."""

import pytest
import torch

from v4_ascend.checkpoint.reader import Checkpoint
from v4_ascend.checkpoint.synthetic import in_format, write_synthetic
from v4_ascend.config.model import ModelConfig
from v4_ascend.config.presets import preset_path
from v4_ascend.config.topology import load_topology
from v4_ascend.errors import ConfigError
from v4_ascend.model.numerics import Numerics
from v4_ascend.model.transformer import Transformer
from v4_ascend.supernode.holdings import holdings
from v4_ascend.supernode.planning import deploy_plan

TINY = ModelConfig.read(preset_path("tiny"))


@pytest.mark.parametrize(("format", "n_drafts"), [("fp8", 0), ("fp8", 1), ("fp32", 1)])
def test_the_order_is_that_in_which_a_model_asks(tmp_path, format, n_drafts):
    config = in_format(TINY, format)
    write_synthetic(config, tmp_path / "c", seed=0)
    checkpoint = Checkpoint(tmp_path / "c")
    asked = []

    def source(name: str) -> torch.Tensor:
        asked.append(name)
        return checkpoint.tensor(name)

    Transformer.read(source, config, Numerics.of(config, "fp32", "auto"), with_drafter=n_drafts > 0)
    plan = deploy_plan(load_topology("laptop", [f"serve.n_draft_tokens={n_drafts}"]), config)
    held = holdings(config, plan, plan.ranks[0])
    assert list(held) == asked
    for name, h in held.items():
        header = checkpoint.headers[name]
        assert (h.spec.dtype, h.spec.shape, h.part) == (header.dtype, header.shape, None)


@pytest.mark.parametrize("preset", ["flash", "pro"])
def test_one_rank_of_a_real_model_reads_all_but_the_drafter(preset):
    from v4_ascend.config.inventory import inventory

    config = ModelConfig.read(preset_path(preset))
    plan = deploy_plan(load_topology("laptop", []), TINY)
    whole = plan.ranks[0].model_copy(
        update={"layers": (0, config.n_layers), "experts": (0, config.n_routed_experts)}
    )
    held = holdings(config, plan.model_copy(update={"ranks": (whole,)}), whole)
    main = [t for t in inventory(config) if not t.name.startswith("mtp.")]
    assert sorted((t.name, t.dtype, t.shape) for t in main) == sorted(
        (h.spec.name, h.spec.dtype, h.spec.shape) for h in held.values()
    )


def test_caches_for_less_than_one_request_are_refused():
    with pytest.raises(ConfigError, match="1024 tokens for each of 1 DP groups; one request"):
        deploy_plan(load_topology("laptop", ["serve.cache_tokens=1024"]), TINY)
