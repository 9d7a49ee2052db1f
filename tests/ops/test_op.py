import timeit

import pytest
import torch

from v4_ascend.errors import KernelRegistrationError, UnsupportedOpError
from v4_ascend.ops import rms_norm, use_policy
from v4_ascend.ops.check import assert_close
from v4_ascend.ops.op import Tolerance


def test_call_runs_the_reference_on_cpu():
    x, w = torch.randn(2, 8), torch.ones(8)
    assert torch.equal(rms_norm(x, w, 1e-6), rms_norm.reference(x, w, 1e-6))


def test_a_device_without_kernel_is_an_error_that_says_why():
    x, w = torch.empty(2, 8, device="meta"), torch.empty(8, device="meta")
    with pytest.raises(UnsupportedOpError, match=r"rms_norm cannot run on meta: x=float32\[2, 8\]"):
        rms_norm(x, w, 1e-6)


def test_fallback_is_asked_for():
    x, w = torch.empty(2, 8, device="meta"), torch.empty(8, device="meta")
    with use_policy(fallback="reference"):
        assert rms_norm(x, w, 1e-6).shape == (2, 8)


def test_a_kernel_with_other_parameters_is_refused_at_import():
    with pytest.raises(KernelRegistrationError, match=r"takes \(x, w, eps\)"):

        @rms_norm.kernel("meta", provider="test")
        def wrong(x, w, eps): ...


TOL = {torch.float32: Tolerance(rtol=1e-3, atol=1e-3, diff=1e-6)}


@pytest.mark.parametrize(
    ("got", "says"),
    [
        (torch.tensor([1.0, 2.1]), r"1 of 2 elements differ; worst at \[1\]: want 2, got 2.1"),
        (torch.tensor([1.0, float("nan")]), "inf/nan in other places"),
        (torch.tensor([1.0, 2.0], dtype=torch.float64), "want torch.float32, got torch.float64"),
        (torch.tensor([1.0]), r"want \[2\], got \[1\]"),
    ],
)
def test_assert_close_says_what_differs(got, says):
    with pytest.raises(AssertionError, match=says):
        assert_close(got, torch.tensor([1.0, 2.0]), TOL)


def test_assert_close_accepts_equal_infinities():
    x = torch.tensor([1.0, float("-inf"), float("nan")])
    assert_close(x.clone(), x, TOL)


def test_a_bias_inside_the_elementwise_bound_fails_the_global_gate():
    want = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    loose = {torch.float32: Tolerance(rtol=0.0, atol=0.1, diff=1e-6)}
    with pytest.raises(AssertionError, match="global diff"):
        assert_close(want + 0.05, want, loose)


def test_without_a_tolerance_bytes_must_be_equal():
    with pytest.raises(AssertionError, match="1 of 2"):
        assert_close(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0 + 1e-6]), {})


def _small_x(x, weight, eps):
    return None if x.shape[0] < 4 else f"{x.shape[0]} rows, at most 3"


@pytest.fixture
def two_kernels():
    """Two kernels of a backend that does not exist: the first takes few rows alone."""

    def first(x, weight, eps):
        return "first"

    def second(x, weight, eps):
        return "second"

    rms_norm.kernel("fake", provider="test", why_not=_small_x)(first)
    rms_norm.kernel("fake", provider="test")(second)
    yield rms_norm.kernels["fake"]
    rms_norm.try_in_order("fake", ())
    del rms_norm.kernels["fake"]


DISPATCH = 3e-6  # seconds a call may cost; docs/backends.md


def _x(rows):
    return torch.ones(rows, 8), torch.ones(8), 1e-6


def test_a_named_backend_goes_before_the_device(two_kernels):
    with use_policy(backend="fake"):
        assert rms_norm(*_x(3)) == "first"
    assert isinstance(rms_norm(*_x(3)), torch.Tensor)


def test_kernels_are_tried_in_order_until_one_accepts(two_kernels):
    with use_policy(backend="fake"):
        assert (rms_norm(*_x(3)), rms_norm(*_x(4))) == ("first", "second")
        rms_norm.try_in_order("fake", two_kernels[::-1])
        assert rms_norm(*_x(3)) == "second"


def test_a_refused_call_names_every_kernel_and_its_reason(two_kernels):
    rms_norm.try_in_order("fake", two_kernels[:1])
    with (
        use_policy(backend="fake"),
        pytest.raises(UnsupportedOpError, match=r"(?s)on fake: x=float32\[4, 8\].*first: 4 rows"),
    ):
        rms_norm(*_x(4))


def test_weights_are_prepared_for_the_backend_that_will_use_them():
    seen = []
    rms_norm.preparation("fake")(lambda weight: seen.append(weight))
    try:
        w = torch.ones(8)
        rms_norm.prepare(w)
        with use_policy(backend="fake", kernels="reference"):
            rms_norm.prepare(w)
        assert seen == []
        with use_policy(backend="fake"):
            rms_norm.prepare(w)
        assert seen == [w]
    finally:
        del rms_norm._preparations["fake"]


def test_dispatch_costs_less_than_two_small_torch_calls(two_kernels):
    """In turns with a call of torch's own: what else the machine does slows both."""
    args, calls = _x(3), 5_000
    ways = {
        "torch": (None, lambda: args[0].reshape(-1)),
        "call": ("fake", lambda: rms_norm(*args)),
        "select": (None, lambda: rms_norm.select(*args)),
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(10):
        for name, (backend, call) in ways.items():
            with use_policy(backend=backend):
                best[name] = min(best[name], timeit.timeit(call, number=calls) / calls)
    assert best["call"] < 2 * best["torch"], best
    assert best["select"] < 2 * best["torch"], best
    assert best["call"] < DISPATCH, best
