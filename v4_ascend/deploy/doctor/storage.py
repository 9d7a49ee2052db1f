"""Storage: the checkpoint is there, the same everywhere, and logs have room."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from v4_ascend.deploy.doctor.finding import Finding, Host, odd_ones

MIN_FREE = 2**30  # ours: logs, flight records and compiled kernels of a day
SHORT = 12


def checkpoint(host: Host) -> Iterator[Finding]:
    """The checkpoint can be read here."""
    found = host.facts.checkpoint
    if found is None:
        return
    if found.problem:
        yield host.says(
            "blocker",
            "storage.checkpoint",
            found.problem,
            expected="model.checkpoint, at the same path on every host",
            next_step="copy or mount it there; v4-ascend inspect CKPT looks at it",
        )
    else:
        yield host.says("ok", "storage.checkpoint", f"{found.n_bytes / 1e9:,.1f} GB of weights")


def disk(host: Host) -> Iterator[Finding]:
    """The folder of the deployments has room."""
    state = host.facts.spaces.get("state")
    if state is None:
        return
    is_full = state.free < MIN_FREE
    yield host.says(
        "blocker" if is_full else "ok",
        "storage.disk",
        f"{state.free / 2**30:,.2f} GiB are free for logs and state",
        value=state.free,
        expected="1 GiB",
        next_step="df -h; XDG_STATE_HOME names another place",
        source="ours, see MIN_FREE in storage.py",
    )


def same_checkpoint(hosts: Sequence[Host]) -> Iterator[Finding]:
    """All hosts have the same tensors in the same files."""

    def digest(host: Host) -> str:
        found = host.facts.checkpoint
        return found.digest[:SHORT] if found is not None else ""

    if odd := odd_ones(hosts, digest):
        yield Finding(
            "blocker",
            "all hosts",
            "storage.same-checkpoint",
            f"the checkpoints differ: {odd}",
            odd,
            "the same config, index and headers",
            "rsync -c CKPT/ HOST:CKPT/",
            "ours: other shards load as another model",
        )


CHECKS = (checkpoint, disk)
ACROSS = (same_checkpoint,)
