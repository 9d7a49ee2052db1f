"""Hosts that are well, from recorded outputs: the ground that broken set-ups are made on."""

import re
from pathlib import Path

import msgspec

from v4_ascend import __version__
from v4_ascend.deploy.doctor.facts import Checkpoint, Facts, Interface, Output, Space
from v4_ascend.deploy.doctor.finding import Expected
from v4_ascend.deploy.doctor.gathering import DRIVER, GPU_QUERY, INSTALL, NVLINK, ping

DATA = Path(__file__).parent.parent / "data" / "doctor"
TOOLKIT = "/usr/local/Ascend/ascend-toolkit/latest/aarch64-linux/ascend_toolkit_install.info"
GB = 10**9


def text(name):
    return (DATA / name).read_text()


def _facts(**changes):
    base = Facts(
        version=__version__,
        python="3.11.14",
        machine="aarch64",
        kernel="5.10.0-182",
        clock=0.0,
        files={"/proc/meminfo": f"MemAvailable: {1500 * GB // 1024} kB\nHugePages_Total: 8\n"},
        packages={"torch": "2.10.0+cpu"},
        limits={"nofile": 1048576, "nproc": -1, "memlock": -1},
        interfaces={"lo": Interface("127.0.0.1", 65536), "eth0": Interface("10.0.0.1", 1500)},
        address="10.0.0.1",
        spaces={"state": Space(1000 * GB, 500 * GB), "shm": Space(500 * GB, 500 * GB)},
        checkpoint=Checkpoint("", 300 * GB, "a" * 64),
    )
    return msgspec.structs.replace(base, **changes)


def _npu(driver, **changes):
    base = _facts(packages={"torch": "2.10.0+cpu", "torch_npu": "2.10.0.post4"})
    files = base.files | {
        DRIVER: f"Version={driver}\n",
        INSTALL: "Driver_Install_Status=complete\n",
        TOOLKIT: text("950_toolkit_install.info"),
    }
    return msgspec.structs.replace(base, files=files, **changes)


def _roce(n):
    said = {"link": "link status: UP\n", "net_health": "net health status: Success\n"}
    said |= {"ip": "ipaddr:192.168.1.{}\nnetmask:255.255.255.0\n", "tls": text("hccn_tls.txt")}
    return {
        f"hccn_tool -i {d} -{what} -g": Output(0, out.replace("{}", str(d + 1)))
        for d in range(n)
        for what, out in said.items()
    }


def a2():
    """One Atlas A2 of 8 x 910B2."""
    commands = {"npu-smi info": Output(0, text("a2_npu_smi_info.txt"))} | _roce(8)
    nodes = (*(f"davinci{d}" for d in range(8)), "davinci_manager", "devmm_svm", "hisi_hdc")
    return _npu("25.5.0", commands=commands, nodes=nodes)


# As the published source of npu-smi prints it; A3's numbers are those of Ascend SHMEM's README.
A3_PLACE = """\
\tSDID                           : {sdid}
\tSuper Pod Size                 : 384
\tSuper Pod ID                   : 0
\tServer Index                   : {server}
"""
PLACE_950 = """\
\tSuper Pod Size                 : 64
\tSuper Pod ID                   : 3
\tChassis ID                     : {server}
"""


def _places(rows, sample, server=0):
    return {
        f"npu-smi info -t spod-info -i {npu} -c {chip}": Output(
            0, sample.format(sdid=16777216 + 65536 * i, server=server)
        )
        for i, (npu, chip) in enumerate(rows)
    }


def a3():
    """One Atlas A3 of 8 packages: 16 devices."""
    commands = {"npu-smi info": Output(0, text("a3_npu_smi_info.txt"))} | _roce(16)
    commands |= _places([(d // 2, d % 2) for d in range(16)], A3_PLACE)
    nodes = (*(f"davinci{d}" for d in range(16)), "davinci_manager", "devmm_svm", "hisi_hdc")
    return _npu("25.2.1", commands=commands, nodes=nodes)


UB_PORTS = """\
| UdieID | PortID | Speed | PortType | Link Status | Media Type |
| 0      | 4      | 200   | UB       | UP          | Optical    |
| 0      | 5      | 200   | UB       | UP          | Optical    |
"""


def a950(n=8):
    """A host of 950PRs: the recorded row of one, repeated."""
    head, row, foot = [], [], []
    for line in text("950_npu_smi_info.txt").splitlines():
        part = row if "Ascend950" in line or "Bus-Id" not in line and "0000:61" in line else None
        (part if part is not None else foot if row else head).append(line)
    rows = [x.replace("| 0      |", f"| {d}      |", 1) for d in range(n) for x in row]
    commands = {
        "npu-smi info": Output(0, "\n".join([*head, *rows, *foot])),
        "npu-smi info -t board -i 0": Output(0, text("950_npu_smi_board.txt")),
    }
    for d in range(n):
        commands[f"hccn_tool -g -dev_info -i {d}"] = Output(0, UB_PORTS)
        commands[f"hccn_tool -g -tls -i {d}"] = Output(0, text("950_hccn_tls.txt"))
    commands |= _places([(d, 0) for d in range(n)], PLACE_950)
    nodes = (*(f"davinci{d}" for d in range(n)), "davinci_manager", "hisi_hdc", "ummu", "uburma")
    base = _npu("25.7.rc1.6", commands=commands, nodes=nodes)
    files = base.files | {"/etc/hccl_rootinfo.json": "{}"}
    return msgspec.structs.replace(base, files=files, machine="x86_64", kernel="6.6.0-132")


def gpu():
    """A host of 8 H200."""
    rows = "".join(f"{i}, NVIDIA H200, 570.86.15, 143771, 4, 0\n" for i in range(8))
    links = "".join(f"\t Link {n}: 26.562 GB/s\n" for n in range(18))
    nvlink = "".join(f"GPU {i}: NVIDIA H200 (UUID: GPU-{i})\n{links}" for i in range(8))
    return _facts(commands={GPU_QUERY: Output(0, rows), NVLINK: Output(0, nvlink)})


def cpu():
    """A host that computes on its CPU."""
    return _facts()


MAKE = {"a2": a2, "a3": a3, "950": a950, "gpu": gpu, "cpu": cpu}
_DEVICES = {"a2": ("npu", "a2", 8), "a3": ("npu", "a3", 16), "950": ("npu", "950", 8),
            "gpu": ("cuda", "hopper", 8), "cpu": ("cpu", "cpu", 1)}  # fmt: skip


def expected(base, n_hosts=1, **changes):
    """What a topology of such hosts needs of each."""
    kind, family, n = _DEVICES[base]
    given = {"n_hosts": n_hosts, "n_ranks": n * n_hosts, "has_topology": True, "supernode": "s"}
    return Expected(kind=kind, family=family, n_devices=n, **(given | changes))


def second(facts):
    """The same host at another address, and another place of a supernode."""
    interfaces = facts.interfaces | {"eth0": Interface("10.0.0.2", facts.interfaces["eth0"].mtu)}
    commands = {}
    for line, output in facts.commands.items():
        said = output.text
        if "spod-info" in line:
            said = re.sub(r"((Server Index|Chassis ID) +: )0", r"\g<1>1", said)
            said = re.sub(r"(SDID +: )(\d+)", lambda m: f"{m[1]}{int(m[2]) + 2**24}", said)
        commands[line] = Output(output.code, said.replace("192.168.1.", "192.168.2."))
    return msgspec.structs.replace(
        facts, interfaces=interfaces, address="10.0.0.2", commands=commands
    )


PINGED = """\
device {d} PING {address}
recv seq=0,time=0.137000ms
recv seq=1,time=0.046000ms
recv seq=2,time=0.058000ms
3 packets transmitted, 3 received, 0.00% packet loss
"""


def pinged(facts, network, n):
    """A host whose devices all reach those of another one."""
    said = {
        ping(d, f"{network}.{d + 1}"): Output(0, PINGED.format(d=d, address=f"{network}.{d + 1}"))
        for d in range(n)
    }
    return msgspec.structs.replace(facts, commands=facts.commands | said)
