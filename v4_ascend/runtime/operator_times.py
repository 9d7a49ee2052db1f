"""How long each operator takes, measured in a few steps of the traffic itself."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from v4_ascend.ops import use_policy
from v4_ascend.ops.op import Op
from v4_ascend.runtime.flight import Flight
from v4_ascend.runtime.messages import OperatorTimes, Step

EVERY = 32  # steps; a timed one waits for the device around every operator
OTHER = "other"  # what a step does between its operators


def is_timed(step: Step) -> bool:
    """Whether a step is one of those that are timed; the first ones compile and warm up."""
    return step.number % EVERY == EVERY // 2


@contextmanager
def timed(step: Step, device: torch.device, flight: Flight) -> Iterator[list[OperatorTimes]]:
    """Time the operators called in this block; the list has the result once it is left.

    An operator that exchanges with other ranks includes the wait for them.
    """
    seconds: dict[str, float] = defaultdict(float)

    def call(op: Op[..., Any], kernel: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        _wait_for(device)
        begin = time.perf_counter()
        result = flight.called(op, kernel, *args, **kwargs)
        _wait_for(device)
        seconds[op.name] += time.perf_counter() - begin
        return result

    _wait_for(device)
    begin = time.perf_counter()
    result: list[OperatorTimes] = []
    with use_policy(around=call):
        yield result
    _wait_for(device)
    seconds[OTHER] = time.perf_counter() - begin - sum(seconds.values())
    is_decode = all(len(s.token_ids) - s.n_drafts == 1 for s in step.sequences)
    result.append(OperatorTimes("decode" if is_decode else "prefill", dict(seconds)))


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
