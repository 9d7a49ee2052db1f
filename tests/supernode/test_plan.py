import json
import re
import stat

import pytest

from v4_ascend.config.model import ModelConfig
from v4_ascend.config.presets import preset_path
from v4_ascend.config.topology import load_topology
from v4_ascend.errors import ConfigError
from v4_ascend.supernode.plan import Plan
from v4_ascend.supernode.planning import deploy_plan

TINY = ModelConfig.read(preset_path("tiny"))


def laptop(*overrides):
    return deploy_plan(load_topology("laptop", overrides), TINY)


def test_one_rank_holds_every_layer_and_expert():
    (rank,) = laptop().ranks
    assert (rank.rank, rank.host) == (0, "localhost")
    assert rank.layers == (0, TINY.n_layers)
    assert rank.experts == (0, TINY.n_routed_experts)


def test_the_plan_carries_what_the_file_asks():
    plan = laptop("runtime.dtype=bf16", "runtime.quant_sim=on", "runtime.kernels=reference")
    assert (plan.name, plan.model_name, plan.checkpoint) == ("laptop", "v4-tiny", ".demo/tiny")
    assert (plan.max_model_len, plan.max_batch_size, plan.port) == (2048, 4, 8000)
    assert (plan.dtype, plan.quant_sim, plan.kernels) == ("bf16", "on", "reference")
    assert plan.parallel.world_size == 1


def test_a_chunk_is_never_longer_than_a_request():
    assert laptop("serve.max_model_len=64", "runtime.max_chunk=512").max_chunk == 64


SIXTEEN = "cluster.supernodes=[{name: a, hosts: [localhost], devices_per_host: 16}]"


def test_sixteen_devices_get_sixteen_ranks():
    plan = laptop(SIXTEEN, "layout={pp_size: 4, dp_size: 4, ep_size: 4}", "serve.concurrency=6")
    assert len(plan.ranks) == 16
    assert {r.layers for r in plan.ranks} == {(0, 2), (2, 3), (3, 5), (5, 6)} or all(
        sum(r.layers == x.layers for x in plan.ranks) == 4 for r in plan.ranks
    )
    assert plan.slots_per_group == 2


def test_tp_that_cuts_a_block_of_scales_is_refused():
    two = "cluster.supernodes=[{name: a, hosts: [localhost], devices_per_host: 2}]"
    with pytest.raises(ConfigError, match=r"--set layout: tp_size 2: .*wo_. *\.scale: 1 along"):
        laptop(two, "layout={tp_size: 2}")


def test_more_ranks_than_devices_are_refused():
    with pytest.raises(ConfigError, match="16 ranks, the pool has 1 devices"):
        laptop("layout={pp_size: 4, dp_size: 4, ep_size: 4}")


def test_a_layout_of_one_rank_is_the_automatic_one():
    assert laptop("layout={tp_size: 1}").digest == laptop().digest


@pytest.mark.parametrize(
    "override",
    ["serve.concurrency=5", "runtime.fallback=reference", "serve.api_keys=[k]", "name=other"],
)
def test_the_digest_covers_every_setting(override):
    assert laptop(override).digest != laptop().digest


def test_the_digest_survives_how_the_file_is_laid_out(tmp_path):
    file = tmp_path / "plan.json"
    laptop().write(file)
    # Another writer may order and indent the keys differently.
    backwards = dict(reversed(json.loads(file.read_text()).items()))
    file.write_text(json.dumps(backwards))
    assert Plan.read(file).digest == laptop().digest


def test_a_plan_replaces_the_one_before_and_only_its_owner_reads_it(tmp_path):
    file = tmp_path / "plan.json"
    file.write_text("an older plan")
    laptop("serve.api_keys=[secret]").write(file)
    assert Plan.read(file).api_keys == ("secret",)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [file]


def good(**changes):
    return json.dumps(laptop().model_dump(mode="json") | changes).encode()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read: No such file"),
        (b"\xff", "is not UTF-8 text"),
        (b"", "is not a plan"),
        (b"[]", "is not a plan"),
        (good()[:-1], "is not a plan"),
        (good(schema_version=2), "is not a plan: schema_version: Input should be 1"),
        (good(prot=1), "is not a plan: prot: Extra inputs"),
        (good(max_chunk="many"), "is not a plan: max_chunk"),
        (good(parallel={"dp_size": 3, "ep_size": 2}), r"is not a plan: parallel: .*ep_size \(2\)"),
    ],
    ids=["absent", "bytes", "empty", "list", "cut", "version", "unknown", "type", "arithmetic"],
)
def test_what_is_not_a_plan_is_refused_with_its_path(content, says, tmp_path):
    file = tmp_path / "plan.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^{re.escape(str(file))}: {says}"):
        Plan.read(file)
