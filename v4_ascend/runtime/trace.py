"""What a run computed on the way: every layer's streams, every operator's outputs, in order.

Names sort in the order of execution:

    trace/00000/003/streams            step that starts at token 0, after layer 3
    trace/00000/003/17.sparse_attn.0   output 0 of the 18th operator call of layer 3

The calls after the last layer, the head's, have the number behind it. Two runs of one model
over the same chunks make the same calls, whatever kernels they choose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from v4_ascend.model.transformer import Observer
from v4_ascend.ops import use_policy
from v4_ascend.ops.op import Op
from v4_ascend.ops.records import load_slots

PAIRS = {"moe_dispatch": 3, "moe_permute": 2}  # the output that numbers (token, choice) pairs


class Trace:
    """Collects tensors of one sequence's steps."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    @contextmanager
    def step(self, start: int) -> Iterator[Observer]:
        """Collect one step; the model calls what this yields after every layer."""
        layer, calls = 0, 0

        def call(op: Op[..., Any], kernel: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            result = kernel(*args, **kwargs)
            for i, output in enumerate(_visible(op, op.bind(*args, **kwargs), result)):
                name = f"trace/{start:05d}/{layer:03d}/{calls:02d}.{op.name}.{i}"
                self.tensors[name] = _kept(output)
            calls += 1
            return result

        def after(number: int, streams: torch.Tensor) -> None:
            nonlocal layer, calls
            self.tensors[f"trace/{start:05d}/{number:03d}/streams"] = _kept(streams)
            layer, calls = number + 1, 0

        with use_policy(around=call, parts=True):
            yield after


def _visible(op: Op[..., Any], arguments: dict[str, Any], result: Any) -> list[torch.Tensor]:
    """Outputs in the contract's order; of a cache or a state, what this call wrote."""
    if op.name == "store_rows":
        slots = arguments["slot_mapping"]
        return [load_slots(result, arguments["record"], slots[slots >= 0])]
    result = op.canonical(result)
    outputs = list(result) if isinstance(result, tuple) else [result]
    if op.name in PAIRS:
        # Which of a token's choices a row is depends on their order, which is open.
        which = PAIRS[op.name]
        outputs[which] = outputs[which] // arguments["ids"].shape[1]
    if op.name == "compress_kv":
        outputs[1] = outputs[1][arguments["state_slots"]]
    return outputs


def _kept(x: torch.Tensor) -> torch.Tensor:
    # A copy of its own: the tensor may be a view, and the next call may write to it.
    return x.detach().to("cpu", copy=True).contiguous()
