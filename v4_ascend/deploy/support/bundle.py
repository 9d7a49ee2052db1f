"""Collects what a support bundle holds, and writes it whole or not at all."""

from __future__ import annotations

import getpass
import io
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from v4_ascend import __version__
from v4_ascend.deploy.explain.entries import all_entries
from v4_ascend.deploy.explain.findings import judge
from v4_ascend.deploy.explain.logs import look_through, of_deployment
from v4_ascend.deploy.explain.report import verdict_lines
from v4_ascend.deploy.state import find, latest
from v4_ascend.deploy.support.redaction import Redactor
from v4_ascend.supernode.plan import Plan

LOG_BYTES = 16 << 20  # of each log: its first and its last half of that
PACKAGES = ("torch", "torch_npu", "triton", "triton-ascend", "vllm", "vllm-ascend", "mindspore",
            "numpy", "safetensors", "tokenizers", "transformers", "msgspec", "pyzmq")  # fmt: skip
# Settings that change what runs. Whatever is not on this list stays here.
ENVIRONMENT = ("ACL_", "ASCEND_", "ATB_", "CUDA_VISIBLE_DEVICES", "GLOO_", "HCCL_", "NCCL_", "NPU_",
               "LD_LIBRARY_PATH", "OMP_", "PYTORCH_", "RANK_TABLE_FILE", "STREAMS_PER_DEVICE",
               "TASK_QUEUE_ENABLE", "TORCH_", "TRITON_", "V4_ASCEND_", "VLLM_")  # fmt: skip
SECRET_NAMES = ("KEY", "TOKEN", "SECRET", "PASSW", "CREDENTIAL", "AUTH")
MACHINE = (("npu-smi", "info"), ("nvidia-smi",), ("df", "-h"), ("uname", "-a"))
COMMAND_SECONDS = 20
DOCTOR_SECONDS = 180

README = """\
A support bundle of v4-ascend {version}, made {now}.

Replaced, the same thing always by the same alias: {counts}.
Loopback addresses are kept. A version of four numbers is taken for an address.
The logs of v4-ascend carry no prompts and no answers; those of another engine may, if it is told
to log requests. Look through the files before you send them.
"""


@dataclass(frozen=True)
class Wanted:
    """What to pack: a deployment's name, its topology file, or neither."""

    name: str | None
    topology: Path | None


def redactor_for(plan: Plan | None, folder: Path | None) -> Redactor:
    """Return one that knows the secrets and names of this machine and of the plan."""
    secrets = [v for k, v in os.environ.items() if _is_secret(k)]
    secrets += plan.api_keys if plan else ()
    secrets += _link_secrets(folder) if folder else ()
    token = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "token"
    if token.is_file():
        secrets.append(token.read_text(encoding="utf-8").strip())
    hosts = {
        socket.gethostname(),
        socket.getfqdn(),
        *({r.host for r in plan.ranks} if plan else ()),
    }
    public = {urlsplit(e.source).hostname or "" for e in all_entries()}
    return Redactor(secrets, hosts, {getpass.getuser()}, public)


def _is_secret(name: str) -> bool:
    return any(word in name.upper() for word in SECRET_NAMES)


def _link_secrets(folder: Path) -> list[str]:
    """Return what ranks and front know each other by."""
    file = folder / "link.json"
    if not file.exists():
        return []
    values = json.loads(file.read_text(encoding="utf-8")).values()
    return [v for v in values if isinstance(v, str) and "://" not in v]


def members(wanted: Wanted) -> Iterator[tuple[str, str]]:
    """Yield name and text of each file, not yet redacted."""
    yield "versions.json", json.dumps(_versions(), indent=2)
    yield "environment.txt", "".join(f"{k}={v}\n" for k, v in sorted(_environment().items()))
    for command in MACHINE:
        if shutil.which(command[0]):
            yield f"machine/{command[0]}.txt", _output(command, COMMAND_SECONDS)
    if find_spec("v4_ascend.deploy.doctor") is not None:
        doctor = (sys.executable, "-m", "v4_ascend", "doctor")
        yield "doctor.txt", _output(doctor, DOCTOR_SECONDS)
    if wanted.topology is not None:
        yield "topology.yaml", wanted.topology.read_text(encoding="utf-8", errors="replace")
    if wanted.name is not None:
        yield from _of_deployment(wanted.name)


def _of_deployment(name: str) -> Iterator[tuple[str, str]]:
    logs, plan = of_deployment(name)
    if plan is not None:
        facts = plan.model_dump(mode="json") | {"api_keys": ["secret"] * len(plan.api_keys)}
        yield "plan.json", json.dumps(facts, indent=2)
    yield "status.json", json.dumps(_status(name), indent=2)
    findings = look_through(logs, plan)
    verdict = judge(findings.sorted())
    untimed = findings.files_without_time
    yield "explanation.txt", "\n".join(verdict_lines(verdict, plan, untimed)) + "\n"
    for log in logs:
        yield f"logs/{log.name}", _log(log)


def _log(file: Path) -> str:
    size = file.stat().st_size
    with file.open("rb") as f:
        if size <= LOG_BYTES:
            return f.read().decode(errors="replace")
        head = f.read(LOG_BYTES // 2)
        f.seek(-(LOG_BYTES // 2), os.SEEK_END)
        tail = f.read()
    # Whole lines: half a secret would not be known as one.
    head, tail = head[: head.rfind(b"\n") + 1], tail[tail.find(b"\n") + 1 :]
    left_out = f"... {size - len(head) - len(tail):,} bytes left out ...\n"
    return head.decode(errors="replace") + left_out + tail.decode(errors="replace")


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"v4-ascend": __version__, "python": sys.version}
    found |= {"platform": platform.platform(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k.startswith(ENVIRONMENT) and not _is_secret(k)}


def _output(command: tuple[str, ...], seconds: int) -> str:
    """Return what a command says, or why it says nothing."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"{' '.join(command)}: no end after {seconds} s\n"
    return f"{done.stdout.decode(errors='replace')}\nexit code {done.returncode}\n"


def _status(name: str) -> dict[str, object]:
    import httpx

    if (found := find(name)) is None:
        return {"runs": False}
    try:
        ready = httpx.get(f"{found.url}/ready", timeout=5).json()
        ranks = httpx.get(f"{found.url}/ranks", timeout=5).json()
    except (httpx.TransportError, ValueError) as e:
        return {"runs": True, "answer": f"{type(e).__name__}: {e}"}
    return {"runs": True, "ready": ready, "ranks": ranks}


def write(wanted: Wanted, out: Path) -> dict[str, int]:
    """Write the bundle, readable by its owner alone; return how many things were replaced.

    Raises:
        ConfigError: the deployment has no logs.
    """
    folder = latest(wanted.name) if wanted.name else None
    plan = of_deployment(wanted.name)[1] if wanted.name else None
    redactor = redactor_for(plan, folder)
    half = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with (
            os.fdopen(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as f,
            tarfile.open(fileobj=f, mode="w:gz") as tar,
        ):
            for name, text in members(wanted):
                _put(tar, redactor.text(name), redactor.text(text))
            counts = redactor.counts
            said = ", ".join(f"{n} of kind {kind}" for kind, n in counts.items()) or "nothing"
            now = datetime.now(UTC).isoformat(timespec="seconds")
            _put(tar, "README.txt", README.format(version=__version__, now=now, counts=said))
        half.replace(out)
    finally:
        half.unlink(missing_ok=True)
    return counts


def _put(tar: tarfile.TarFile, name: str, text: str) -> None:
    data = text.encode()
    info = tarfile.TarInfo(f"v4-ascend-support/{name}")
    info.size, info.mode, info.mtime = len(data), 0o600, int(datetime.now(UTC).timestamp())
    tar.addfile(info, io.BytesIO(data))
