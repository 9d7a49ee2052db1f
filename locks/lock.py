"""Pin every package of the CPU set-up, with the hashes its registry publishes: `make lock`.

pip resolves for each platform in turn, and installs nothing. torch is not in the lock: what the
registry has under its name is the build for CUDA, and each kind of device has a build of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

HERE = Path(__file__).parent
LOCK = HERE / "cpu.txt"
PLATFORMS = [(python, machine) for python in ("3.11", "3.12") for machine in ("x86_64", "aarch64")]
GLIBC = 35  # 2.35, of Ubuntu 22.04, which the Ascend images have
HEADER = """\
# Made by `make lock`: all that `make install` brings, besides torch.
# Hashes of wheels for Python {pythons}, Linux on {machines}.
"""


def wanted() -> list[str]:
    """Return what pyproject asks for, and what torch needs, without torch itself."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    lines = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    lines += project["project"]["optional-dependencies"]["dev"]
    lines += [r for r in requires("torch") or () if "extra ==" not in r]
    return [r for r in lines if not r.startswith("torch>")]


def resolved(lines: list[str], python: str, machine: str) -> dict[str, tuple[str, str]]:
    """Return version and SHA-256 of each package that pip would install on a platform."""
    command = [sys.executable, "-m", "pip", "install", "--isolated", "--quiet", "--dry-run"]
    command += ["--ignore-installed", "--report", "-", "--only-binary", ":all:", "--target", "none"]
    command += ["--python-version", python, "--implementation", "cp"]
    tags = [f"manylinux_2_{minor}" for minor in range(GLIBC, 4, -1)]
    for tag in (*tags, "manylinux2014", "manylinux2010", "manylinux1", "linux"):
        command += ["--platform", f"{tag}_{machine}"]
    # Neither this machine's settings nor the packages that lie on it: what everybody gets.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PIP_") or k == "PIP_CERT"}
    env["PIP_CONFIG_FILE"] = os.devnull
    done = subprocess.run([*command, *lines], env=env, stdout=subprocess.PIPE, check=True)
    found = {}
    for item in json.loads(done.stdout)["install"]:
        name = item["metadata"]["name"].lower().replace("_", "-").replace(".", "-")
        digest = item["download_info"]["archive_info"]["hashes"]["sha256"]
        found[name] = (item["metadata"]["version"], digest)
    return found


def main() -> None:
    """Write the lock: all packages in order of their names, each with all its hashes."""
    versions: dict[str, str] = {}
    hashes: dict[str, set[str]] = {}
    for python, machine in PLATFORMS:
        # Platforms agree on versions: what the first one chose holds for the others.
        pins = [f"{name}=={version}" for name, version in versions.items()]
        for name, (version, digest) in resolved([*wanted(), *pins], python, machine).items():
            versions.setdefault(name, version)
            hashes.setdefault(name, set()).add(digest)
    pythons, machines = (" and ".join(dict.fromkeys(x)) for x in zip(*PLATFORMS, strict=True))
    text = HEADER.format(pythons=pythons, machines=machines)
    for name in sorted(versions):
        lines = [f"{name}=={versions[name]}", *(f"--hash=sha256:{h}" for h in sorted(hashes[name]))]
        text += " \\\n    ".join(lines) + "\n"
    LOCK.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
