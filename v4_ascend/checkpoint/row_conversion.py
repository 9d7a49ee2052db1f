"""Rows of one weight in another format, compiled or in plain torch, and what that did to them."""

from __future__ import annotations

import torch

from v4_ascend.checkpoint import compiled
from v4_ascend.checkpoint.codecs import Parts, RowErrors, Stored, decode, encode
from v4_ascend.checkpoint.lossless import lossless


def converted(
    source: Stored,
    target: Stored,
    parts: Parts,
    importance: torch.Tensor | None,
    columns: slice,
) -> tuple[Parts, RowErrors | None]:
    """Convert rows; errors are of those columns alone, and None where no value changed.

    `importance` [n_in] weighs errors where a scale may be chosen.
    """
    made = compiled.recoded(source, target, parts, columns) if importance is None else None
    return made or plain(source, target, parts, importance, columns)


def plain(
    source: Stored,
    target: Stored,
    parts: Parts,
    importance: torch.Tensor | None,
    columns: slice,
) -> tuple[Parts, RowErrors | None]:
    """Convert rows as `converted`, without the compiled library."""
    if (rearranged := lossless(source, target, parts)) is not None:
        return rearranged, None
    x = decode(source, parts)
    made = encode(target, x, importance)
    y = decode(target, made)
    if target.kind == "plain" and torch.equal(x, y):
        return made, None
    return made, RowErrors.between(x[:, columns], y[:, columns])
