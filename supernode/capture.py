"""Which decode steps are captured as graphs: their sizes, or why there are none."""

from __future__ import annotations

from v4_ascend.config.topology import ParallelConfig, Topology


def why_no_graphs(
    t: Topology, parallel: ParallelConfig, backend: str, *, emulated: bool
) -> str | None:
    """Return why this deployment's steps cannot be captured, or None."""
    if t.engine != "native":
        return f"engine {t.engine} captures its own"
    if backend == "mindspore":
        return "MindSpore's operators exchange tensors with torch on the host"
    if emulated:
        return "an emulated NPU runs calls as they come and has no graphs"
    if t.runtime.kernels == "reference":
        return "references wait for the device to learn shapes"
    if parallel.world_size > 1:
        return (
            f"{parallel.world_size} ranks: how many rows go where is read on the host in every "
            "step, which a graph cannot"
        )
    if n := t.serve.n_draft_tokens:
        return f"{n} draft tokens: how many of them are right is read on the host"
    return None


def few_sizes(n_slots: int) -> tuple[int, ...]:
    """Return 1, 2, 4 and 8, or `n_slots`: of more sequences a CPU computes longer than it calls."""
    return (*(n for n in (1, 2, 4, 8) if n < n_slots), *([n_slots] if n_slots <= 8 else []))


def default_sizes(n_slots: int) -> tuple[int, ...]:
    """Return 1, 2, 4, then every multiple of 8 up to 64 and of 32 beyond, and `n_slots`."""
    steps = (1, 2, 4, *range(8, 65, 8), *range(96, n_slots, 32))
    return (*(n for n in steps if n < n_slots), n_slots)
