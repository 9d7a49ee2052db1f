"""Operators timed one by one on this machine, each beside the least its bytes or products take.

The floor is made of rates measured in the same run: a copy's bandwidth, bytes read and written,
the rate of a large product, and on CUDA the time of a graph's node that does nothing. On CUDA
calls are replayed in a graph, over as many sets of inputs as do not fit its L2, so that what
counts is the kernel and not its launch.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from v4_ascend.backends import Backend
from v4_ascend.config.model import ModelConfig
from v4_ascend.errors import UnsupportedOpError
from v4_ascend.ops import OPS, formats, use_policy
from v4_ascend.ops.records import INDEX_DIM, KV_DIM
from v4_ascend.runtime.op_workloads import Call, Unit, calls
from v4_ascend.runtime.workload import Maker, Workload

COLD_BYTES = {"cuda": 256 << 20, "cpu": 0}  # of all sets together: four times an H200's L2
MAX_SETS = 24
NODES = 200
REPLAYS = 15  # their median counts


@dataclass(frozen=True, slots=True)
class Rates:
    """What the machine can do, measured: bytes a second, operations a second by unit.

    Attributes:
        node: seconds of a node of a device graph that does nothing; 0 where calls are timed.
    """

    copy: float
    products: dict[Unit, float]
    node: float = 0.0

    def or_faster(self, other: Rates) -> Rates:
        """Return the better of two measurements, rate by rate."""
        products = {unit: max(rate, other.products[unit]) for unit, rate in self.products.items()}
        return Rates(max(self.copy, other.copy), products, min(self.node, other.node))

    def floor(self, call: Call) -> float:
        """Seconds that no kernel can undercut."""
        products = call.operations / self.products[call.unit]
        return max(call.nbytes / self.copy, products, self.node)


@dataclass(frozen=True, slots=True)
class Timing:
    """One call's time.

    Attributes:
        how: ``graph`` replays, or ``call`` by call where a call waits for the device.
        seconds: of one call; 0 where no kernel accepts it, and `why` says so.
    """

    op: str
    what: str
    kernel: str
    how: str
    seconds: float
    floor: float
    nbytes: float
    operations: float
    why: str = ""


def measure_rates(device: str) -> Rates:
    """Copy 1 GiB (CPU: 256 MiB), and multiply square matrices in each unit."""
    on_cuda = device == "cuda"
    source = torch.ones((1 << 30) if on_cuda else (1 << 28), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / _time_eager(lambda: target.copy_(source), device)
    n = 8192 if on_cuda else 1024
    a, b = (torch.randn(n, n, device=device) for _ in range(2))
    operations = 2.0 * n**3
    fp32 = operations / _time_eager(lambda: a @ b, device)
    if not on_cuda:  # decoded to fp32, whatever the format
        return Rates(copy, {"fp32": fp32, "bf16": fp32, "fp8": fp32})
    wide = a.bfloat16(), b.bfloat16()
    bf16 = operations / _time_eager(lambda: wide[0] @ wide[1], device)
    narrow = a.to(formats.FP8), b.to(formats.FP8).t()
    one = torch.ones((), device=device)
    scaled: Callable[[], Any] = lambda: torch._scaled_mm(  # noqa: E731
        *narrow, scale_a=one, scale_b=one, out_dtype=torch.bfloat16
    )
    fp8 = operations / _time_eager(scaled, device)
    return Rates(copy, {"fp32": fp32, "bf16": bf16, "fp8": fp8}, _node())


def _node() -> float:
    """Seconds of one of many nodes in a row that add 1 to one number each."""
    x = torch.zeros(1, device="cuda")

    def run() -> None:
        for _ in range(NODES):
            x.add_(1)

    return timed(run, "cuda")[0] / NODES


def machine(backend: Backend) -> dict[str, str]:
    """Return what was measured on, and with what."""
    if backend.device() == "cuda":
        device = torch.cuda.get_device_name()
    else:
        device = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    return {"device": device, "torch": torch.__version__, "python": platform.python_version()}


def packed_records(config: ModelConfig) -> tuple[str, str]:
    """Return the formats a quantised model's caches have; bf16 for widths they are not made for."""
    kv = "fp8_584" if config.head_dim == KV_DIM else "bf16"
    return kv, "fp4_68" if config.index_head_dim == INDEX_DIM else "bf16"


def bench_ops(
    backend: Backend,
    config: ModelConfig,
    work: Workload,
    rates: Rates,
    *,
    records: tuple[str, str],
    only: str | None = None,
) -> Iterator[Timing]:
    """Time what a step asks of each operator.

    Args:
        records: cache formats, of rows and of index keys.
        only: one operator's name.
    """
    with torch.inference_mode(), use_policy(backend=backend.name):
        maker = Maker(backend.device())
        for call in calls(config, work, maker, *records):
            if only is None or call.op == only:
                yield _time(call, rates, backend.device())


def _time(call: Call, rates: Rates, device: str) -> Timing:
    op, facts = OPS[call.op], (rates.floor(call), call.nbytes, call.operations)
    cold = COLD_BYTES[device]
    n_sets = min(MAX_SETS, max(1, -(-cold // int(call.nbytes))))
    sets = [call.make() for _ in range(n_sets)]
    for inputs in sets:
        op.prepare_inputs(inputs)
    try:
        kernel = op.select(**sets[0])
    except UnsupportedOpError as e:
        return Timing(call.op, call.what, "", "", 0.0, *facts, why=str(e))
    name = getattr(kernel, "__name__", "reference")

    def run() -> None:
        for inputs in sets:
            kernel(**inputs)

    seconds, how = timed(run, device)
    return Timing(call.op, call.what, name, how, seconds / n_sets, *facts)


def timed(run: Callable[[], Any], device: str) -> tuple[float, str]:
    """Return the median seconds of a run, and how it was timed: ``graph`` or ``call``."""
    return _time_graph(run) if device == "cuda" else (_time_eager(run, device), "call")


def _time_graph(run: Callable[[], Any]) -> tuple[float, str]:
    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:  # it waits for the device, which a graph cannot
        torch.cuda.synchronize()
        return _time_eager(run, "cuda"), "call"
    return _time_eager(graph.replay, "cuda"), "graph"


def _time_eager(run: Callable[[], Any], device: str) -> float:
    """Median seconds of a run, after two that warm up."""
    for _ in range(2):
        run()
    if device != "cuda":
        return _median([_clocked(run) for _ in range(5)])
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    spans = zip(marks, marks[1:], strict=False)
    return _median([a.elapsed_time(b) / 1e3 for a, b in spans])


def _clocked(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
