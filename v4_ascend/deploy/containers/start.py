"""How a pod starts vLLM: a script finds what only the pod knows, then becomes the command.

vLLM takes from flags what `v4-ascend host` finds out: which DP ranks a host has, and the first
host's address. Sources: vllm-ascend docs, LeaderWorkerSet scripts (address and interface of the
pod, the leader's address by its name); vLLM docs, data parallel deployment (start rank).
"""

from __future__ import annotations

import hashlib
import shlex

from v4_ascend.deploy.containers.target import Process, Target
from v4_ascend.deploy.vllm.show import ASKED
from v4_ascend.errors import NotYetError

START, SCRIPT = "/run/v4-ascend/start", "start.sh"
OF_POD = ("--data-parallel-address", "--data-parallel-start-rank")  # what the script adds

HEAD = """\
#!/bin/bash
# start.sh --index|--other NUMBER FIRST COMMAND...: become COMMAND with what only a pod knows.
# NUMBER counts all pods from the first one, or with --other those behind it.
set -eu
pod=$2 first=$3
if [ "$1" = --other ]; then pod=$(($2 + 1)); fi
shift 3
"""
INTERFACE = """\
nic=$(python3 - <<'END'
import fcntl, os, socket, struct
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    for _, name in socket.if_nameindex():
        try:  # SIOCGIFADDR
            found = fcntl.ioctl(s, 0x8915, struct.pack("256s", name.encode()))[20:24]
        except OSError:
            continue
        if socket.inet_ntoa(found) == os.environ["V4_ASCEND_ADDRESS"]:
            print(name)
            break
END
)
: "${nic:?no interface has $V4_ASCEND_ADDRESS, the address of this pod}"
"""
ADDRESS = """\
if [ "$pod" = 0 ]; then
    address=$V4_ASCEND_ADDRESS
else
    by_name='import socket, sys; print(socket.gethostbyname(sys.argv[1]))'
    until address=$(python3 -c "$by_name" "$first" 2>/dev/null); do
        echo "waiting for the name $first"
        sleep 2
    done
fi
set -- "$@" --data-parallel-start-rank "$((pod * RANKS))" --data-parallel-address "$address"
"""


def script(target: Target) -> str:
    """Return the text of the script, the same for all pods.

    Raises:
        NotYetError: hosts whose commands differ by more than the script fills in.
    """
    parts = [HEAD]
    if names := [k for k, v in target.processes[0].env.items() if v == ASKED["{interface}"]]:
        parts += [INTERFACE, *(f"export {name}=$nic\n" for name in names)]
    if len(target.processes) > 1:
        parts.append(ADDRESS.replace("RANKS", str(_ranks_of_each(target))))
    entry = target.platform.entry
    become = f'/bin/bash -c {shlex.quote(entry.value)} "$@"' if entry else '"$@"'
    return "".join(parts) + f"exec {become}\n"


def command(target: Target, which: tuple[str, str], first: str) -> tuple[list[str], list[str]]:
    """Return what starts a pod, and what it is given: `which` is its number among them."""
    is_first = which == ("--index", "0")
    process = target.processes[0 if is_first else 1]
    return ["/bin/bash", f"{START}/{SCRIPT}"], [*which, first, *_common(process)]


def digest(target: Target) -> str:
    """Return what tells these pods from others."""
    said = [script(target), *(p.argv for p in target.processes), target.processes[0].env]
    return hashlib.sha256(repr(said).encode()).hexdigest()


def _common(process: Process) -> list[str]:
    """Return a command without what the script adds, no word of it a variable of the cluster."""
    words = iter(process.argv)
    kept = []
    for word in words:
        if word in OF_POD:
            next(words)
        else:
            kept.append(word.replace("$", "$$"))
    return kept


def _ranks_of_each(target: Target) -> int:
    """Return the DP ranks of a pod: pods of one template have as many, in their order."""
    starts = [_value(p, "--data-parallel-start-rank") for p in target.processes]
    n = _value(target.processes[0], "--data-parallel-size-local")
    others = {(tuple(_common(p)), tuple(sorted(p.env.items()))) for p in target.processes[1:]}
    if starts != [i * n for i in range(len(starts))] or len(others) > 1:
        t = target.topology
        raise NotYetError(
            t.where("layout"),
            f"layout: engine vllm with launcher kubernetes wants as many DP ranks on every host; "
            f"they begin at {', '.join(map(str, starts))}",
        )
    return n


def _value(process: Process, flag: str) -> int:
    return int(process.argv[process.argv.index(flag) + 1])
