"""Virtual environments for vendor packages that cannot share one with the rest.

triton-ascend is a package named ``triton``, MindSpore is built for numpy 1, and torch_npu
changes every ``import torch``. Each gets an environment of its own, layered over the one we
run in: only the pinned packages are installed, everything else is seen through a path file.

    python -m v4_ascend.emulation.environment npu     # builds it if need be, prints its python
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from v4_ascend.errors import ConfigError, V4AscendError

# Exact versions, installed without their dependencies: what is missing here, the lower
# environment has.
PINS: dict[str, tuple[str, ...]] = {
    "npu": ("torch_npu==2.13.0",),
    "triton-ascend": (
        "triton-ascend==3.2.0",
        "numpy==2.2.6",  # its interpreter needs numpy<2.3
        "pybind11==3.0.1",
    ),
    "mindspore": (
        "mindspore==2.10.0",
        "numpy==1.26.4",  # newer ones are accepted by its metadata and fail in its binary
        "asttokens==3.0.1",
        "astunparse==1.6.3",
        "dill==0.4.0",
        "pillow==12.0.0",
        "protobuf==7.34.1",
        "psutil==7.1.3",
        "scipy==1.13.1",
        "six==1.17.0",
        "wheel==0.45.1",
    ),
}

LAYOUT = "2"  # changes when environments are built another way


def cache_root() -> Path:
    """Return the folder of everything that can be made again."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "v4-ascend"


def environment(name: str) -> Path:
    """Return the interpreter of an environment, building it if it is not there.

    Raises:
        ConfigError: no environment of that name.
        V4AscendError: pip could not install what it needs.
    """
    if name not in PINS:
        raise ConfigError("environment", f"no {name!r}; there is {', '.join(PINS)}")
    below = sysconfig.get_paths()["purelib"]
    lock = "\n".join((LAYOUT, sys.version, below, *PINS[name]))
    digest = hashlib.sha256(lock.encode()).hexdigest()[:12]
    folder = cache_root() / "venvs" / f"{name}-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)  # two test runs may want it at once
        if not (folder / "complete").exists():
            _build(name, folder, below)
    return folder / "bin" / "python"


def _build(name: str, folder: Path, below: str) -> None:
    print(f"building environment {name} in {folder}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    here = next((folder / "lib").glob("python*")) / "site-packages"
    # Through site, so that an editable install below works here too.
    (here / "below.pth").write_text(f"import site; site.addsitedir({below!r})\n", encoding="utf-8")
    install = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "--no-deps"]
    # pip sees the packages below too, and would take one there for the pinned one.
    install += ["--ignore-installed", *PINS[name]]
    # torch_npu is no part of the environment yet, and needs its libraries once it is.
    quiet = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run(install, env=quiet, capture_output=True, text=True, check=False)
    if done.returncode:
        raise V4AscendError(f"environment {name}: pip failed:\n{done.stderr[-2000:]}")
    (folder / "complete").touch()


def reenter(name: str) -> None:
    """Run this very command again in an environment, in place of this process."""
    python = str(environment(name))
    quiet = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    os.execve(python, [python, "-m", "v4_ascend", *sys.argv[1:]], quiet)


def main() -> None:
    """Print the interpreter of the environment named on the command line."""
    try:
        print(environment(sys.argv[1] if len(sys.argv) == 2 else ""))
    except V4AscendError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(e.exit_code)


if __name__ == "__main__":
    main()
