import textwrap

import pytest

from v4_ascend.config.model import ModelConfig
from v4_ascend.config.presets import preset_path
from v4_ascend.config.topology import Topology, load_topology, require_supported
from v4_ascend.errors import ConfigError, NotYetError
from v4_ascend.supernode.plan import Plan, trivial_plan

TINY = ModelConfig.read(preset_path("tiny"))
GOOD = """\
name: box
cluster:
  device: cpu
  supernodes: [{name: a, hosts: [localhost]}]
model: {checkpoint: c, name: m}
serve:
  max_model_len: 64
"""


@pytest.fixture
def read(tmp_path):
    def read(text, *overrides):
        path = tmp_path / "t.yaml"
        path.write_text(textwrap.dedent(text))
        return load_topology(str(path), overrides)

    return read


@pytest.mark.parametrize("name", ["laptop", "supernode"])
def test_bundled_files_are_found_by_name(name):
    assert load_topology(name).name == name


def test_the_design_file_is_64_devices():
    assert load_topology("supernode").cluster.n_devices == 64


def test_the_fields_type_decides_not_yaml(read):
    t = read(GOOD.replace("name: m", "name: on") + "  slo: {ttft_ms: 1e3}\n")
    assert t.model.name == "on"
    assert t.serve.slo.ttft_ms == 1000.0


def test_overrides_win(read):
    t = read(GOOD, "serve.port=81", "runtime.dtype=fp32", "layout={dp_size: 2, ep_size: 2}")
    assert (t.serve.port, t.runtime.dtype, t.layout.world_size) == (81, "fp32", 2)


@pytest.mark.parametrize(
    ("text", "overrides", "says"),
    [
        (GOOD + "  prot: 1\n", [], r"t.yaml:8: unknown key serve.prot; did you mean 'port'\?"),
        (GOOD + "servce: {}\n", [], r"t.yaml:8: unknown key servce; did you mean 'serve'\?"),
        (GOOD + "  port: 99999\n", [], "t.yaml:8: serve.port: .*65535, got '99999'"),
        (GOOD + "  port: x\n", [], "t.yaml:8: serve.port: .*integer"),
        (GOOD + "  max_model_len: 8\n", [], "t.yaml:8: serve.max_model_len is given twice"),
        (
            GOOD.replace("name: m", "x: m"),
            [],
            "t.yaml:5: unknown key model.x|missing key model.name",
        ),
        (GOOD.replace("name: box\n", "name: Box\n"), [], "t.yaml:1: name: .*pattern"),
        (GOOD.replace("hosts: [localhost]", "n: 1"), [], "t.yaml:4: "),
        (GOOD + "layout: {tp_size: 3, ep_size: 2}\n", [], r"t.yaml:8: .*ep_size \(2\) must divide"),
        (GOOD + "engine: sglang\n", [], "t.yaml:8: engine: .*'native' or 'vllm'"),
        (GOOD, ["serve.port"], "--set serve.port: must be key=value"),
        (GOOD, ["serve.port=x"], "--set serve.port: serve.port: .*integer"),
        (GOOD, ["serve.prot=1"], "--set serve.prot: unknown key serve.prot; did you mean 'port'"),
        ("- a\n", [], "t.yaml:1: must be a mapping"),
        ("model: [m\n", [], "t.yaml:2: expected"),
    ],
)
def test_errors_say_where_and_what(read, text, overrides, says):
    with pytest.raises(ConfigError, match=says):
        read(text, *overrides)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("engine=vllm", "engine: not yet"),
        ("launcher=ssh", "launcher: not yet"),
        ("emulate=true", "emulate: not yet"),
        ("serve.n_draft_tokens=1", "serve.n_draft_tokens: not yet"),
        ("layout={dp_size: 2}", "layout: not yet"),
        ("cluster.device=nvidia-h200", "cluster.device: not yet"),
        ("cluster.supernodes=[{name: a, host_count: 2}]", "cluster.supernodes: not yet"),
        ("cluster.pools=[{role: decode, supernodes: [a]}]", "cluster.pools: not yet"),
        ("model.reference=r.safetensors", "model.reference: not yet"),
        ("runtime.backend=ascend", "runtime.backend: not yet"),
    ],
)
def test_what_is_not_built_yet_is_refused_by_name(read, override, says):
    topology = read(GOOD, override)
    with pytest.raises(NotYetError, match=says):
        require_supported(topology, "t.yaml")


def test_a_missing_file_and_an_unknown_name_say_so():
    with pytest.raises(ConfigError, match="no such file"):
        load_topology("nowhere.yaml")
    with pytest.raises(ConfigError, match="bundled: laptop, supernode"):
        load_topology("labtop")


def test_a_plan_is_read_back_with_its_digest(read, tmp_path):
    plan = trivial_plan(read(GOOD), TINY)
    plan.write(tmp_path / "plan.json")
    again = Plan.read(tmp_path / "plan.json")
    assert again == plan
    assert again.digest == plan.digest
    assert trivial_plan(read(GOOD, "serve.port=9"), TINY).digest != plan.digest
    assert [p.name for p in tmp_path.iterdir() if "plan" in p.name] == ["plan.json"]


def test_a_plan_longer_than_the_model_is_refused(read):
    with pytest.raises(ConfigError, match=r"2000000 exceeds .* \(1048576\)"):
        trivial_plan(read(GOOD, "serve.max_model_len=2000000"), TINY)


def test_every_key_of_the_schema_can_be_written_in_a_file():
    schema = Topology.model_json_schema()
    assert set(schema["properties"]) >= {"cluster", "model", "serve", "layout", "runtime"}
