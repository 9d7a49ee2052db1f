import re
import textwrap
from importlib.resources import files

import pytest

from v4_ascend.config.model import ModelConfig
from v4_ascend.config.presets import preset_path
from v4_ascend.config.topology import load_topology, require_supported, topology_schema
from v4_ascend.errors import ConfigError, NotYetError
from v4_ascend.supernode.plan import Plan
from v4_ascend.supernode.planning import deploy_plan

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
FIGURE = "{value: 1, label: assumed, source: test}"
INLINE = (
    "{name: x, kind: cpu, family: cpu, devices_per_host: 1, weight_formats: [native], "
    "records: {kv: plain, index: plain, source: s}, "
    f"memory_bytes: &m {FIGURE}, memory_bytes_per_s: *m}}"
)


@pytest.fixture
def read(tmp_path):
    def read(text, *overrides):
        path = tmp_path / "t.yaml"
        path.write_text(textwrap.dedent(text))
        return load_topology(str(path), overrides)

    return read


@pytest.mark.parametrize("name", ["laptop", "supernode"])
def test_bundled_files_are_found_by_name_with_or_without_suffix(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_topology(name).name == name
    assert load_topology(f"{name}.yaml").name == name


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
        (GOOD + "Model: {}\n", [], "t.yaml:8: unknown key Model; did you mean 'model'"),
        (
            GOOD.replace("hosts:", "hosst:"),
            [],
            r"t.yaml:4: unknown key cluster.supernodes\[0\].hosst; did you mean 'hosts'",
        ),
        (GOOD + "<<: {}\n", [], "t.yaml:8: unknown key <<; known are cluster, "),
        (GOOD + "  port: 99999\n", [], "t.yaml:8: serve.port must .* 65535, got 99999"),
        (GOOD + "  port: x\n", [], "t.yaml:8: serve.port must be an integer, got 'x'"),
        (GOOD + "  port:\n", [], "t.yaml:8: serve.port must be an integer, got nothing"),
        (GOOD + "  port: [1]\n", [], "t.yaml:8: serve.port must be an integer, got a list"),
        (GOOD + "  slo: {ttft_ms: inf}\n", [], "t.yaml:8: serve.slo.ttft_ms must be a finite"),
        (GOOD + "  max_model_len: 8\n", [], "t.yaml:8: serve.max_model_len is given twice"),
        (GOOD.replace(", name: m", ""), [], "t.yaml:5: missing key model.name"),
        (GOOD.replace("name: box\n", "name: Box\n"), [], "t.yaml:1: name must match .*got 'Box'"),
        (
            GOOD.replace("hosts: [localhost]", "hosts: []"),
            [],
            r"t.yaml:4: cluster.supernodes\[0\].hosts must have at least 1 item",
        ),
        (
            GOOD.replace("hosts: [localhost]", "devices_per_host: 1"),
            [],
            r"t.yaml:4: cluster.supernodes\[0\]: give either hosts or host_count",
        ),
        (GOOD + "layout: {tp_size: 3, ep_size: 2}\n", [], r"t.yaml:8: .*ep_size \(2\) must divide"),
        (GOOD + "layout: autto\n", [], "t.yaml:8: layout must be 'auto' or a mapping, got 'autto'"),
        (
            GOOD + "engine: sglang\n",
            [],
            "t.yaml:8: engine must be 'native' or 'vllm', got 'sglang'",
        ),
        (GOOD + "emulate: on\n", [], "t.yaml:8: emulate must be true or false, got 'on'"),
        (GOOD + "? [a]\n: b\n", [], "t.yaml:8: a key must be a word"),
        (GOOD + "name: &x [*x]\n", [], "t.yaml:8: name is given twice"),
        (GOOD.replace("box", "&x [*x]"), [], "t.yaml:1: name must be a string, got a list"),
        (
            GOOD.replace("device: cpu", "device: cpuu"),
            [],
            "t.yaml:3: no device profile 'cpuu'; did",
        ),
        (
            GOOD.replace("device: cpu", "device: cpu\n  fabric: {board: 8, cabinet: 12}"),
            [],
            r"t.yaml:2: cluster: fabric: cabinet \(12\) must be a multiple of board \(8\)",
        ),
        (
            GOOD.replace("device: cpu", "device: cpu\n  pools: [{role: decode, supernodes: [b]}]"),
            [],
            "t.yaml:2: cluster: no supernode 'b'; known are a",
        ),
        (
            GOOD.replace("[{name: a", "[{name: a, host_count: 1}, {name: a"),
            [],
            "'a' is named twice",
        ),
        (GOOD, ["serve.port"], "--set serve.port: must be key=value"),
        (GOOD, ["serve..port=1"], "--set serve..port=1: must be key=value"),
        (GOOD, ["serve.port="], "--set serve.port: must be key=value"),
        (GOOD, ["serve.port=x"], "--set serve.port: serve.port must be an integer"),
        (GOOD, ["serve.prot=1"], "--set serve.prot: unknown key serve.prot; did you mean 'port'"),
        (GOOD, ["serve.slo=["], "--set serve.slo: is not YAML"),
        (GOOD, ["serve={max_model_len: 8, prt: 1}"], "--set serve: unknown key serve.prt"),
        (GOOD, ["cluster.supernodes.0.name=b"], "'0' is in a list; set the whole list"),
        ("- a\n", [], "t.yaml:1: must be a mapping"),
        ("", [], "t.yaml:1: must be a mapping"),
        ("model: [m\n", [], "t.yaml:2: is not YAML: expected"),
        ("a: \x01\n", [], "t.yaml: is not YAML: unacceptable character"),
    ],
)
def test_errors_say_where_and_what(read, text, overrides, says):
    with pytest.raises(ConfigError, match=says):
        read(text, *overrides)


def test_an_override_leaves_what_an_alias_shares_alone(read):
    text = GOOD.replace("device: cpu", f"device: {INLINE}")
    t = read(text, "cluster.device.memory_bytes.value=2")
    assert t.cluster.device.memory_bytes.value == 2
    assert t.cluster.device.memory_bytes_per_s.value == 1


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("emulate=true", "emulate: not yet"),
        ("cluster.supernodes=[{name: a, host_count: 2}]", "cluster.supernodes: not yet"),
    ],
)
def test_what_is_not_built_yet_is_refused_by_name(read, override, says):
    with pytest.raises(NotYetError, match=says):
        require_supported(read(GOOD, override))


def test_two_pools_are_not_deployed_yet(read):
    two = "cluster.supernodes=[{name: a, host_count: 1}, {name: b, host_count: 1}]"
    pools = "cluster.pools=[{role: decode, supernodes: [a]}, {role: prefill, supernodes: [b]}]"
    with pytest.raises(NotYetError, match="cluster.pools: not yet"):
        require_supported(read(GOOD, two, pools))


@pytest.mark.parametrize(
    ("pools", "says"),
    [
        ("[{role: decode, supernodes: [a]}]", "one for prefill and one for decode"),
        ("[{role: decode, supernodes: [a]}, {role: prefill, supernodes: [a]}]", "'a' is in two"),
    ],
)
def test_pools_that_cannot_serve_are_refused(read, pools, says):
    with pytest.raises(ConfigError, match=says):
        read(GOOD, f"cluster.pools={pools}")


def test_a_key_of_the_file_that_is_not_built_yet_is_refused_at_its_line(read):
    with pytest.raises(NotYetError, match=r"t\.yaml:8: emulate: not yet; deploy does that with"):
        require_supported(read(GOOD + "emulate: true\n"))


def test_the_shipped_schema_is_the_current_one():
    shipped = files("v4_ascend.configs") / "topology.schema.json"
    assert shipped.read_text() == topology_schema(), "write topology_schema() to that file"


@pytest.mark.parametrize("reference", ["nowhere.yaml", "labtop", "elsewhere/laptop.yaml"])
def test_what_is_neither_a_file_nor_bundled_is_refused_with_what_is(reference):
    with pytest.raises(ConfigError, match=f"no file {reference!r}; bundled: .*laptop, .*supernode"):
        load_topology(reference)


def test_a_plan_is_read_back_with_its_digest(read, tmp_path):
    plan = deploy_plan(read(GOOD), TINY)
    plan.write(tmp_path / "plan.json")
    again = Plan.read(tmp_path / "plan.json")
    assert again == plan
    assert again.digest == plan.digest
    assert deploy_plan(read(GOOD, "serve.port=9"), TINY).digest != plan.digest
    assert [p.name for p in tmp_path.iterdir() if "plan" in p.name] == ["plan.json"]


def test_a_plan_longer_than_the_model_is_refused(read):
    with pytest.raises(ConfigError, match=r"\(2000000\) exceeds .* \(1048576\)"):
        deploy_plan(read(GOOD, "serve.max_model_len=2000000"), TINY)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "node-1", "fe80::1"])
def test_beyond_loopback_a_key_is_required_unless_told_otherwise(read, host):
    text = GOOD + f"  host: '{host}'\n"
    with pytest.raises(ConfigError, match="beyond loopback and there is no API key") as error:
        require_supported(read(text))
    assert re.match(r".*t\.yaml:8: serve\.host: ", str(error.value))
    require_supported(read(text + "  api_keys: [k]\n"))
    require_supported(read(text + "  require_key: false\n"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_on_loopback_none_is(read, host):
    require_supported(read(GOOD + f"  host: '{host}'\n"))


@pytest.mark.parametrize("key", ["", " ", "two words", "line\\nbreak", "Schlüssel"])
def test_a_key_that_no_header_can_carry_is_refused(read, key):
    """An empty one above all: a request without a key would have it."""
    with pytest.raises(ConfigError, match="api_keys"):
        read(GOOD + f'  api_keys: ["{key}"]\n')


@pytest.mark.parametrize(
    "host", ["", "../../x", "a/b", "/etc/x", "a b", "a\\nreboot", "-oProxyCommand=x", "\\e[2J"]
)
def test_a_host_is_no_path_no_option_and_one_word(read, host):
    for text in (GOOD.replace("localhost", f'"{host}"'), GOOD + f'  host: "{host}"\n'):
        with pytest.raises(ConfigError, match="host"):
            read(text)


@pytest.mark.parametrize("host", ["node-1.rack_2", "10.0.0.1", "::", "fe80::1%eth0", "me@node-1"])
def test_names_and_addresses_are_hosts(read, host):
    assert read(GOOD.replace("localhost", f'"{host}"')).cluster.supernodes[0].hosts == (host,)
