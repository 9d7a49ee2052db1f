"""Kernels that exist for one test."""

from contextlib import contextmanager


@contextmanager
def planted_kernel(op, backend, kernel, why_not=None):
    """Let a backend try this kernel of an op before its own."""
    before = op.tried(backend)
    op.kernel(backend, provider="test", why_not=why_not)(kernel)
    planted = op.kernels[backend][-1]
    op.try_in_order(backend, (planted, *before))
    try:
        yield planted
    finally:
        op.kernels[backend].remove(planted)
        op.try_in_order(backend, before)
