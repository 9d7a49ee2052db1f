"""A copy-on-write root of this machine, in which a Dockerfile's RUN lines are executed.

It stands in for a base image: it has Python, torch and a compiler, as the real ones do. What is
written lands in a folder of the test. `apt-get` is one that notes what it is asked for, as this
machine has it already.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from dockerfiles import expand

ROOT = Path(__file__).parent.parent
REASON = "RUN lines are executed as root, with mount namespaces and overlayfs"
NOTES = "/stand-in/apt.log"
MISSING = ("rich", "msgspec")  # of what we need, what the stand-in image has not
MOUNT = """\
set -e
mount -t overlay overlay -o "lowerdir=/,upperdir=$UPPER,workdir=$WORK" "$MERGED"
for name in dev proc sys; do mount --rbind "/$name" "$MERGED/$name"; done
"""


class StandIn:
    """One image that is being built."""

    def __init__(self, folder):
        self.folder = folder
        self.upper, self.work, self.merged = (folder / n for n in ("upper", "work", "merged"))
        for path in (self.upper, self.work, self.merged):
            path.mkdir(parents=True)
        bin_ = self.upper / "stand-in" / "bin"
        bin_.mkdir(parents=True)
        scripts = {"apt-get": f'echo "$@" >> {NOTES}'}
        # Compilers that do not optimise: it is the line that is tried, not the kernels' speed.
        scripts |= {c: f'exec /usr/bin/{c} "$@" -O0' for c in ("cc", "gcc", "c++", "g++")}
        for name, line in scripts.items():
            (bin_ / name).write_text(f"#!/bin/sh\n{line}\n")
            (bin_ / name).chmod(0o755)
        self.env = {
            "PATH": f"/stand-in/bin:{Path(sys.prefix) / 'bin'}:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "LANG": "C.UTF-8",
        } | {k: v for k, v in os.environ.items() if k.startswith("PIP_")}
        self.workdir = "/"

    def run(self, command, mounts=(), user="root"):
        """Run a command, a shell's line or words, and return what became of it."""
        lines = [MOUNT]
        for source, target in mounts:
            there = shlex.quote(f"{self.merged}{target}")
            lines.append(f"mkdir -p {there}; mount --bind {shlex.quote(str(source))} {there}")
        words = ["/bin/sh", "-c", command] if isinstance(command, str) else command
        inside = ["sh", "-c", 'cd "$1"; shift; exec "$@"', "sh", self.workdir, *words]
        own = {} if user == "root" else {"HOME": f"/home/{user}"}
        env = [f"{k}={v}" for k, v in (self.env | own).items()]
        chroot = ["chroot", f"--userspec={user}:", str(self.merged), "env", "-i", *env, *inside]
        lines.append(f"exec {shlex.join(chroot)}")
        paths = {"UPPER": self.upper, "WORK": self.work, "MERGED": self.merged}
        return subprocess.run(
            ["unshare", "--mount", "sh", "-c", "\n".join(lines)],
            env=os.environ | {k: str(v) for k, v in paths.items()},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )

    def prepare(self):
        """Take away what the real base has not: our package, some of what it needs, users."""
        keep = "for f in passwd group shadow gshadow; do"
        keep += " awk -F: '$3 < 1000 || $3 == 65534 || NF < 3' /etc/$f > /etc/$f.new &&"
        keep += " cat /etc/$f.new > /etc/$f && rm /etc/$f.new; done"
        away = " ".join(("v4-ascend", *MISSING))
        # Python may lie in root's home, which a real base's does not.
        done = self.run(f"{keep} && chmod 755 /root && python3 -m pip uninstall -q -y {away}")
        assert done.returncode == 0, done.stderr

    def build(self, stage, args, context, others):
        """Carry out a stage's instructions; `others` are the stages it may mount from."""
        for i in stage.instructions:
            if i.op == "ARG":
                name, _, default = i.rest.partition("=")
                self.env[name] = args.get(name, default)
            elif i.op == "ENV":
                name, _, value = i.rest.partition("=")
                self.env[name] = expand(value, {"ASCEND_TOOLKIT_HOME": "/none"} | self.env)
            elif i.op == "WORKDIR":
                self.workdir = i.rest
                (self.upper / i.rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
            elif i.op == "COPY":
                assert i.rest == ". .", i.rest
                into = self.upper / self.workdir.lstrip("/")
                shutil.copytree(context, into, symlinks=True, dirs_exist_ok=True)
            elif i.op == "RUN":
                mounts = []
                for m in i.mounts:
                    base = others[m["from"]].upper if "from" in m else context
                    mounts.append((base / m["source"].lstrip("/"), m["target"]))
                done = self.run(i.command, mounts)
                said = f"{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
                assert done.returncode == 0, f"line {i.line}: RUN {i.command}\n{said}"


def is_possible(folder):
    """Say whether a stand-in can be made here."""
    if os.geteuid() or not shutil.which("unshare"):
        return False
    return StandIn(folder).run("true").returncode == 0


def context(folder):
    """Copy what a build sends: tracked files that .dockerignore lets through."""
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(is_sent, filter(None, tracked.stdout.split("\0"))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def is_sent(name):
    """Say whether .dockerignore lets a file through: the last pattern that fits decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        back, pattern = pattern.startswith("!"), pattern.lstrip("!")
        regex = re.escape(pattern).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
        if re.match(rf"{regex}(?:/.*)?\Z", name):
            sent = back
    return sent
