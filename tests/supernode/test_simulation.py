import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4_ascend.errors import ConfigError
from v4_ascend.supernode.simulation import Faults, Pipeline, closed_form, simulate
from v4_ascend.supernode.timing import LayerWork, Transfer

LAYER = LayerWork(
    100e-6,
    (Transfer("board", 5e-6, 20e-6), Transfer("cabinet", 5e-6, 30e-6)),
    (Transfer("board", 5e-6, 40e-6), Transfer("cabinet", 5e-6, 60e-6)),
)
ALONE = 100e-6 + 35e-6 + 65e-6


def pipeline(pp=1, size=8, ep=8, m=None, layers=4, **more):
    return Pipeline(((LAYER,) * layers,) * pp, size, ep, m or pp, **more)


@pytest.mark.parametrize("pp", [1, 2, 8])
@pytest.mark.parametrize("size", [8, 64, 1024])
@pytest.mark.parametrize("is_decode", [True, False])
def test_the_closed_form_is_exact_where_stages_are_equal(pp, size, is_decode):
    p = pipeline(pp, size, 8, boundary_s=7e-6, is_decode=is_decode)
    assert simulate(p).step_s == pytest.approx(closed_form(p), rel=1e-9)
    m = pp if is_decode else 2 * pp - 1
    by_hand = m * 4 * ALONE + pp * (7e-6 if pp > 1 else 0)
    assert closed_form(p) == pytest.approx(by_hand, rel=1e-9)


def test_uneven_stages_agree_within_5_percent():
    stages = tuple((LAYER,) * n for n in (8, 8, 7, 8, 7, 8, 8, 7))
    p = Pipeline(stages, 1024, 64, 32, boundary_s=20e-6, tail_s=200e-6, is_decode=False)
    assert simulate(p).step_s == pytest.approx(closed_form(p), rel=0.05)


def test_a_straggler_costs_its_group_what_it_computes_longer():
    p = pipeline(size=16, ep=8)
    slowed = simulate(p, Faults(slow={3: 2.0}))
    assert slowed.step_s == pytest.approx(4 * (ALONE + 100e-6), rel=1e-9)
    assert slowed.waiting > 0
    assert simulate(p).waiting == 0


@pytest.mark.parametrize(("failed", "stage", "group"), [(0, 0, 0), (13, 0, 1), (16 + 5, 1, 0)])
def test_a_failed_device_is_localised(failed, stage, group):
    stall = simulate(pipeline(2, 16, 8), Faults(failed=failed)).stalled
    assert (stall.stage, stall.group) == (stage, group)
    assert failed in range(*stall.devices)
    # Its own group, and the group of the same place in the other stage, which feeds or follows.
    assert stall.n_waiting == 16


@given(
    pp=st.integers(1, 4),
    device=st.integers(0, 15),
    factor=st.floats(1, 4),
    load=st.floats(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_faults_never_make_it_faster(pp, device, factor, load):
    p = pipeline(pp, 16, 4)
    well = simulate(p).step_s
    slow = simulate(p, Faults(slow={device: factor})).step_s
    shared = simulate(p, Faults(contention={"cabinet": load})).step_s
    assert slow >= well * (1 - 1e-12)
    assert shared >= well * (1 - 1e-12)
    assert simulate(p, Faults(slow={device: factor + 1})).step_s >= slow * (1 - 1e-12)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: pipeline(size=10, ep=4), "ep_size 4 must divide 10"),
        (lambda: pipeline(m=-1), "-1 micro-batches"),
        (lambda: Pipeline((), 8, 8, 1), "has stages"),
        (lambda: Pipeline(((LayerWork(-1.0),),), 8, 8, 1), "negative"),
        (lambda: simulate(pipeline(), Faults(slow={8: 2.0})), "device 8 of 8"),
        (lambda: simulate(pipeline(), Faults(slow={1: 0.5})), "at least 1"),
        (lambda: simulate(pipeline(), Faults(failed=-1)), "device -1 of 8"),
        (lambda: simulate(pipeline(), Faults(contention={"board": 0.5})), "at least 1"),
    ],
)
def test_what_is_no_pipeline_is_refused(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


def test_a_whole_pod_takes_seconds():
    p = Pipeline(((LAYER,) * 8,) * 8, 1024, 64, 16)
    before = time.process_time()
    simulate(p)
    assert time.process_time() - before < 6
