"""Builds and loads the libraries that torch_npu expects of CANN.

torch_npu's wheel names nine libraries it does not carry. Every symbol it wants from them is
either written in acl_host.c, harmless to answer with success (`_HARMLESS`), or a function
that prints its name and ends the process: nothing succeeds that was not thought about.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from v4_ascend.emulation.chips import CANN_VERSION, Chip
from v4_ascend.emulation.environment import cache_root
from v4_ascend.errors import V4AscendError

_ACL = "libascendcl.so"
_SOURCE = Path(__file__).with_name("acl_host.c")

# Settings, subscriptions and the ends of things: there is nothing behind them to fail.
_HARMLESS = re.compile(
    r"aclrt(SetDeviceSatMode|SetOp|SetStream|Ctx|SetSys|Reset|DeviceEnable|StreamWait|Synchronize"
    r"|Subscribe|UnSub|Process|Peek|GetLastError|Host|GetStreamOverflowSwitch|Use|Unuse"
    r"|DeviceTaskAbort|GetMemUce|DeviceGetUuid|GetResIn)"
    r"|aclmdl(InitDump|FinalizeDump|SetDump)|aclopSetCompile|aclAppLog|aclprof|Msprof|HcclSetConfig"
)
# Looked up, and a way around them taken where they are missing.
_LEFT_OUT = re.compile(
    r"aclrt(ReserveMemAddress|MapMem|MallocPhysical|CmoAsync|GetErrorVerbose|MemcpyBatch"
    r"|LaunchKernel|Binary)"
)
# What torch_npu looks up by name at run time; operators (aclnn) stay unknown.
_LOOKED_UP = re.compile(rb"\0(acl(?:rt|sys|mdl|prof|op|[A-Z])\w*)(?=\0)")


def load(chip: Chip, devices: int, memory_bytes: int) -> None:
    """Load the libraries into this process, describing `devices` of `chip`.

    Raises:
        V4AscendError: torch_npu is not installed or already imported, or no C compiler.
    """
    if "torch_npu" in sys.modules:
        raise V4AscendError("emulation: torch_npu is imported already; install() comes before it")
    folder = build()
    acl = ctypes.CDLL(str(folder / _ACL), ctypes.RTLD_GLOBAL)
    acl.emulate_npu.argtypes = (
        ctypes.c_int,
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_char_p,
    )
    names = chip.soc_name.encode(), CANN_VERSION.encode()
    if acl.emulate_npu(devices, memory_bytes, chip.cube_cores, *names):
        raise V4AscendError(f"emulation: {devices} devices; there can be 1 to 64")
    # The loader takes a library by its name if one of that name is loaded.
    for library in sorted(folder.glob("*.so")):
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def build() -> Path:
    """Return the folder of the libraries, compiling them if they are not there."""
    wheel, torch = _package("torch_npu"), _package("torch")
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None or shutil.which("nm") is None or shutil.which("readelf") is None:
        raise V4AscendError("emulation: needs a C compiler, nm and readelf (binutils) on PATH")
    version = (wheel / "version.py").read_text(encoding="utf-8")
    seed = (
        version + _SOURCE.read_text(encoding="utf-8") + Path(__file__).read_text(encoding="utf-8")
    )
    folder = cache_root() / "acl" / hashlib.sha256(seed.encode()).hexdigest()[:12]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)  # every rank of a job gets here at once
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            _compile(compiler, wheel, torch, folder)
            (folder / "complete").touch()
    return folder


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise V4AscendError(
            f"emulation: {name} is not installed here; "
            "`python -m v4_ascend.emulation.environment npu` prints a python that has it"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _compile(compiler: str, wheel: Path, torch: Path, folder: Path) -> None:
    binaries = sorted(wheel.rglob("*.so*"))
    libraries, wanted = _unmet(binaries, (*binaries, *torch.glob("lib/*.so*")))
    for binary in binaries:
        looked_up = {m.decode() for m in _LOOKED_UP.findall(binary.read_bytes())}
        wanted |= {s for s in looked_up if not _LEFT_OUT.match(s)}
    source = _SOURCE.read_text(encoding="utf-8")
    written = set(re.findall(r"^(?:int|size_t|const char \*)\s*(\w+)\(", source, re.MULTILINE))
    lines = [source, 'static long refuse(const char *name) { fprintf(stderr, "emulated NPU: %s']
    lines[-1] += ' is not emulated\\n", name); abort(); }'
    for i, symbol in enumerate(sorted(wanted - written)):
        body = "return 0;" if _HARMLESS.match(symbol) else f'return refuse("{symbol}");'
        lines.append(f'long stub_{i}(void) __asm__("{symbol}"); long stub_{i}(void) {{ {body} }}')
    (folder / "acl.c").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "empty.c").write_text("", encoding="utf-8")
    command = [compiler, "-O1", "-w", "-shared", "-fPIC"]
    _run([*command, f"-Wl,-soname,{_ACL}", "-o", folder / _ACL, folder / "acl.c"])
    # torch_npu asks a library for a symbol by its handle, and finds what that one depends on.
    link = [f"-L{folder}", "-Wl,--no-as-needed", "-lascendcl", "-Wl,-rpath,$ORIGIN"]
    for name in libraries - {_ACL}:
        _run([*command, f"-Wl,-soname,{name}", "-o", folder / name, folder / "empty.c", *link])


def _unmet(binaries: list[Path], providers: Iterable[Path]) -> tuple[set[str], set[str]]:
    """Return the libraries and the symbols nobody here provides."""
    providers = list(providers)
    system = {
        "libc",
        "libm",
        "libdl",
        "librt",
        "libpthread",
        "libstdc++",
        "libgcc_s",
        "ld-linux-x86-64",
    }
    system.add("ld-linux-aarch64")
    there = {p.name for p in providers}
    libraries, wanted, given = set(), set(), set()
    for binary in binaries:
        for line in _run(["readelf", "-d", binary]).splitlines():
            if "(NEEDED)" in line:
                libraries.add(line.split("[")[1].split("]")[0])
        # Only strong references: a weak one may stay without an answer.
        for line in _run(["nm", "-D", "--undefined-only", binary]).splitlines():
            kind, symbol = line.split()[-2:]
            if kind == "U":
                wanted.add(symbol)
    for provider in providers:
        for line in _run(["nm", "-D", "--defined-only", provider]).splitlines():
            given.add(line.split()[-1].split("@")[0])
    libraries = {name for name in libraries - there if name.split(".so")[0] not in system}
    # Symbols of the system's libraries carry their version, CPython's their prefix.
    loose = {s for s in wanted if "@" not in s and not s.startswith(("Py", "_Py"))}
    return libraries, {s for s in loose - given if not s.startswith(("_ZNSt", "_ZSt", "_ZNKSt"))}


def _run(command: list[str | Path]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise V4AscendError(f"emulation: {command[0]} failed: {done.stderr[-1000:]}")
    return done.stdout
