"""Broken set-ups: each is a change to hosts that are well, and the cause that must be named.

Alone, it runs all of them and prints what `doctor` says: ``python tests/deploy/broken_setups.py``.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

sys.path.insert(0, str(Path(__file__).parent))
import recorded_hosts as recorded

from v4_ascend.deploy.doctor.facts import (
    Answer,
    Checkpoint,
    Interface,
    Output,
    Probe,
    Probed,
    Space,
)
from v4_ascend.deploy.doctor.gathering import (
    CGROUP_LIMITS,
    DRIVER,
    GPU_QUERY,
    NVLINK,
    SPOD,
    ping,
)
from v4_ascend.deploy.doctor.preflight import judge

SMI = "npu-smi info"
RANK_TABLE = json.dumps(
    {
        "status": "completed",
        "version": "1.0",
        "server_count": "1",
        "server_list": [
            {
                "server_id": "node_0",
                "device": [{"device_id": "0", "device_ip": "192.168.1.1", "rank_id": "0"}],
            }
        ],
    }
)


@dataclass
class Broken:
    """A set-up that must not be deployed.

    `change` edits the facts of the last host; `check` is the finding's, `says` a part of it.
    """

    id: str
    base: str
    check: str
    says: str
    change: object
    n_hosts: int = 1
    expected: dict = field(default_factory=dict)
    skew_s: float = 0.0
    problem: str = ""


def sets(**fields):
    return lambda facts: msgspec.structs.replace(facts, **fields)


def merges(name, **entries):
    return lambda f: msgspec.structs.replace(f, **{name: getattr(f, name) | entries})


def file(path, content):
    return merges("files", **{path: content})


def command(line, output, code=0):
    return merges("commands", **{line: Output(code, output)})


def without(name, key):
    def change(facts):
        left = {k: v for k, v in getattr(facts, name).items() if k != key}
        return msgspec.structs.replace(facts, **{name: left})

    return change


def edits(line, old, new):
    def change(facts):
        before = facts.commands[line]
        assert old in before.text, (line, old)
        return command(line, before.text.replace(old, new, 1), before.code)(facts)

    return change


def no_node(name):
    return lambda f: msgspec.structs.replace(f, nodes=tuple(n for n in f.nodes if n != name))


def env(**settings):
    return merges("env", **settings)


def packages(**versions):
    return merges("packages", **{k.replace("triton_", "triton-"): v for k, v in versions.items()})


def both(*changes):
    def change(facts):
        for c in changes:
            facts = c(facts)
        return facts

    return change


def every(start, old, new):
    """Change what all commands of a beginning printed."""

    def change(facts):
        for line in [c for c in facts.commands if c.startswith(start)]:
            facts = edits(line, old, new)(facts)
        return facts

    return change


def no_link_of(gpu):
    def change(facts):
        before, head, after = facts.commands[NVLINK].text.partition(f"GPU {gpu}:")
        after = after.replace("26.562 GB/s", "<inactive>", 18)
        return command(NVLINK, before + head + after)(facts)

    return change


LOST = """\
device 3 PING 192.168.1.4
recv time out seq=0
recv time out seq=1
recv time out seq=2
3 packets transmitted, 0 received, 100.00% packet loss
"""
TABLE = "/etc/hccl.json"
VLLM = {"engine": "vllm"}
TLS_ON = "tls switch[1]"
TAKEN = "port 8000 on 0.0.0.0: Address already in use; held by pid 7 (nginx)"
PROBE = Probe("ascend", (Probed("rms_norm", "passed"),), "sparse_attn", "did not return in 120 s")
WRONG = Probe("ascend", (Probed("swiglu", "failed", "largest error 3.1"),))
OTHER = sets(checkpoint=Checkpoint("", 300 * 10**9, "b" * 64))
MEMORY = "MemAvailable: {} kB\n"

BROKEN = [
    # software
    Broken("python too old", "cpu", "software.python", "3.9.18", sets(python="3.9.18")),
    Broken("no torch", "cpu", "software.torch", "not installed", sets(packages={})),
    Broken("no torch_npu", "a2", "software.torch-npu", "not installed",
           without("packages", "torch_npu")),
    Broken("torch_npu of another torch", "a3", "software.torch-npu", "2.9.0",
           packages(torch_npu="2.9.0")),
    Broken("torch of another torch_npu", "950", "software.torch-npu", "2.13.0",
           packages(torch="2.13.0+cpu")),
    Broken("no CANN", "a2", "software.cann", "says no version",
           without("files", recorded.TOOLKIT)),
    Broken("driver too old for CANN", "a2", "software.driver", "25.0.rc1",
           file(DRIVER, "Version=25.0.rc1\n")),
    Broken("driver too old on 950", "950", "software.driver", "25.0.3",
           file(DRIVER, "Version=25.0.3\n")),
    Broken("kernel too old for 950 on x86", "950", "software.kernel", "5.10.0",
           sets(kernel="5.10.0-60")),
    Broken("engine vllm without vllm", "a2", "software.engine", "vllm is not installed",
           sets(), expected=VLLM),
    Broken("engine vllm without vllm-ascend", "a3", "software.engine",
           "vllm-ascend is not installed", packages(vllm="0.23.0"), expected=VLLM),
    Broken("vllm-ascend beside another vllm", "a3", "software.engine", "vllm is 0.22.1",
           packages(vllm="0.22.1", vllm_ascend="0.23.0"), expected=VLLM),
    Broken("v4-ascend differs", "cpu", "software.v4-ascend", "0.0.9", sets(version="0.0.9"), 2),
    Broken("CANN differs", "a2", "software.same", "CANN differs: 9.0.1 on host-b",
           file(recorded.TOOLKIT, "version=9.0.1\n"), 2),
    # devices
    Broken("no npu-smi", "a2", "devices.present", "npu-smi is not installed",
           without("commands", SMI)),
    Broken("npu-smi fails", "a3", "devices.present", "dcmi model initialized failed",
           command(SMI, "dcmi model initialized failed, because the device is used.\n", 1)),
    Broken("npu-smi hangs", "a2", "devices.present", "did not end in time",
           command(SMI, "", None)),
    Broken("a device missing", "a2", "devices.present", "lists 7 devices, 8 are planned",
           edits(SMI, "| 7     910B2 ", "| 7     ????? ")),
    Broken("a 950 missing", "950", "devices.present", "lists 7 devices",
           command(SMI, recorded.a950(7).commands[SMI].text)),
    Broken("no GPUs", "gpu", "devices.present", "lists 0 devices",
           command(GPU_QUERY, "No devices were found\n", 6)),
    Broken("no nvidia-smi", "gpu", "devices.present", "nvidia-smi is not installed",
           without("commands", GPU_QUERY)),
    Broken("A3 where A2 is planned", "a2", "devices.chip", "Ascend910",
           command(SMI, recorded.text("a3_npu_smi_info.txt"))),
    Broken("A2 where 950 is planned", "950", "devices.chip", "910B2",
           command(SMI, recorded.text("a2_npu_smi_info.txt"))),
    Broken("device alarm", "a2", "devices.health", "NPU 3 chip 0 has health Alarm",
           edits(SMI, "| 3     910B2               | OK", "| 3     910B2               | Alarm")),
    Broken("device critical on 950", "950", "devices.health", "NPU 0 chip 0 has health Critical",
           edits(SMI, "| OK      ", "| Critical")),
    Broken("HBM taken by a process", "a2", "devices.memory", "taken by 4242 python",
           both(edits(SMI, "3431 / 65536", "60000/ 65536"),
                edits(SMI, "| No running processes found in NPU 0                              "
                      "                              |",
                      "| 0       0                 | 4242          | python                   "
                      "| 56000                   |"))),
    Broken("HBM taken on 950", "950", "devices.memory", "taken by 4242 python",
           both(edits(SMI, "5239  / 131072", "90000 / 131072"),
                edits(SMI, "| No running processes found in NPU 0", "| 0      | 4242          "
                      "| python                   | 84000                   |\n| (none in"))),
    Broken("HBM taken by nobody visible", "a3", "devices.memory", "NPU 4 chip 1 has 5,536",
           edits(SMI, "2876 / 65536", "60000/ 65536")),
    Broken("GPU memory taken", "gpu", "devices.memory", "GPU 2 has 3,771",
           edits(GPU_QUERY, "2, NVIDIA H200, 570.86.15, 143771, 4",
                 "2, NVIDIA H200, 570.86.15, 143771, 140000")),
    Broken("devmm_svm missing on A2", "a2", "devices.nodes", "/dev/devmm_svm",
           no_node("devmm_svm")),
    Broken("hisi_hdc missing on A3", "a3", "devices.nodes", "/dev/hisi_hdc", no_node("hisi_hdc")),
    Broken("manager missing", "a3", "devices.nodes", "/dev/davinci_manager",
           no_node("davinci_manager")),
    Broken("ummu missing on 950", "950", "devices.nodes", "/dev/ummu", no_node("ummu")),
    Broken("uburma missing on 950", "950", "devices.nodes", "/dev/uburma", no_node("uburma")),
    Broken("a davinci node missing", "a2", "devices.nodes", "7 davinci devices, 8 are used",
           no_node("davinci5")),
    # network
    Broken("no hccn_tool", "a2", "network.hccn-tool", "not installed",
           lambda f: msgspec.structs.replace(f, commands={SMI: f.commands[SMI]}), 2),
    Broken("link down", "a2", "network.link", "NPU port 3: link status is DOWN",
           command("hccn_tool -i 3 -link -g", "link status: DOWN\n"), 2),
    Broken("net health fault", "a3", "network.net-health", "is Receive timeout",
           command("hccn_tool -i 9 -net_health -g", "net health status: Receive timeout\n"), 2),
    Broken("no device address", "a2", "network.ip", "no ip was preset there",
           command("hccn_tool -i 0 -ip -g", "Get ipconf failed, because no ip was preset there!\n"),
           2),
    Broken("UB ports down", "950", "network.ub", "NPU 2: no port of 2 is up",
           command("hccn_tool -g -dev_info -i 2", recorded.UB_PORTS.replace("| UP ", "| DOWN"))),
    Broken("no UB ports", "950", "network.ub", "NPU 1: hccn_tool lists no port",
           command("hccn_tool -g -dev_info -i 1", "")),
    Broken("TLS differs between hosts", "a2", "network.tls",
           "on for 8 (host-b) and off for 8 (host-a)",
           lambda f: both(*(edits(f"hccn_tool -i {d} -tls -g", "tls switch[0]", TLS_ON)
                            for d in range(8)))(f), 2),
    Broken("TLS differs on one device", "a3", "network.tls", "on for 1 (host-a) and off for 15",
           edits("hccn_tool -i 5 -tls -g", "tls switch[0]", TLS_ON)),
    Broken("TLS differs on 950", "950", "network.tls", "TLS is on for 1 (host-b)",
           edits("hccn_tool -g -tls -i 0", "tls switch[0]", TLS_ON), 2),
    Broken("clock ahead", "cpu", "network.clock", "95.0 s ahead", sets(), 2, skew_s=95.0),
    Broken("clock behind", "a2", "network.clock", "3,600.0 s behind", sets(), 2, skew_s=-3600.0),
    Broken("name is another host's", "cpu", "network.address", "host-b means 10.0.0.9",
           sets(address="10.0.0.9"), 2),
    Broken("name is nobody's", "cpu", "network.address", "host-b means nothing",
           sets(address=None), 2),
    Broken("peer does not answer", "a2", "network.peers", "host-a cannot be reached",
           sets(unreachable={"host-a": "no answer in 2 s"}), 2),
    Broken("missing NIC", "a2", "network.address", "is not its address",
           without("interfaces", "eth0"), 2),
    Broken("MTU differs", "a2", "network.mtu", "1500 on host-a; 9000 on host-b",
           merges("interfaces", eth0=Interface("10.0.0.2", 9000)), 2),
    Broken("devices at two places of a supernode", "a3", "network.supernode",
           "have Server Index 1 and 4",
           command(f"{SPOD} -i 3 -c 1", recorded.A3_PLACE.format(sdid=1, server=4)), 2),
    Broken("an SDID twice", "a3", "network.supernode", "two of its devices have SDID 33554432",
           command(f"{SPOD} -i 3 -c 1", recorded.A3_PLACE.format(sdid=33554432, server=1)), 2),
    Broken("two hosts at one place", "a3", "network.supernode",
           "host-a too is server 0 of supernode 0", every(SPOD, ": 1\n", ": 0\n"), 2),
    Broken("two supernodes where one is planned", "950", "network.supernode",
           "different Super Pod IDs: 3 on host-a; 8 on host-b",
           every(SPOD, "ID                   : 3", "ID                   : 8"), 2),
    Broken("a GPU without NVLink", "gpu", "network.nvlink", "GPU 5 has 0 of 18 NVLinks up",
           no_link_of(5)),
    Broken("NPUs of two hosts do not reach each other", "a2", "network.ping",
           "NPU port 3 does not reach 192.168.1.4 of another host",
           both(lambda f: recorded.pinged(f, "192.168.1", 8),
                command(ping(3, "192.168.1.4"), LOST)), 2),
    Broken("port used", "cpu", "network.ports", "nginx", sets(busy={8000: TAKEN})),
    Broken("host down", "cpu", "network.ssh", "Connection timed out", sets(), 2,
           problem="ssh ended with exit code 255, saying: Connection timed out"),
    # HCCL
    Broken("HCCL_IF_IP of another host", "a2", "hccl.address", "HCCL_IF_IP is 10.0.0.7",
           env(HCCL_IF_IP="10.0.0.7")),
    Broken("HCCL_SOCKET_IFNAME of no interface", "a3", "hccl.address", "enp9",
           env(HCCL_SOCKET_IFNAME="=enp9")),
    Broken("HCCL_CONNECT_TIMEOUT out of range", "a2", "hccl.setting", "'60'",
           env(HCCL_CONNECT_TIMEOUT="60")),
    Broken("HCCL_BUFFSIZE no number", "a3", "hccl.setting", "'1GB'", env(HCCL_BUFFSIZE="1GB")),
    Broken("expansion mode of A2 on 950", "950", "hccl.setting", "'HOST'",
           env(HCCL_OP_EXPANSION_MODE="HOST")),
    Broken("HCCL_DETERMINISTIC on 950", "950", "hccl.setting", "HCCL_DETERMINISTIC",
           env(HCCL_DETERMINISTIC="1")),
    Broken("too few visible devices", "a2", "hccl.visible", "'0,1,2,3'",
           env(ASCEND_RT_VISIBLE_DEVICES="0,1,2,3")),
    Broken("a visible device that is not there", "a2", "hccl.visible", "8'",
           env(ASCEND_RT_VISIBLE_DEVICES="1,2,3,4,5,6,7,8")),
    Broken("rank table of too few ranks", "a2", "hccl.rank-table", "has 1 ranks",
           both(env(RANK_TABLE_FILE=TABLE), file(TABLE, RANK_TABLE))),
    Broken("rank table is no JSON", "a2", "hccl.rank-table", TABLE,
           both(env(RANK_TABLE_FILE=TABLE), file(TABLE, "{"))),
    Broken("rank table gone", "a3", "hccl.rank-table", "cannot be read",
           env(RANK_TABLE_FILE=TABLE)),
    Broken("rank table is a link", "a2", "hccl.rank-table", "is a link",
           both(env(RANK_TABLE_FILE=TABLE), sets(table_is_link=True))),
    # host and storage
    Broken("too little host memory", "a2", "host.memory", "7.6 GiB",
           file("/proc/meminfo", MEMORY.format(8_000_000))),
    Broken("a cgroup allows too little", "950", "host.memory", "a cgroup allows 16.0 GiB",
           file(CGROUP_LIMITS[0], f"{16 * 2**30}\n")),
    Broken("weights do not fit a CPU's memory", "cpu", "host.memory", "15.3 GiB",
           file("/proc/meminfo", MEMORY.format(16_000_000))),
    Broken("too few files", "cpu", "host.ulimit", "nofile) is 256",
           merges("limits", nofile=256)),
    Broken("too few processes", "a3", "host.ulimit", "nproc) is 1,024",
           merges("limits", nproc=1024)),
    Broken("disk full", "cpu", "storage.disk", "0.00 GiB",
           merges("spaces", state=Space(10**12, 0))),
    Broken("no checkpoint", "a2", "storage.checkpoint", "does not exist",
           sets(checkpoint=Checkpoint("/models/v4: does not exist"))),
    Broken("checkpoint not readable", "a3", "storage.checkpoint", "Permission denied",
           sets(checkpoint=Checkpoint("/models/v4/a.safetensors: Permission denied")), 2),
    Broken("checkpoints differ", "a2", "storage.same-checkpoint", "bbbbbbbbbbbb on host-b", OTHER,
           2),
    # operators
    Broken("an operator hangs", "a2", "operators.run", "operator sparse_attn did not return",
           sets(probe=PROBE)),
    Broken("an operator is wrong", "a3", "operators.answers", "swiglu failed",
           sets(probe=WRONG)),
]  # fmt: skip


def answers_of(b):
    """What the hosts of a broken set-up answer."""
    answers = [Answer(n, recorded.MAKE[b.base]()) for n in ["host-a", "host-b"][: b.n_hosts]]
    if b.n_hosts == 2:
        answers[1] = Answer("host-b", recorded.second(answers[1].facts))
    last = answers[-1]
    if b.problem:
        answers[-1] = Answer(last.host, problem=b.problem)
    else:
        answers[-1] = Answer(last.host, b.change(last.facts), skew_s=b.skew_s)
    return answers


def findings(b):
    """What doctor finds in a broken set-up."""
    answers = answers_of(b)
    expected = recorded.expected(b.base, b.n_hosts, **b.expected)
    return judge(answers, {a.host: expected for a in answers})


def main():
    wrong = 0
    for b in BROKEN:
        blockers = [f for f in findings(b) if f.level == "blocker"]
        is_named = any(f.check == b.check and b.says in f.what for f in blockers)
        wrong += not is_named
        said = f"{blockers[0].host}: {blockers[0].what}" if blockers else "nothing"
        print(f"{'named ' if is_named else 'MISSED'} {b.id}: {said}")  # noqa: T201
    print(f"{len(BROKEN)} broken set-ups, {wrong} missed")  # noqa: T201
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
