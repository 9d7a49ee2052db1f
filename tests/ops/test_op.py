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

        @rms_norm.kernel("meta")
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
