"""Which decode steps are captured as graphs: their sizes, or why there are none."""

from __future__ import annotations

from collections.abc import Sequence

from v4_ascend.config.topology import ParallelConfig, Topology


def why_no_graphs(
    t: Topology, parallel: ParallelConfig, backend: str, *, emulated: bool
) -> str | None:
    """Return why this deployment's steps cannot be captured, or None."""
    if t.engine != "native":
        return f"engine {t.engine} captures its own"
    if backend == "cpu":
        return "a CPU has no graphs: its calls do not wait for a launch"
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


def padded_size(sizes: Sequence[int], n: int) -> int | None:
    """Return the smallest of the ascending `sizes` that holds `n` sequences."""
    return next((size for size in sizes if size >= n), None)
