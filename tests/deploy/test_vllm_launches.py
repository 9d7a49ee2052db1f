"""The commands of vLLM: both roles agree, traps are refused, other shapes than the published."""

import json
import shlex
import subprocess
import sys
from zipfile import ZipFile

import numpy as np
import pytest
import vllm_published as published
import yaml

from v4_ascend.cli.deploy_vllm import planned
from v4_ascend.config.topology import load_topology
from v4_ascend.deploy.vllm.arguments import arguments, parse
from v4_ascend.deploy.vllm.canary import agreement
from v4_ascend.deploy.vllm.deployment import require_startable
from v4_ascend.deploy.vllm.extract_arguments import extract
from v4_ascend.deploy.vllm.launches import PROXY, launches
from v4_ascend.deploy.vllm.show import script
from v4_ascend.deploy.vllm.work import Work, differences
from v4_ascend.errors import ConfigError, DeployError, NotYetError
from v4_ascend.supernode.planning import find_model, plan_pools

SPLIT = ["flash-a2-pd", "flash-a3-pd", "pro-950-pd", "pro-a2-pd", "pro-a3-pd"]
HOPPER = {
    "name": "boxes",
    "cluster": {
        "device": "nvidia-h200",
        "supernodes": [{"name": "s", "hosts": ["a", "b"], "devices_per_host": 8}],
    },
    "model": {"checkpoint": "hf:deepseek-ai/DeepSeek-V4-Pro@main", "name": "v4-pro"},
    "serve": {"max_model_len": 65536, "concurrency": 32, "api_keys": ["secret-of-mine"]},
    "layout": {"dp_size": 16, "ep_size": 16},
    "engine": "vllm",
    "launcher": "ssh",
}


def _launched(folder, topology):
    file = folder / "t.yaml"
    file.write_text(yaml.safe_dump(topology))
    return published.launched(file)


def _values(launch):
    return parse(launch.argv, arguments("0.23.0"))


@pytest.mark.parametrize("name", SPLIT)
def test_prefill_and_decode_agree_whatever_the_layout(tmp_path, name):
    launches = published.launched(published.topology_file(name, tmp_path))
    *engines, proxy = launches
    shape = published.LAYOUTS[name]["shape"]
    assert len(engines) == shape["dp"] + shape["decode_dp"]
    values = [_values(x) for x in engines]
    for key in ("block-size", "max-model-len", "served-model-name", "no-disable-hybrid"):
        assert len({v.get(key) for v in values}) == 1
    transfers = {x.role: v["kv-transfer-config"] for x, v in zip(engines, values, strict=True)}
    producer, consumer = transfers["prefill"], transfers["decode"]
    assert (producer["kv_role"], consumer["kv_role"]) == ("kv_producer", "kv_consumer")
    assert producer["engine_id"] != consumer["engine_id"]
    assert producer["kv_connector_extra_config"] == consumer["kv_connector_extra_config"]
    for launch, v in zip(engines, values, strict=True):
        sizes = producer["kv_connector_extra_config"][launch.role]
        assert sizes == {"dp_size": v["data-parallel-size"], "tp_size": v["tensor-parallel-size"]}
    places = {(x.host, x.url) for x in engines}
    assert len(places) == len(engines)  # no port twice on a host
    assert proxy.order > max(x.order for x in engines)
    assert proxy.argv[1] == PROXY
    assert proxy.argv.count(engines[0].host) == sum(x.host == engines[0].host for x in engines)


@pytest.mark.parametrize("name", SPLIT)
def test_the_recompute_scheduler_is_of_decode_alone(tmp_path, name):
    *engines, _ = published.launched(published.topology_file(name, tmp_path))
    for launch in engines:
        has = "recompute_scheduler_enable" in _values(launch).get("additional-config", {})
        assert has == (launch.role == "decode")


@pytest.mark.parametrize("name", sorted(set(published.LAYOUTS) - {"flash-a2-dspark"}))
def test_only_int8_weights_are_called_quantised_and_dp_ranks_are_all_there(tmp_path, name):
    launches = published.launched(published.topology_file(name, tmp_path))
    engines = [x for x in launches if x.role != "proxy"]
    for launch in engines:
        assert ("quantization" in _values(launch)) == ("950" not in name)
        assert "PIECEWISE" not in " ".join(launch.argv)
    for role in {x.role for x in engines}:
        of_role = [_values(x) for x in engines if x.role == role]
        ranks = [
            rank
            for v in of_role
            for first in [v.get("data-parallel-rank", v.get("data-parallel-start-rank", 0))]
            for rank in range(first, first + _n_local(v))
        ]
        assert ranks == list(range(of_role[0]["data-parallel-size"]))


def _n_local(v):
    if "data-parallel-rank" in v:
        return 1
    return v.get("data-parallel-size-local", v["data-parallel-size"])


def test_nvidia_hosts_get_no_word_of_ascend(tmp_path):
    first, second = _launched(tmp_path, HOPPER)
    assert first.argv[2] == "deepseek-ai/DeepSeek-V4-Pro"
    assert _values(first)["revision"] == "main"
    assert (first.url, second.url) == ("http://127.0.0.1:8000", None)
    assert _values(second)["headless"] is True
    assert first.env["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7"
    text = script((first, second))
    assert "ASCEND" not in text
    assert "HCCL" not in text
    assert "additional-config" not in text
    assert _values(first)["kv-cache-dtype"] == "fp8"
    assert _values(first)["block-size"] == 256


def test_no_key_is_in_what_is_printed(tmp_path):
    assert "secret-of-mine" not in script(_launched(tmp_path, HOPPER))


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        ({"pp_size": 2, "dp_size": 8, "ep_size": 8}, "pp_size above 1: not yet"),
        ({"cp_size": 2, "dp_size": 8, "ep_size": 16}, "no legal layout"),
        ({"dp_size": 16, "ep_size": 8}, "no legal layout"),
    ],
)
def test_other_layouts_are_refused_by_name(tmp_path, layout, says):
    file = tmp_path / "t.yaml"
    file.write_text(yaml.safe_dump(HOPPER | {"layout": layout}))
    with pytest.raises((NotYetError, ValueError), match=says):
        published.launched(file)


def test_prefill_and_decode_apart_are_refused_on_nvidia(tmp_path):
    cluster = HOPPER["cluster"] | {
        "supernodes": [
            {"name": n, "hosts": [n], "devices_per_host": 8} for n in ("first", "second")
        ],
        "pools": [
            {"role": role, "supernodes": [n], "layout": {"dp_size": 8, "ep_size": 8}}
            for role, n in (("prefill", "first"), ("decode", "second"))
        ],
    }
    with pytest.raises(NotYetError, match="A2, A3 and 950 are"):
        _launched(tmp_path, HOPPER | {"cluster": cluster})


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--max-model-length", "5"], "no such flag.*max-model-len"),
        (["--max-num-seqs", "many"], "must be of type int"),
        (["--max-num-seqs"], "needs a value"),
        (["--tokenizer-mode", "deepseek_v4", "--tool-call-parser", "deepseek_v5"], "one of"),
        (["--no-max-num-seqs"], "no such flag"),
        (["--kv-transfer-config", '{"kv_connector": "Mooncake"}'], "does not know 'Mooncake'"),
        (["--speculative-config", '{"method": "mpt"}'], "does not know 'mpt'"),
        (
            [
                "--compilation-config",
                '{"cudagraph_mode": "PIECEWISE"}',
                "--additional-config",
                "{}",
            ],
            "not for V4 on Ascend",
        ),
        (["--additional-config", "{"], "must be of type json"),
    ],
)
def test_a_wrong_command_is_refused_before_it_costs_minutes(words, says):
    with pytest.raises(DeployError, match=says):
        parse(["vllm", "serve", "m", *words], arguments("0.23.0"))


def test_arguments_of_an_unknown_release_are_refused():
    with pytest.raises(ConfigError, match="no arguments of 0.9 here; there are 0.23.0"):
        arguments("0.9")


def test_arguments_are_read_from_the_text_of_a_wheel(tmp_path):
    wheel = tmp_path / "vllm-1.whl"
    files = {
        "vllm/config/a.py": "from typing import Literal\nMode = Literal['x', 'y']\n"
        "class A:\n    mode: Mode | None = 'x'\n    n: int = Field(default=3)\n"
        "    on: bool = False\n"
        "    more: dict[str, int] = {}\n    free: Mode | str = 'x'\n"
        "SpeculativeMethod = Literal['mtp']\nclass CUDAGraphMode:\n    NONE = 0\n",
        "vllm/engine/arg_utils.py": "k = get_kwargs(A)\n"
        "g.add_argument('--mode', '-m', **k['mode'])\n"
        "g.add_argument('--n', **{**k['n'], 'default': None})\ng.add_argument('--on', **k['on'])\n"
        "g.add_argument('--more', **k['more'])\ng.add_argument('--free', **k['free'])\n",
        "vllm/entrypoints/openai/cli_args.py": "p.add_argument('--headless', action='store_true')\n"
        "class BaseFrontendArgs:\n    tool_call_parser: str | None = None\n"
        "    reasoning_parser: str = ''\n"
        "class FrontendArgs(BaseFrontendArgs):\n    port: int = 8000\n",
        "vllm/envs.py": "v = {'VLLM_A': 1}\n",
        "vllm_ascend/envs.py": "v = {'VLLM_B': 1}\n",
        "vllm_ascend/b.py": "additional_config.get('c', 1)\nadditional_config['d']\n",
        "vllm/distributed/kv_transfer/kv_connector/factory.py": "F.register_connector('N', 'm')\n",
        "vllm_ascend/distributed/kv_transfer/__init__.py": "",
        "vllm/tool_parsers/__init__.py": "t = {'v4': 1}\n",
        "vllm/reasoning/__init__.py": "t = {'v4': 1}\n",
    }
    with ZipFile(wheel, "w") as z:
        for name, text in files.items():
            z.writestr(name, text)
    found = extract([wheel])
    flags = {k: {x: y for x, y in v.items() if x != "source"} for k, v in found["flags"].items()}
    assert flags == {
        "mode": {"type": "str", "choices": ["x", "y"], "default": "x", "aliases": ["-m"]},
        "n": {"type": "int", "default": 3},
        "on": {"type": "bool", "default": False},
        "more": {"type": "json"},
        "free": {"type": "str", "default": "x"},
        "headless": {"type": "switch"},
        "tool-call-parser": {"type": "str", "choices": ["v4"]},
        "reasoning-parser": {"type": "str", "default": "", "choices": ["v4"]},
        "port": {"type": "int", "default": 8000},
    }
    assert found["environment"] == ["VLLM_A", "VLLM_B"]
    assert found["additional_config"] == ["c", "d"]
    assert found["kv_connectors"] == ["N"]


def test_what_is_printed_is_what_a_shell_would_run(tmp_path):
    launches = published.launched(published.topology_file("pro-950-mixed", tmp_path))
    text = script(launches[:1])
    recorder = "vllm() { printf '%s\\n' \"$@\"; env; }\n"
    out = subprocess.run(
        ["sh", "-c", recorder + text], capture_output=True, text=True, check=True,
        env={"PATH": "/usr/bin:/bin", "V4_ASCEND_ADDRESS": "10.0.0.1", "V4_ASCEND_NIC": "eth0"},
    ).stdout  # fmt: skip
    lines = out.splitlines()
    assert lines[: len(launches[0].argv) - 1] == list(launches[0].argv[1:])
    assert "HCCL_IF_IP=10.0.0.1" in lines
    assert "GLOO_SOCKET_IFNAME=eth0" in lines
    unset = subprocess.run(["sh", "-c", text], capture_output=True, text=True, check=False)
    assert "V4_ASCEND_ADDRESS" in unset.stderr


def test_what_a_topology_says_is_quoted_for_a_shell(tmp_path):
    path = "/models/a'; touch sprung; $(touch sprung) `touch sprung`"
    said = HOPPER | {"model": {"checkpoint": path, "name": "v4-pro"}}
    hosts = ["$(touch${IFS}sprung)", ";touch${IFS}sprung"]
    said["cluster"] = said["cluster"] | {
        "supernodes": [{"name": "s", "hosts": hosts, "devices_per_host": 8}]
    }
    text = script(_launched(tmp_path, said))
    assert hosts[0] in text
    done = subprocess.run(
        ["sh", "-c", "vllm() { printf '%s\\n' \"$@\"; }\n" + text],
        capture_output=True, text=True, check=True, cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "V4_ASCEND_ADDRESS": "10.0.0.1", "V4_ASCEND_NIC": "eth0"},
    )  # fmt: skip
    assert path in done.stdout
    assert not (tmp_path / "sprung").exists()


def test_dry_run_prints_the_same_for_scripts(tmp_path):
    file = published.topology_file("pro-950-pd", tmp_path)
    command = [sys.executable, "-m", "v4_ascend", "deploy", "--topology", file, "--dry-run"]
    shown = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout
    data = json.loads(shown)["data"]
    assert [x["role"] for x in data["launches"]] == ["prefill"] * 32 + ["decode"] * 32 + ["proxy"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shlex.split(text, comments=True).count("vllm") == 64


def test_agreement_is_what_hand_arithmetic_says():
    # Two positions: sure of token 0 (by 2 nats), and of token 1 (by 3).
    logits = np.log([[0.8, 0.1, 0.1], [0.04, 0.92, 0.04], [1, 1, 1]])
    right = [None, {"0": {"logprob": np.log(0.8)}}, {"1": {"logprob": np.log(0.92)}}]
    same = agreement(logits, right)
    assert (same.n_sure, same.agree) == (2, 1.0)
    assert same.median_error == pytest.approx(0, abs=1e-12)
    wrong = [None, {"0": {"logprob": np.log(0.4)}}, {"2": {"logprob": np.log(0.08)}}]
    half = agreement(logits, wrong)
    assert (half.n_sure, half.agree) == (2, 0.5)
    assert half.median_error == pytest.approx(np.log(2))


def test_the_proxy_has_a_port_of_its_own():
    asked = ["engine=vllm", "serve.host=0.0.0.0"]
    topology = load_topology("pro-prefill-decode", asked)
    pools = plan_pools(topology, find_model(topology))
    with pytest.raises(ConfigError, match="8000 is that of a process on prompts-host0"):
        launches(topology, pools)
    topology = load_topology("pro-prefill-decode", [*asked, "serve.port=9000"])
    assert launches(topology, pools)[-1].url == "http://127.0.0.1:9000"


def work(*changes):
    topology = load_topology("pro-prefill-decode", ["engine=vllm", "serve.port=9000", *changes])
    return Work.of(topology, *reversed(planned(topology)))


def test_what_differs_is_said_once_for_all_processes_that_have_it_in_common(tmp_path):
    before = work()
    assert differences(before, work()) == []
    assert before.digest == work().digest
    after = work("serve.max_model_len=65536", "serve.api_keys=[of-mine]", "serve.port=9001")
    found = {d.what: d for d in differences(before, after)}
    length, n = found["--max-model-len"], len(before.launches) - 1
    assert (length.running, length.wanted, length.n_processes) == ("131072", "65536", n)
    assert found["serve.api_keys"].wanted == "(hidden)"
    names = {x.launches[-1].name for x in (before, after)}
    assert {d.what for d in found.values() if "proxy" in d.what} == names
    assert before.digest != after.digest
    assert "of-mine" not in str(found)
    after.write(tmp_path)
    assert Work.read(tmp_path) == after
    assert (tmp_path / "launches.json").stat().st_mode & 0o077 == 0
    (tmp_path / "launches.json").write_text("{}")
    with pytest.raises(DeployError, match="says not what runs"):
        Work.read(tmp_path)


def test_a_reference_that_nobody_would_compare_is_refused(monkeypatch):
    asked = ["engine=vllm", "model.reference=record.safetensors"]
    topology = load_topology("pro-prefill-decode", asked)
    found, _ = planned(topology)
    monkeypatch.setattr("shutil.which", lambda name: name)
    with pytest.raises(NotYetError, match="model.reference: not yet with prefill and decode apart"):
        require_startable(topology, found)
