"""The ranks of another host: started over ssh, ended when who started them is gone.

The first line of standard input says what to run (`Bundle`). After it a line comes every second;
once none comes, whatever happened to the other end, nothing of ours is left here.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from types import FrameType

import msgspec

from v4_ascend import __version__
from v4_ascend.config.private import private_folder
from v4_ascend.deploy.state import state_root
from v4_ascend.deploy.torchrun import torchrun
from v4_ascend.errors import DeployError, V4AscendError
from v4_ascend.runtime.link import Address
from v4_ascend.supernode.plan import Plan

BEAT_SECONDS = 1.0
GIVE_UP_SECONDS = 15.0
KILL_SECONDS = 5.0
# Settings of the deploying shell that hold for the ranks of all hosts.
PASSED_ON = ("V4_ASCEND_", "OMP_", "HCCL_", "ASCEND_", "NCCL_", "GLOO_", "XDG_STATE_HOME")
OWN = ("V4_ASCEND_HOST", "V4_ASCEND_ADDRESS", "V4_ASCEND_NIC")  # of one host alone


def passed_on() -> dict[str, str]:
    """Return what of this environment other hosts get too."""
    return {k: v for k, v in os.environ.items() if k.startswith(PASSED_ON) and k not in OWN}


class Bundle(msgspec.Struct, frozen=True):
    """What a host must know to run its ranks."""

    version: str
    host: str
    folder: str
    plan: str
    link: dict[str, str]
    meeting: str
    env: dict[str, str]

    @classmethod
    def of(cls, plan: Plan, host: str, folder: str, address: Address, meeting: str) -> Bundle:
        """Gather it on the deploying host; `folder` is the name of the deployment's there."""
        env = passed_on()
        return cls(
            __version__,
            host,
            folder,
            plan.model_dump_json(),
            link_of(address),
            meeting,
            env,
        )


def main() -> None:
    """Run the ranks until they end, or the other end does; exit with their code."""
    try:
        bundle = msgspec.json.decode(sys.stdin.buffer.readline(), type=Bundle)
        if bundle.version != __version__:
            raise DeployError(
                f"{bundle.host}: v4-ascend {__version__} here, {bundle.version} deploys"
            )
        os.environ.update(bundle.env)
        raise SystemExit(_run(bundle))
    except (V4AscendError, msgspec.DecodeError, OSError) as e:
        raise SystemExit(f"error: {e}") from e


def _run(bundle: Bundle) -> int:
    plan = Plan.model_validate_json(bundle.plan)
    command, env = ranks_of(plan, bundle.host, bundle.folder, bundle.link, bundle.meeting)
    return hold(command, env)


def ranks_of(
    plan: Plan, host: str, folder_name: str, link: dict[str, str], meeting: str
) -> tuple[list[str], dict[str, str]]:
    """Write what a host's ranks read, and return their command and its environment.

    They end with this process, as they do with the front on its own host.
    """
    folder = state_root() / f"{folder_name}.{host}"  # hosts may share their home folders
    private_folder(folder)
    Address(**link, followed_pid=os.getpid()).write(folder)
    plan.write(folder / "plan.json")
    return torchrun(plan, host, folder, meeting)


def link_of(address: Address) -> dict[str, str]:
    """Return what another host must know of the front."""
    return {k: str(v) for k, v in asdict(address).items() if k != "followed_pid"}


def hold(command: list[str], env: dict[str, str]) -> int:
    """Run a command until it ends, is told to, or no line comes any more; return its exit code."""
    told = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal told
        told = True

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, on_signal)
    held = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=env, start_new_session=True)
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
            heard = time.monotonic()
            while not told and held.poll() is None:
                if selector.select(timeout=0.2):
                    if not os.read(sys.stdin.fileno(), 4096):
                        break
                    heard = time.monotonic()
                if time.monotonic() - heard > GIVE_UP_SECONDS:
                    break
    finally:
        stop(held, KILL_SECONDS)
    return held.returncode


def stop(process: subprocess.Popen[bytes], patience: float) -> None:
    """End a process by SIGTERM; after `patience` seconds, or once it has ended, its session too."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    end_session(process)


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a process and its session: workers may outlive who started them."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    main()
