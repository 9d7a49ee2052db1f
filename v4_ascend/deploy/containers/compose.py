"""A compose file for each host. Every container is on its host's network: HCCL and NCCL need it."""

from __future__ import annotations

import os
from typing import Any

from v4_ascend import __version__
from v4_ascend.deploy.containers.platforms import platforms
from v4_ascend.deploy.containers.target import (
    PLAN,
    SECRET,
    STATE,
    STOP_SECONDS,
    Health,
    Process,
    Target,
)
from v4_ascend.deploy.containers.written import Written, as_yaml
from v4_ascend.deploy.vllm.key import VARIABLE, only_key
from v4_ascend.deploy.vllm.show import ASKED

KEYS = "keys.env"  # API keys of engine vllm, which reads them from its environment


def compose_files(target: Target) -> Written:
    """Return each host's file, the plan they share, and how they are started."""
    name = target.topology.name
    texts = {}
    for i, host in enumerate(target.hosts):
        services = {p.name: _service(target, p) for p in target.processes if p.host == host}
        texts[f"{host}/compose.yaml"] = _head(i, host, target) + as_yaml(
            {"name": name, "services": services}
        )
    private = {"plan.json": target.plan_text} if target.plan is not None else {}
    if key := _key(target):
        private[KEYS] = f"{VARIABLE}={key}\n"
    return Written(texts, private, tuple(_steps(target)), has_secret=target.plan is not None)


def _steps(target: Target) -> list[str]:
    steps = []
    if target.plan is not None and target.topology.container.image is None:
        build = target.platform.build_command(target.image)
        steps.append(f"{build}  # on every host, in a clone of the repository")
    others = target.hosts[1:]
    steps += [f"scp -rp {{out}} {h}:{{parent}}/  # as its owner alone can read it" for h in others]
    steps += [
        f"docker compose --file {{out}}/{h}/compose.yaml up --detach  # on {h}"
        for h in target.hosts
    ]
    return steps


def _head(index: int, host: str, target: Target) -> str:
    dated = platforms().dated
    return (
        f"# {target.topology.name}, {host} (host {index} of {len(target.hosts)}), by v4-ascend "
        f"{__version__}\n# Devices, mounts and images: {target.platform.family} of "
        f"configs/containers.yaml, {dated}, with its sources there.\n"
    )


def _key(target: Target) -> str | None:
    return only_key(target.topology) if target.plan is None else None


def _service(target: Target, p: Process) -> dict[str, Any]:
    entrypoint, command = target.platform.started(p.argv)
    service: dict[str, Any] = {
        "image": target.image,
        "entrypoint": [_literal(a) for a in entrypoint],
        "command": [_literal(a) for a in command],
        "environment": {k: _variable(v) for k, v in p.env.items()} | _address(target),
    }
    if _key(target):
        service["env_file"] = [f"../{KEYS}"]
    service |= {
        "network_mode": "host",
        "init": True,  # ends and reaps what a rank leaves
        "restart": "unless-stopped",
        "stop_grace_period": f"{STOP_SECONDS}s",
        "security_opt": ["no-new-privileges:true"],
        "ulimits": {"memlock": {"soft": -1, "hard": -1}, "nofile": {"soft": 65536, "hard": 65536}},
        "volumes": [*_own_files(target), *_shared_paths(target)],
    }
    service |= _user(target) | _memory(target, p) | _devices(target, p)
    if p.health is not None:
        service["healthcheck"] = _health(target, p.health)
    if p.after:
        service["depends_on"] = {name: {"condition": "service_healthy"} for name in p.after}
    return service


def _user(target: Target) -> dict[str, Any]:
    """Who runs inside: where the device allows it whoever can read the files written here."""
    if target.platform.user.value == "root":
        return {"tmpfs": [f"{STATE}:mode=700"]}
    uid, gid = os.getuid(), os.getgid()
    own = {"user": f"{uid}:{gid}", "tmpfs": [f"{STATE}:mode=700,uid={uid},gid={gid}"]}
    return own | {"cap_drop": ["ALL"]}


def _memory(target: Target, p: Process) -> dict[str, Any]:
    """Share memory: with all of the host where several containers hold its devices together."""
    together = [q for q in target.processes if q.host == p.host and q.devices]
    if len(together) > 1:
        return {"ipc": "host", "pid": "host"}
    return {"shm_size": f"{target.platform.shared_memory.gib}g"}


def _devices(target: Target, p: Process) -> dict[str, Any]:
    if not p.devices:
        return {}
    if target.platform.gpu_driver is not None:
        ids = [str(n) for n in p.devices]
        driver = target.platform.gpu_driver.value
        gpus = {"driver": driver, "device_ids": ids, "capabilities": ["gpu"]}
        return {"deploy": {"resources": {"reservations": {"devices": [gpus]}}}}
    found = target.platform.device_files(p.devices)
    return {"devices": [f"{d}:{d}" for d in found]} if found else {}


def _address(target: Target) -> dict[str, None]:
    """Of this host alone: where its name is no address the others reach, who starts it says so."""
    return {"V4_ASCEND_ADDRESS": None} if target.plan is not None else {}


def _variable(value: str | None) -> str | None:
    """Keep what asks whoever starts it, and let nothing else be read as such."""
    return value if value is None or value in ASKED.values() else _literal(value)


def _literal(text: str) -> str:
    return text.replace("$", "$$")


def _health(target: Target, health: Health) -> dict[str, Any]:
    ask = f"import urllib.request as u; u.urlopen('{health.url}{health.path}')"
    return {
        "test": ["CMD", "python3", "-c", ask],
        "interval": "10s",
        "timeout": "5s",
        "retries": 3,
        "start_period": f"{target.timeout_s}s",
    }


def _own_files(target: Target) -> list[dict[str, Any]]:
    if target.plan is None:
        return []
    return [
        _bind("../plan.json", f"{PLAN}/plan.json"),
        _bind("../secret", f"{SECRET}/secret"),
    ]


def _shared_paths(target: Target) -> list[dict[str, Any]]:
    paths = [m.value for m in target.platform.mounts]
    return [_bind(path, path) for path in (*paths, *target.mounted_paths())]


def _bind(source: str, inside: str) -> dict[str, Any]:
    """Mount a path that must be there: docker would make an empty folder of one that is not."""
    return {
        "type": "bind",
        "source": source,
        "target": inside,
        "read_only": True,
        "bind": {"create_host_path": False},
    }
