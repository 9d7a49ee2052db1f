"""Decode steps captured once and replayed: one launch in place of some forty a layer.

A CPU has no launches; there it is calls of kernels alone, without what chooses and prepares them.

Everything a step depends on is in tensors of a fixed place, which a new step overwrites. What a
graph cannot see is its shape: one is captured for each size, and a step of fewer sequences
repeats its first ones, whose rows are computed and written twice alike.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from v4_ascend.backends.cpu.recorder import record_calls
from v4_ascend.errors import CaptureError, ParityError
from v4_ascend.model.batch import Batch, overwrite
from v4_ascend.model.transformer import Transformer
from v4_ascend.runtime.decode_layout import DecodeLayout
from v4_ascend.runtime.kv_cache import Chunk, KVCache

log = logging.getLogger(__name__)
WARM_UPS = 2  # runs before a capture: kernels compile, libraries choose theirs


class Recorder(Protocol):
    """A device's way to record what a function launches."""

    def __call__(self, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        """Record a run; return its result's place, and what fills it again."""
        ...


class DeviceGraphs:
    """CUDA graphs, or on an NPU the vendor's: torch_npu has the same interface.

    All share one pool of memory, as only one of them runs at a time.
    """

    def __init__(self, device: torch.device) -> None:
        self._module: Any = torch.get_device_module(device)
        self._graph: type[Any] = getattr(self._module, f"{device.type.upper()}Graph")
        self._pool = self._module.graph_pool_handle()

    def __call__(self, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        """Record a run on a stream of its own."""
        graph = self._graph()
        with self._module.graph(graph, pool=self._pool):
            result = run()
        return result, graph.replay


def recorder_of(device: torch.device) -> Recorder:
    """Return how a device records: a CPU its calls, others their launches."""
    return record_calls if device.type == "cpu" else DeviceGraphs(device)


def decoding(
    model: Transformer, cache: KVCache, size: int, backend: str
) -> Callable[[Sequence[Chunk]], torch.Tensor]:
    """Return what runs a step of `cache`, replayed where it decodes up to `size` sequences.

    As a deployment does; where steps cannot be captured a warning says why.
    """
    graphs = None
    if backend in ("cpu", "cuda"):  # MindSpore's calls on a CPU are none that torch sees
        try:
            graphs = DecodeGraphs(model, cache, (size,), recorder_of(cache.device))
        except CaptureError as e:
            log.warning("decode steps are not replayed: %s", e)

    def streams(chunks: Sequence[Chunk]) -> torch.Tensor:
        replayed = graphs.streams(chunks) if graphs is not None else None
        return model(cache.batch(chunks), cache.layers) if replayed is None else replayed

    return streams


@dataclass(frozen=True)
class _Captured:
    fill: Callable[[Sequence[Chunk]], None]  # lays out a step where the captured one lies
    streams: torch.Tensor
    replay: Callable[[], None]


class DecodeGraphs:
    """The captured steps of one rank: of sequences with one token each.

    `sizes` ascend. Of a model with an indexer there are two graphs of a size: whether it is asked
    depends on the longest sequence.
    """

    def __init__(
        self, model: Transformer, cache: KVCache, sizes: Sequence[int], recorder: Recorder
    ) -> None:
        self._model, self._cache, self._sizes = model, cache, tuple(sizes)
        self._captured: dict[tuple[int, bool], _Captured] = {}
        config = model.config
        has_indexer = 4 in config.compress_ratios
        self._may_ask = has_indexer and cache.max_model_len // 4 > config.index_topk
        for size in reversed(self._sizes):  # the largest first: smaller ones fit its memory
            for is_asked in (False, True) if self._may_ask else (False,):
                self._captured[size, is_asked] = self._capture(size, recorder, is_asked=is_asked)

    def __len__(self) -> int:
        return len(self._captured)

    def streams(self, chunks: Sequence[Chunk]) -> torch.Tensor | None:
        """Run a step; None if it is not one that is captured.

        Shapes: return [len(chunks), hc_mult, dim], overwritten by the next step
        """
        n = len(chunks)
        size = next((size for size in self._sizes if size >= n), None)
        if size is None or any(len(c.token_ids) != 1 for c in chunks):
            return None
        repeated = [chunks[i % n] for i in range(size)]
        longest = max(c.start for c in chunks) + 1
        is_asked = self._may_ask and longest // 4 > self._model.config.index_topk
        captured = self._captured[size, is_asked]
        captured.fill(repeated)
        captured.replay()
        return captured.streams[:n]

    def _capture(self, size: int, recorder: Recorder, *, is_asked: bool) -> _Captured:
        """Record a step of `size` sequences; another one, replayed, must be the step itself.

        Raises:
            CaptureError: the step cannot be recorded.
            ParityError: it is not, bit for bit: something the step depends on is not in its batch.
        """
        least = (self._model.config.index_topk + 1) * 4 - 1 if is_asked else 0
        # The other step follows and ends a block, so that nothing the first one reads is written
        # by it: however often they take turns, they give what they gave.
        second = min(least + (4 if is_asked else 3), self._cache.max_model_len - 1)
        recorded = [Chunk(slot, [0], max(second - 1, least)) for slot in range(size)]
        other = [Chunk(slot, [1], second) for slot in reversed(range(size))]
        for _ in range(WARM_UPS):
            self._run(self._cache.batch(recorded))
            expected = self._run(self._cache.batch(other)).clone()
        batch = self._cache.batch(recorded)  # a new one: nothing is kept of its tensors yet
        streams, replay = recorder(partial(self._run, batch))
        fill = self._filling(batch)
        fill(other)
        replay()
        if not torch.equal(streams, expected):
            worst = float((streams.float() - expected.float()).abs().max())
            raise ParityError(
                f"a captured step of {size} sequences differs from the step itself by {worst:.3g}"
            )
        return _Captured(fill, streams, replay)

    def _filling(self, batch: Batch) -> Callable[[Sequence[Chunk]], None]:
        if self._cache.device.type == "cpu":
            return DecodeLayout(self._cache, batch).fill
        return lambda chunks: overwrite(batch, self._cache.layout(chunks))

    def _run(self, batch: Batch) -> torch.Tensor:
        return self._model(batch, self._cache.layers)
