"""Compare what a kernel returned with what the reference returned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from v4_ascend.ops.op import EXACT, Tolerance


def assert_close(got: Any, want: Any, tolerance: Mapping[torch.dtype, Tolerance]) -> float:
    """Raise AssertionError, with the worst element, unless `got` is within tolerance of `want`.

    Returns:
        the largest part of the tolerance that an element used: 0 equal, 1 at the bound.
    """
    if not isinstance(want, tuple):
        return _assert_close("output", got, want, tolerance)
    if not isinstance(got, tuple) or len(got) != len(want):
        count = len(got) if isinstance(got, tuple) else 1
        raise AssertionError(f"want {len(want)} outputs, got {count}")
    pairs = enumerate(zip(got, want, strict=True))
    return max(_assert_close(f"output {i}", g, w, tolerance) for i, (g, w) in pairs)


def _assert_close(
    what: str, got: torch.Tensor, want: torch.Tensor, tolerance: Mapping[torch.dtype, Tolerance]
) -> float:
    if got.dtype != want.dtype:
        raise AssertionError(f"{what}: want {want.dtype}, got {got.dtype}")
    if got.shape != want.shape:
        raise AssertionError(f"{what}: want {list(want.shape)}, got {list(got.shape)}")
    if want.numel() == 0:
        return 0.0
    is_rounded = want.dtype in tolerance
    bound = tolerance[want.dtype] if is_rounded else EXACT
    if want.dtype in (torch.float8_e4m3fn, torch.float8_e8m0fnu):
        # They have no arithmetic; their bytes are the contract.
        g, w = got.view(torch.uint8).double(), want.view(torch.uint8).double()
    else:
        g, w = got.double(), want.double()
    odd = ~torch.isfinite(w)
    same = (g == w) | (g.isnan() & w.isnan())
    if not bool(same[odd].all() & torch.isfinite(g[~odd]).all()):
        raise AssertionError(f"{what}: inf/nan in other places")
    return _assert_within(what, g.masked_fill(odd, 0.0), w.masked_fill(odd, 0.0), bound)


def _assert_within(what: str, got: torch.Tensor, want: torch.Tensor, bound: Tolerance) -> float:
    error, allowed = (got - want).abs(), bound.atol + bound.rtol * want.abs()
    excess = error - allowed
    if bool((excess > 0).any()):
        at = int(excess.argmax())
        index = [int(i) for i in torch.unravel_index(torch.tensor(at), want.shape)]
        raise AssertionError(
            f"{what}: {int((excess > 0).sum())} of {want.numel()} elements differ; worst at "
            f"{index}: want {want.flatten()[at]:.6g}, got {got.flatten()[at]:.6g} "
            f"(rtol {bound.rtol:g}, atol {bound.atol:g})"
        )
    total = float((want * want + got * got).sum())
    diff = 1.0 - 2.0 * float((want * got).sum()) / total if total else 0.0
    if diff > bound.diff + 1e-15:  # the sums themselves are rounded
        raise AssertionError(f"{what}: global diff {diff:.3g} > {bound.diff:g}")
    return float((error / allowed).nan_to_num(nan=0.0).max())
