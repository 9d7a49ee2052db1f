"""Rows of paged caches."""

from mindspore import Tensor, ops


def rows(flat: Tensor, slots: Tensor) -> Tensor:
    """Gather [n_slots, width] rows by flat slot, to [n, width]."""
    return ops.gather(flat, slots, 0)
