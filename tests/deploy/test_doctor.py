"""doctor: parsers on recorded outputs, hosts that are well, broken set-ups, and the command."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import recorded_hosts as recorded
from broken_setups import BROKEN, answers_of
from typer.testing import CliRunner

from v4_ascend.cli.app import app
from v4_ascend.deploy.doctor import outputs, preflight
from v4_ascend.deploy.doctor.checkpoint import look_at
from v4_ascend.deploy.doctor.facts import Answer, Facts, Question
from v4_ascend.deploy.doctor.finding import Expected
from v4_ascend.deploy.doctor.gathering import Machine, gather, ping
from v4_ascend.deploy.doctor.matrix import matrix
from v4_ascend.deploy.doctor.operators import read_probe, run_probe
from v4_ascend.deploy.doctor.pings import with_pings
from v4_ascend.errors import DeployError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "family", "n", "used"),
    [
        ("a2_npu_smi_info.txt", "a2", 8, (3431, 3427)),
        ("a3_npu_smi_info.txt", "a3", 16, (3122, 2879)),
        ("950_npu_smi_info.txt", "950", 1, (5239, 5239)),
    ],
)
def test_npu_smi_of_each_generation(name, family, n, used):
    rows = outputs.npus(recorded.text(name))
    assert len(rows) == n
    assert {r.family for r in rows} == {family}
    assert {r.health for r in rows} == {"OK"}
    assert (rows[0].used_mb, rows[-1].used_mb) == used
    assert len({(r.npu, r.chip) for r in rows}) == n
    assert not any(r.processes for r in rows)


def test_npu_smi_says_whose_process_it_is():
    first, second = outputs.npus(recorded.text("a2_npu_smi_process.txt"))
    assert (first.processes, second.processes) == (("472206 python3.9",), ())


@pytest.mark.parametrize("name", ["hccn_tls.txt", "950_hccn_tls.txt"])
def test_tls_switches(name):
    text = recorded.text(name)
    assert outputs.tls_switch(text) == "0"
    assert outputs.tls_switch(text.replace("switch[0]", "switch[1]")) == "1"
    assert outputs.tls_switch("") is None


def test_install_files():
    toolkit = outputs.pairs(recorded.text("a2_toolkit_install.info"))
    assert (toolkit["version"], toolkit["arch"]) == ("8.5.0", "aarch64")
    assert outputs.version("25.7.rc1.6") == (25, 7)
    assert outputs.version("2.10.0.post4") == (2, 10, 0)


def test_gpus_with_and_without_ecc():
    rows = outputs.gpus("0, NVIDIA H200, 570.86.15, 143771, 4, 0\n1, X, 1, 10, 5, [N/A]\n")
    assert [(g.total_mb, g.used_mb, g.ecc_errors) for g in rows] == [(143771, 4, 0), (10, 5, None)]


def test_ports_of_a_950():
    assert outputs.ub_ports(recorded.UB_PORTS) == {"0/4": "UP", "0/5": "UP"}


def test_places_in_a_supernode():
    a3 = outputs.place(recorded.A3_PLACE.format(sdid=7, server=40))
    assert (a3.sdid, a3.pod, a3.server) == ("7", "0", "40")
    a950 = outputs.place(recorded.PLACE_950.format(server=2))
    assert (a950.sdid, a950.pod, a950.server) == (None, "3", "2")
    unset = recorded.A3_PLACE.replace(
        "ID                   : 0", "ID                   : 4294967295"
    )
    for text in ("", "The device does not support querying spod-info.\n", unset):
        assert outputs.place(text) is None


def test_nvlinks_count_by_their_speed():
    text = (
        "GPU 0: NVIDIA H100 PCIe (UUID: GPU-6968)\n\t Link 0: 26.562 GB/s\n\t Link 1: <inactive>\n"
        "GPU 1: NVIDIA H100 PCIe (UUID: GPU-6969)\n\t Link 0: 0 GB/s\n\t Link 1: what is this\n"
    )
    assert outputs.nvlinks(text) == {0: (1, 2), 1: (0, 2)}
    assert outputs.nvlinks("NVML: Unable to retrieve NVLink information\n") == {}


def test_devices_ask_those_of_the_next_host_by_their_addresses():
    first = Answer("host-a", recorded.a2())
    second = Answer("host-b", recorded.second(recorded.a2()))
    asked = []

    def ask(questions):
        asked.extend(questions)
        return [Answer(q.host, recorded.pinged(recorded.cpu(), "192.168.2", 8)) for q in questions]

    found = with_pings([first, second], ask)
    assert [q.commands[0] for q in asked] == [ping(0, "192.168.2.1"), ping(0, "192.168.1.1")]
    assert all(len(q.commands) == 8 for q in asked)
    assert set(asked[0].commands) <= set(found[0].facts.commands)
    assert found[1].facts.commands == second.facts.commands  # nothing that was not asked is taken
    well = preflight.judge(found[:1], {"host-a": recorded.expected("a2", 2)})
    assert "8 NPU ports reach another host's" in [f.what for f in well]
    assert with_pings([first], None) == [first]
    without = Answer("host-b", problem="down")
    assert with_pings([first, without], None) == [first, without]


def test_of_what_is_asked_nothing_but_pings_is_run():
    ran = []

    class Recorded(Machine):
        def run(self, command):
            ran.append(command)

    commands = (ping(0, "10.0.0.1"), "rm -rf /", "hccn_tool -i 0 -ping -g address 10.0.0.1 pkt 9")
    gather(Question("here", kind="cpu", commands=commands), Recorded(time.monotonic() + 5))
    assert ran == [ping(0, "10.0.0.1")]


@pytest.mark.parametrize("n_hosts", [1, 2])
@pytest.mark.parametrize("base", recorded.MAKE)
def test_hosts_that_are_well_have_nothing_to_mend(base, n_hosts):
    facts = recorded.MAKE[base]()
    answers = [Answer("host-a", facts), Answer("host-b", recorded.second(facts))][:n_hosts]
    found = preflight.judge(answers, {a.host: recorded.expected(base, n_hosts) for a in answers})
    assert [f for f in found if f.level not in ("ok", "not-applicable")] == []


@pytest.mark.parametrize("broken", BROKEN, ids=lambda b: b.id)
def test_a_broken_set_up_ends_the_command_with_4_and_its_cause(broken, tmp_path, monkeypatch):
    """Two hosts are asked over an ssh that has their recorded answers; one host is this one."""
    answers = answers_of(broken)
    _answering_ssh(tmp_path, answers)
    monkeypatch.setattr(preflight, "ask_here", lambda question: answers[0])
    monkeypatch.setattr(preflight, "require_first_here", _from_elsewhere)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    start = time.monotonic()
    result = CliRunner().invoke(
        app, ["doctor", "--topology", _topology(broken, tmp_path), "--json"]
    )
    assert time.monotonic() - start < 30
    assert result.exit_code == 4, result.output
    found = json.loads(result.stdout)["data"]["findings"]
    blockers = [f for f in found if f["level"] == "blocker"]
    named = [f for f in blockers if f["check"] == broken.check and broken.says in f["what"]]
    assert named, blockers
    assert all(f["next_step"] or f["check"] == "network.ports" for f in blockers)


def _from_elsewhere(hosts):
    if len(hosts) > 1:
        raise DeployError("host-a is another machine")


def _answering_ssh(folder, answers):
    """Write an ssh that prints what a host answers, with the clock of that moment."""
    cases = []
    for a in answers:
        if a.facts is None:
            cases.append(f"{a.host}) echo '{a.problem}' >&2; exit 255;;")
            continue
        (folder / a.host).write_bytes(msgspec.json.encode(a.facts))
        now = f'$(date -d "{a.skew_s} seconds" +%s.%N)'
        said = f'sed "s/\\"clock\\":[-+.e0-9]*/\\"clock\\":{now}/" {folder}/{a.host}'
        cases.append(f"{a.host}) {said};;")
    script = "\n".join(
        ["#!/bin/sh", "for w; do host=$last; last=$w; done", "case $host in", *cases, "esac", ""]
    )
    (folder / "ssh").write_text(script)
    (folder / "ssh").chmod(0o755)


def _topology(broken, folder):
    """Write the topology of its hosts; return the file."""
    device = {"a2": "ascend-a2-64", "a3": "ascend-a3-64", "950": "ascend-950dt-96",
              "gpu": "nvidia-h200", "cpu": "cpu"}[broken.base]  # fmt: skip
    hosts = ", ".join(["host-a", "host-b"][: broken.n_hosts])
    n = recorded.expected(broken.base).n_devices
    (folder / "t.yaml").write_text(
        f"cluster: {{device: {device}, supernodes: [{{name: s, hosts: [{hosts}], "
        f"devices_per_host: {n}}}]}}\n"
        "model: {checkpoint: /models/v4, name: v4}\nserve: {max_model_len: 4096}\n"
        f"engine: {broken.expected.get('engine', 'native')}\n"
        f"launcher: {'ssh' if broken.n_hosts > 1 else 'local'}\n"
    )
    return str(folder / "t.yaml")


def test_there_are_fifty_broken_set_ups():
    assert len({b.id for b in BROKEN}) == len(BROKEN) >= 50


def _found(base, change, **expected):
    facts = msgspec.structs.replace(recorded.MAKE[base](), **change)
    return preflight.judge(
        [Answer("h", facts)], {"h": replace(recorded.expected(base), **expected)}
    )


def test_what_only_slows_is_a_hint_and_does_not_block():
    files = recorded.a2().files | {
        "/proc/meminfo": "MemAvailable: 1500000000 kB\nHugePages_Total: 0\n",
        "/proc/sys/kernel/numa_balancing": "1\n",
        "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
        "/proc/sys/net/ipv4/ip_local_port_range": "32768\t60999\n",
    }
    found = _found("a2", {"files": files})
    assert {f.check for f in found if f.level == "hint"} == {
        "host.hugepages",
        "host.tuning",
        "hccl.ports",
    }
    assert not [f for f in found if f.level == "blocker"]


def test_one_950_may_lack_unified_bus():
    facts = recorded.a950(1)
    nodes = tuple(n for n in facts.nodes if n not in ("ummu", "uburma"))
    facts = msgspec.structs.replace(facts, nodes=nodes)
    wanted = replace(recorded.expected("950"), n_devices=1)
    levels = {f.level for f in preflight.judge([Answer("h", facts)], {"h": wanted})}
    assert "warning" in levels
    assert "blocker" not in levels


def test_an_unknown_driver_is_doubted_and_not_refused():
    files = recorded.a2().files | {"/usr/local/Ascend/driver/version.info": "Version=24.1.rc3\n"}
    (found,) = [f for f in _found("a2", {"files": files}) if f.check == "software.driver"]
    assert found.level == "warning"


def test_every_row_of_the_matrix_has_a_source():
    assert {d.cann for d in matrix().drivers} == {"9.0", "9.1"}
    assert all(row.source for row in (*matrix().stacks, *matrix().drivers))


def test_a_checkpoints_digest_is_of_its_headers(tmp_path):
    def write(name, header, body=b"\0" * 8):
        folder = tmp_path / name
        folder.mkdir()
        data = len(header).to_bytes(8, "little") + header + body
        (folder / "model.safetensors").write_bytes(data)
        return str(folder)

    one, same, other = write("a", b"{}"), write("b", b"{}", b"\1" * 8), write("c", b"[]")
    digests = [look_at(p, digest=True).digest for p in (one, same, other)]
    assert digests[0] == digests[1] != digests[2]
    assert "does not exist" in look_at(str(tmp_path / "d"), digest=False).problem
    assert "no safetensors" in look_at(str(tmp_path), digest=False).problem


def test_who_hangs_is_named():
    lines = '> a\n{"op":"a","outcome":"passed"}\n> sparse_attn\n'
    probe = read_probe("ascend", lines, "did not return in 3 s")
    assert (probe.at, [r.op for r in probe.results]) == ("sparse_attn", ["a"])


def test_a_probe_that_takes_too_long_is_killed():
    start = time.monotonic()
    probe = run_probe("cpu", 0.2)
    assert probe.problem == "did not return in 0.2 s"
    assert time.monotonic() - start < 5


def test_a_backend_that_is_not_here_is_said_so():
    probe = run_probe("ascend", 60)
    assert probe.problem.startswith("ended with exit code 1")
    assert "torch_npu" in probe.problem


class Recorded(Machine):
    """A machine whose commands were recorded."""

    def __init__(self, root, commands):
        super().__init__(time.monotonic() + 9, root)
        self.commands = commands

    def run(self, command):
        return self.commands.get(command)

    def nodes(self):
        return ()


@pytest.mark.parametrize("base", ["a2", "a3", "950"])
def test_gathering_asks_every_device_what_its_generation_knows(base, tmp_path):
    commands = recorded.MAKE[base]().commands
    facts = gather(Question("localhost", kind="npu"), Recorded(tmp_path, commands))
    assert facts.commands == commands


def test_gathering_on_this_machine_goes_through_json():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        facts = gather(Question("localhost", kind="cpu", ports=(("127.0.0.1", port),)))
    again = msgspec.json.decode(msgspec.json.encode(facts), type=Facts)
    assert again == facts
    assert "Address already in use" in facts.busy[port]
    assert facts.interfaces["lo"].address == "127.0.0.1"


class Shell:
    """Commands with vendor tools and an ssh of ours on PATH."""

    def __init__(self, folder):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        self.env = os.environ | {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "XDG_STATE_HOME": str(folder / "state"),
        }
        (folder / "tiny").mkdir()
        (folder / "tiny" / "model.safetensors").write_bytes(b"\2" + b"\0" * 7 + b"{}")

    def tool(self, name, body):
        (self.bin / name).write_text(f"#!/bin/sh\n{body}\n")
        (self.bin / name).chmod(0o755)

    def topology(self, device, hosts, n=1):
        launcher = "ssh" if len(hosts) > 1 else "local"
        file = self.folder / "t.yaml"
        file.write_text(
            f"cluster: {{device: {device}, supernodes: [{{name: s, hosts: [{', '.join(hosts)}], "
            f"devices_per_host: {n}}}]}}\n"
            f"model: {{checkpoint: {self.folder / 'tiny'}, name: tiny}}\n"
            f"serve: {{max_model_len: 64, port: 0}}\nlauncher: {launcher}\n"
        )
        return file

    def doctor(self, *words):
        command = [sys.executable, "-m", "v4_ascend", "doctor", "--no-probe", *map(str, words)]
        done = subprocess.run(
            command, env=self.env, capture_output=True, text=True, timeout=30, check=False
        )
        return done.returncode, done.stdout, done.stderr


@pytest.fixture
def shell(tmp_path):
    return Shell(tmp_path)


def test_a_cpu_host_is_fit(shell):
    code, out, err = shell.doctor("--topology", shell.topology("cpu", ["localhost"]))
    assert (code, err) == (0, "")
    assert "1 host, fit: 0 blockers" in out


def test_an_npu_host_without_its_software_is_not(shell):
    sample = recorded.DATA / "a2_npu_smi_info.txt"
    shell.tool("npu-smi", f'test "$*" = info && cat {sample}')
    topology = shell.topology("ascend-a2-64", ["localhost"], 8)
    code, out, _ = shell.doctor("--topology", topology, "--json")
    answer = json.loads(out)
    assert (code, answer["status"]) == (4, "error")
    assert any("torch_npu is not installed" in line for line in answer["diagnostics"])
    assert any("/dev/devmm_svm" in line for line in answer["diagnostics"])
    levels = {f["check"]: f["level"] for f in answer["data"]["findings"]}
    assert (levels["devices.health"], levels["devices.present"]) == ("ok", "ok")


def test_a_host_that_is_down_comes_first_with_the_next_step(shell):
    shell.tool(
        "ssh", "echo 'ssh: connect to host 127.0.0.2 port 22: No route to host' >&2; exit 255"
    )
    topology = shell.topology("cpu", ["127.0.0.1", "127.0.0.2"])
    code, out, _ = shell.doctor("--topology", topology)
    first, step, *_ = out.splitlines()
    assert code == 4
    assert first.startswith("BLOCKER")
    assert "127.0.0.2" in first
    assert "No route to host" in first
    assert "ssh -o BatchMode=yes 127.0.0.2 true" in step


def test_another_host_is_asked_over_ssh_and_its_clock_compared(shell):
    late = "import json,sys; f=json.load(sys.stdin); f['clock']-=90; print(json.dumps(f))"
    host = f"{sys.executable} -m v4_ascend.deploy.doctor.host"
    shell.tool("ssh", f'{host} | {sys.executable} -c "{late}"')
    code, out, _ = shell.doctor("--topology", shell.topology("cpu", ["127.0.0.1", "127.0.0.2"]))
    assert code == 4
    assert "s behind the deploying host's" in out
    assert "127.0.0.2 means 127.0.0.2 there" in out  # lo has 127.0.0.1 alone


def test_deploy_looks_first_and_may_be_told_not_to(shell):
    subprocess.run(
        [sys.executable, "-m", "v4_ascend", "init", "--preset", "tiny", "--out",
         str(shell.folder / "model")], env=shell.env, check=True, capture_output=True,
    )  # fmt: skip
    file = shell.topology("cpu", ["127.0.0.1", "127.0.0.2"])
    file.write_text(file.read_text().replace("/tiny", "/model"))
    shell.tool("ssh", "echo Permission denied >&2; exit 255")
    command = [sys.executable, "-m", "v4_ascend", "deploy", "--topology", str(file)]
    done = subprocess.run(
        command, env=shell.env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 4
    assert "127.0.0.2: it could not be asked" in done.stderr
    assert "next: ssh -o BatchMode=yes 127.0.0.2 true" in done.stderr
    assert not (shell.folder / "state" / "v4-ascend" / "default" / "front.log").exists()
    skipped = subprocess.run(
        [*command, "--skip-preflight", "--timeout", "20"],
        env=shell.env, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "preflight skipped: versions, devices" in skipped.stderr
    assert skipped.returncode == 6


def test_the_quick_look_is_quick():
    expected = {preflight.HERE: Expected(kind="cpu", has_topology=True, n_devices=1)}
    start = time.monotonic()
    answers = preflight.ask_all([Question(preflight.HERE, kind="cpu")])
    preflight.judge(answers, expected)
    assert time.monotonic() - start < 0.5


def test_doctor_never_imports_torch():
    code = "import sys, v4_ascend.deploy.doctor.preflight; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
