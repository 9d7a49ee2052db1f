"""Versions: of each host against the matrix, and of the hosts against each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from v4_ascend import __version__
from v4_ascend.deploy.doctor import outputs
from v4_ascend.deploy.doctor.finding import Finding, Host, Level, odd_ones
from v4_ascend.deploy.doctor.gathering import DRIVER, INSTALL
from v4_ascend.deploy.doctor.matrix import matrix

MIN_PYTHON = (3, 11)  # pyproject: requires-python
MIN_KERNEL_950_X86 = (5, 18)


def driver(host: Host) -> str:
    """Return the driver's version, empty if it says none."""
    return outputs.pairs(host.facts.files.get(DRIVER, "")).get("Version", "")


def cann(host: Host) -> str:
    """Return CANN's version, empty if it says none."""
    for path, text in host.facts.files.items():
        if path.endswith("ascend_toolkit_install.info"):
            return outputs.pairs(text).get("version", "")
    return ""


def python(host: Host) -> Iterator[Finding]:
    """Python runs this package."""
    is_old = outputs.version(host.facts.python) < MIN_PYTHON
    yield host.says(
        "blocker" if is_old else "ok",
        "software.python",
        f"Python is {host.facts.python}",
        value=host.facts.python,
        expected="3.11 or newer",
        next_step="install v4-ascend with a newer Python, in the same place everywhere",
        source="pyproject requires-python",
    )


def torch(host: Host) -> Iterator[Finding]:
    """Torch is there; on an NPU torch_npu too, and built for it."""
    packages = host.facts.packages
    if "torch" not in packages:
        yield host.says(
            "blocker",
            "software.torch",
            "torch is not installed",
            expected="torch",
            next_step="pip install v4-ascend",
        )
        return
    if host.kind != "npu":
        yield host.says("ok", "software.torch", f"torch is {packages['torch']}")
        return
    if (npu := packages.get("torch_npu")) is None:
        yield host.says(
            "blocker",
            "software.torch-npu",
            "torch_npu is not installed",
            expected="torch_npu of torch's version",
            next_step=f"pip install torch_npu=={_three(packages['torch'])}",
        )
        return
    fits = outputs.version(npu)[:3] == outputs.version(packages["torch"])[:3]
    yield host.says(
        "ok" if fits else "blocker",
        "software.torch-npu",
        f"torch_npu is {npu}, torch is {packages['torch']}",
        value=npu,
        expected=f"torch_npu {_three(packages['torch'])} or a post of it",
        next_step=f"pip install torch_npu=={_three(packages['torch'])}",
        source=matrix().torch_npu_rule.source,
    )


def driver_and_cann(host: Host) -> Iterator[Finding]:
    """The driver is whole, CANN is there, and the two go together."""
    if host.kind != "npu":
        yield host.says("not-applicable", "software.cann", "driver and CANN: no NPU is used here")
        return
    has_driver, has_cann = driver(host), cann(host)
    if not has_driver:
        yield host.says(
            "warning",
            "software.driver",
            f"{DRIVER} says no version",
            expected="the NPU driver's files, mounted into a container too",
            next_step=f"docker run ... -v {DRIVER}:{DRIVER}",
            source="vllm-ascend tutorials, docker run",
        )
    install = host.facts.files.get(INSTALL)
    if install is not None and "Driver_Install_Status=complete" not in install:
        yield host.says(
            "warning",
            "software.driver",
            f"{INSTALL} has no Driver_Install_Status=complete",
            expected="a driver that was installed to its end",
            next_step="install the driver package again",
            source="npu-smi warns by the same line",
        )
    if not has_cann:
        yield host.says(
            "blocker",
            "software.cann",
            "CANN says no version",
            expected="CANN's toolkit, and ASCEND_HOME_PATH naming it",
            next_step="source /usr/local/Ascend/ascend-toolkit/set_env.sh",
        )
        return
    known = matrix().drivers_of(outputs.version(has_cann))
    if known is None:
        yield host.says(
            "warning",
            "software.cann",
            f"CANN {has_cann} is not in the matrix of {matrix().dated}",
            value=has_cann,
            expected="CANN " + " or ".join(d.cann for d in matrix().drivers),
            next_step="compare its release notes with the driver",
            source="configs/software.yaml",
        )
        return
    if not has_driver:
        return
    name = ".".join(map(str, outputs.version(has_driver)[:2]))
    # What is not named, older ones above all, is not known to work: not known to fail either.
    level: Level
    level = "ok" if name in known.works else "blocker" if name in known.fails else "warning"
    yield host.says(
        level,
        "software.driver",
        f"driver {has_driver} under CANN {has_cann}",
        value=has_driver,
        expected="driver " + ", ".join(known.works),
        next_step="upgrade the driver (HDK), or take the image of an older CANN",
        source=known.source,
    )


def firmware(host: Host) -> Iterator[Finding]:
    """The board finds driver and firmware compatible."""
    for command, output in host.facts.commands.items():
        if "-t board" not in command:
            continue
        board = outputs.pairs(output.text, ":")
        if (says := board.get("Compatibility")) is not None:
            version = board.get("Firmware Version", "unknown")
            yield host.says(
                "ok" if says == "OK" else "warning",
                "software.firmware",
                f"firmware {version}: compatibility {says}",
                value=says,
                expected="OK",
                next_step="upgrade firmware and driver together",
                source=f"`{command}`",
            )


def engine(host: Host) -> Iterator[Finding]:
    """Where vLLM serves, its plugin is there, and of the versions it was released with."""
    packages, asked = host.facts.packages, host.expected.engine == "vllm"
    if not asked or host.kind == "cpu":
        return
    if "vllm" not in packages or (host.kind == "npu" and "vllm_ascend" not in packages):
        lacks = "vllm" if "vllm" not in packages else "vllm-ascend"
        yield host.says(
            "blocker",
            "software.engine",
            f"{lacks} is not installed",
            expected="engine: vllm needs it, or engine: native",
            next_step=f"pip install {lacks}",
        )
        return
    if host.kind != "npu":
        return
    has = packages["vllm_ascend"]
    stack = next((s for s in matrix().stacks if s.vllm_ascend == has), None)
    if stack is None:
        yield host.says(
            "warning",
            "software.engine",
            f"vllm-ascend {has} is not in the matrix of {matrix().dated}",
            value=has,
            expected=", ".join(s.vllm_ascend for s in matrix().stacks),
            source="configs/software.yaml",
        )
        return
    for name, found, wanted in (
        ("vllm", packages["vllm"], stack.vllm),
        ("CANN", cann(host), stack.cann),
        ("torch", packages.get("torch", ""), stack.torch),
        ("torch_npu", packages.get("torch_npu", ""), stack.torch_npu),
        ("triton-ascend", packages.get("triton-ascend", ""), stack.triton_ascend),
    ):
        if wanted is not None and found.partition("+")[0] != wanted:
            level: Level = "blocker" if name == "vllm" else "warning"
            yield host.says(
                level,
                "software.engine",
                f"{name} is {found or 'not installed'} beside vllm-ascend {has}",
                value=found,
                expected=f"{name} {wanted}",
                next_step="take the image quay.io/ascend/vllm-ascend of that version",
                source=stack.source,
            )


def kernel(host: Host) -> Iterator[Finding]:
    """A 950 under x86 has a kernel that is new enough."""
    if host.expected.family != "950" or host.facts.machine != "x86_64" or host.kind != "npu":
        return
    is_old = outputs.version(host.facts.kernel) < MIN_KERNEL_950_X86
    yield host.says(
        "blocker" if is_old else "ok",
        "software.kernel",
        f"Linux is {host.facts.kernel} (x86_64)",
        value=host.facts.kernel,
        expected="5.18 or newer for a 950",
        next_step="boot a newer kernel",
        source="HCCL guide: x86 host and 950",
    )


def same_package(hosts: Sequence[Host]) -> Iterator[Finding]:
    """Every host has the v4-ascend that deploys: a plan means the same to all."""
    for host in hosts:
        if host.facts.version != __version__:
            yield host.says(
                "blocker",
                "software.v4-ascend",
                f"v4-ascend is {host.facts.version} here, {__version__} deploys",
                value=host.facts.version,
                expected=__version__,
                next_step=f"pip install v4-ascend=={__version__}",
                source="deploy/agent.py refuses it too",
            )


def same_stack(hosts: Sequence[Host]) -> Iterator[Finding]:
    """Libraries that talk to each other over the network are of one version."""
    values: dict[str, Callable[[Host], str]] = {
        "CANN": cann,
        "torch": lambda h: h.facts.packages.get("torch", ""),
        "torch_npu": lambda h: h.facts.packages.get("torch_npu", ""),
        "driver": driver,
        "Python": lambda h: h.facts.python.rpartition(".")[0],
    }
    for name, value in values.items():
        level: Level = "blocker" if name == "CANN" else "warning"
        if odd := odd_ones(hosts, value):
            yield Finding(
                level,
                "all hosts",
                "software.same",
                f"{name} differs: {odd}",
                odd,
                "one version",
                "install the same image on every host",
                "ours: every rank runs the same collectives; nobody tests a mixture",
            )


def _three(text: str) -> str:
    """``2.10.0`` of ``2.10.0+cpu``."""
    return ".".join(map(str, outputs.version(text)[:3]))


CHECKS = (python, torch, driver_and_cann, firmware, engine, kernel)
ACROSS = (same_package, same_stack)
