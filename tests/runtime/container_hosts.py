"""Two hosts that start what compose files and pods say, as docker and a kubelet would.

A host is a network namespace. A container is a process in it with exactly the command, the
variables and the mounts that are written, in a mount namespace of its own; PATH, PYTHONPATH and a
number of threads stand for an image. Drivers that a host of devices has, and CANN's scripts of an
image, are empty files here. Users, limits and devices of a container are not part of it.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import yaml
from test_two_hosts import ip

ROOT = Path(__file__).parents[2]
HOSTS = {"v4c-one": "10.79.0.1", "v4c-two": "10.79.0.2"}
FRONT = "10.80.0.2"  # of the first host, towards the test
IMAGE = {
    "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin:/usr/sbin:/sbin",
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",  # as vllm-ascend's image has it; the hosts share two cores
}


def lay_cables():
    """Join the hosts with each other, and the first one with the test."""
    remove()
    for name in HOSTS:
        ip("netns", "add", name)
    one, two = HOSTS
    ip("link", "add", "v4c0", "netns", one, "type", "veth", "peer", "v4c0", "netns", two)
    ip("link", "add", "v4c-test", "type", "veth", "peer", "front0", "netns", one)
    ip("addr", "add", "10.80.0.1/24", "dev", "v4c-test")
    ip("link", "set", "v4c-test", "up")
    ip("-n", one, "addr", "add", f"{FRONT}/24", "dev", "front0")
    ip("-n", one, "link", "set", "front0", "up")
    for name, address in HOSTS.items():
        ip("-n", name, "addr", "add", f"{address}/24", "dev", "v4c0")
        for device in ("lo", "v4c0"):
            ip("-n", name, "link", "set", device, "up")


def remove():
    """Take the hosts away with all that runs on them."""
    for name in HOSTS:
        for pid in pids(name):
            os.kill(pid, signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def pids(name):
    """Whatever runs on a host."""
    command = ["ip", "netns", "pids", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return [int(pid) for pid in done.stdout.split()]


class Container:
    """A process with what a container of this command, these variables and mounts would have."""

    def __init__(self, host, command, env, mounts, log, healthy=None):
        """Start it; a mount is (source, place inside), and source None is an empty folder.

        `healthy` asks whether it is: a command of its own, or the URL of a probe.
        """
        self.host, self.log, self._healthy = host, log, healthy
        lines = ["set -e", "mount -t tmpfs -o mode=755 tmpfs /run", *_drivers(mounts)]
        for source, inside in mounts:
            place, from_ = shlex.quote(str(inside)), shlex.quote(str(source))
            if source is None:
                if str(inside).startswith("/run/"):  # others, such as /dev/shm, are there
                    lines += [f"mkdir -p {place}", f"mount -t tmpfs -o mode=700 tmpfs {place}"]
                continue
            if str(inside).startswith("/run/"):
                make = "mkdir -p" if Path(source).is_dir() else "install -D /dev/null"
                lines.append(f"{make} {place}")
            lines += [f"mount --bind {from_} {place}", f"mount -o remount,ro,bind {place}"]
        variables = [f"{k}={v}" for k, v in (IMAGE | env).items()]
        lines.append(shlex.join(["exec", "env", "-i", *variables, *command]))
        shell = ["ip", "netns", "exec", host, "sh", "-c", "\n".join(lines)]
        with log.open("wb") as out:
            self.process = subprocess.Popen(shell, stdout=out, stderr=subprocess.STDOUT)

    def is_healthy(self):
        """Ask as a healthcheck or a readiness probe would."""
        if isinstance(self._healthy, str):
            words = ["curl", "-sf", "-o", "/dev/null", "-m", "5", self._healthy]
        else:
            words = ["env", f"PATH={IMAGE['PATH']}", *self._healthy]
        done = subprocess.run(["ip", "netns", "exec", self.host, *words], capture_output=True,
                              timeout=30, check=False)  # fmt: skip
        return done.returncode == 0

    def said(self):
        return self.log.read_text()

    def kill(self):
        """Kill all of it at once, as when its machine loses power."""
        for pid in pids(self.host):
            os.kill(pid, signal.SIGKILL)
        self.process.wait(10)


def _drivers(mounts):
    """Return how to make what a host of devices has and this machine lacks, in layers above it."""
    lacks = {Path(s): Path(inside) for s, inside in mounts if s and not Path(s).exists()}
    if not lacks:
        return []
    made = list(CANN)
    made += [f"{p}/" if p.name in FOLDERS else str(p) for p in map(Path, lacks)]
    lines = []
    for i, top in enumerate(LAYERED):
        if not any(p.startswith(f"{top}/") for p in made):
            continue
        upper, work = f"/run/layers/{i}/upper", f"/run/layers/{i}/work"
        lines.append(f"mkdir -p {upper} {work}")
        options = f"lowerdir={top},upperdir={upper},workdir={work}"
        lines.append(f"mount -t overlay overlay -o {options} {top}")
    for path in made:
        lines.append(f"mkdir -p {path}" if path.endswith("/") else f"install -D /dev/null {path}")
    return lines


LAYERED = ("/usr/local", "/etc", "/lib", "/usr/bin")
FOLDERS = ("dcmi", "lib64", "driver", "hixlep")
CANN = (
    "/usr/local/Ascend/ascend-toolkit/set_env.sh",
    "/usr/local/Ascend/nnal/atb/set_env.sh",
)


def from_compose(file, host, hosts_file, log, shell=()):
    """Start the one service of a compose file; `shell` are variables of who types the command."""
    given = dict(shell)

    def interpolated(text):
        found = re.sub(r"\$\$|\$\{(\w+):\?[^}]*\}", lambda m: given[m[1]] if m[1] else "$", text)
        assert "${" not in found, found
        return found

    ((_, service),) = yaml.safe_load(file.read_text())["services"].items()
    mounts = [(hosts_file, "/etc/hosts")]  # a container on the host's network has the host's
    for volume in service["volumes"]:
        assert (volume["type"], volume["read_only"]) == ("bind", True)
        source = Path(os.path.normpath(file.parent / volume["source"]))
        mounts.append((source, volume["target"]))
    mounts += [(None, t.partition(":")[0]) for t in service["tmpfs"]]
    command = [interpolated(w) for w in service["entrypoint"] + service["command"]]
    env = {k: interpolated(v) for k, v in service["environment"].items() if v is not None}
    for name in service.get("env_file", []):
        lines = Path(os.path.normpath(file.parent / name)).read_text().splitlines()
        env |= dict(line.split("=", 1) for line in lines)
    test = service.get("healthcheck", {}).get("test", [None])
    return Container(host, command, env, mounts, log, test[1:])


def from_pod(template, config_maps, secrets, given, host, hosts_file, folder):
    """Start the one container of a pod; `given` are variables that its controller sets."""
    (container,) = template["spec"]["containers"]
    fields = {"status.podIP": HOSTS[host]}
    resources = container.get("resources", {}).get("limits", {})
    fields |= {f"metadata.annotations['{name}']": "all" for name in resources}  # the scheduler's
    env = dict(given)
    for entry in container["env"]:
        source = entry.get("valueFrom", {})
        if "fieldRef" in source:
            env[entry["name"]] = fields[source["fieldRef"]["fieldPath"]]
        elif "secretKeyRef" in source:
            key = source["secretKeyRef"]
            env[entry["name"]] = secrets[key["name"]][key["key"]]
        else:
            env[entry["name"]] = entry["value"].replace("$$", "$")

    def expanded(word):
        return re.sub(r"\$\$|\$\((\w+)\)", lambda m: env[m[1]] if m[1] else "$", word)

    sources = {}
    for volume in template["spec"]["volumes"]:
        source, name = folder / volume["name"], volume["name"]
        if "configMap" in volume:
            texts = config_maps[volume["configMap"]["name"]]
        elif "secret" in volume:
            secret = volume["secret"]
            texts = {i["path"]: secrets[secret["secretName"]][i["key"]] for i in secret["items"]}
        else:
            sources[name] = volume["hostPath"]["path"] if "hostPath" in volume else None
            continue
        source.mkdir(parents=True, exist_ok=True)
        for file_name, text in texts.items():
            (source / file_name).write_text(text)
            if "secret" in volume:
                (source / file_name).chmod(volume["secret"]["defaultMode"])
        sources[name] = source
    mounts = [(sources[m["name"]], m["mountPath"]) for m in container["volumeMounts"]]
    command = [expanded(w) for w in container["command"] + container["args"]]
    probe, ports = container.get("readinessProbe") or container.get("startupProbe"), {}
    url = None
    if probe is not None:
        ports = {p["name"]: p["containerPort"] for p in container["ports"]}
        get = probe["httpGet"]
        url = f"http://{HOSTS[host]}:{ports[get['port']]}{get['path']}"
    return Container(host, command, env, [(hosts_file, "/etc/hosts"), *mounts], folder / "log", url)
