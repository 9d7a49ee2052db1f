"""A token's request, found in the kernel that needs it: no launches of their own."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def request_of(cu_seqlens, token, batch, BATCH: tl.constexpr):
    """Number of the request that has `token`: those that end by it lie before."""
    each = tl.arange(0, BATCH)
    ends = tl.load(cu_seqlens + 1 + each, each < batch, 2147483647)
    return tl.sum((ends <= token).to(tl.int32), 0)


@triton.jit
def position_of(seq_lens, cu_seqlens, token, request):
    """Position of `token` in its request."""
    return token + tl.load(seq_lens + request) - tl.load(cu_seqlens + request + 1)
