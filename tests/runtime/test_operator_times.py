"""The time of a step by operator."""

import time

import pytest
import torch

from v4_ascend.ops import rms_norm, swiglu
from v4_ascend.runtime.flight import Flight
from v4_ascend.runtime.messages import Sampling, SequenceStep, Step
from v4_ascend.runtime.operator_times import EVERY, OTHER, is_timed, timed

DRAW = Sampling(temperature=0.0, top_p=1.0, seed=0)
DECODE = SequenceStep(1, 0, [5, 6], 9, DRAW, n_drafts=1)
PREFILL = SequenceStep(2, 1, [5, 6], 0, None)


@pytest.mark.parametrize(
    ("sequences", "kind"), [([DECODE], "decode"), ([DECODE, PREFILL], "prefill")]
)
def test_the_parts_of_a_step_are_the_whole(sequences, kind):
    x = torch.randn(512, 512)
    begin = time.perf_counter()
    with timed(Step(1, sequences), torch.device("cpu"), Flight()) as times:
        y = rms_norm(x, torch.ones(512), 1e-6)
        time.sleep(0.05)
        for _ in range(3):
            swiglu(y, 10.0, None)
    took = time.perf_counter() - begin
    (measured,) = times
    assert (measured.kind, set(measured.seconds)) == (kind, {"rms_norm", "swiglu", OTHER})
    assert all(s > 0 for s in measured.seconds.values())
    assert measured.seconds[OTHER] > 0.05
    assert took - 0.01 < sum(measured.seconds.values()) <= took


def test_a_few_of_all_steps_are_timed_and_not_the_first():
    chosen = [n for n in range(1, 8 * EVERY) if is_timed(Step(n, []))]
    assert len(chosen) == 8
    assert chosen[0] > 8
