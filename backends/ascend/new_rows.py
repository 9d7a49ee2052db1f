"""Slots and angles of a step's compressed rows, laid out by the device."""

from __future__ import annotations

import torch

from v4_ascend.backends import prepared
from v4_ascend.backends.ascend.custom_ops import c_ascend
from v4_ascend.ops import new_rows
from v4_ascend.ops.rope import rope_table

FLAT = 1  # slot_mapping_format


@new_rows.kernel("ascend", provider="_C_ascend")
def compressor_metadata(
    freqs: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    block_table: torch.Tensor,
    block_rows: int,
    compress_ratio: int,
    max_rows: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Look each row up in tables of all positions, made once: 512 bytes for each of 64 channels."""
    n_positions = block_table.shape[1] * block_rows * compress_ratio
    cos, sin = _tables(freqs, n_positions)
    if not max_rows:
        return cos[:0, ::2], sin[:0, ::2], block_table.new_empty(0, dtype=torch.int64)
    cos, sin, slots = c_ascend("compressor_metadata")(
        cos,
        sin,
        cu_seqlens,
        seq_lens - cu_seqlens.diff(),
        block_table,
        block_rows,
        FLAT,
        compress_ratio,
        max_rows,
        len(seq_lens),
    )
    return cos[:, 0, 0, ::2], sin[:, 0, 0, ::2], slots.long()


def _tables(freqs: torch.Tensor, n_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin [>= n_positions, 2 * pairs], each angle once per channel.

    The host makes them: a device rounds a cosine another way. Longer ones replace shorter ones.
    """
    if not prepared.has(freqs, "tables") or len(prepared.get(freqs, "tables")[0]) < n_positions:
        made = rope_table(torch.arange(n_positions), freqs.cpu())
        wide = tuple(t.repeat_interleave(2, -1).to(freqs.device) for t in made)
        prepared.keep(freqs, "tables", wide)
    tables: tuple[torch.Tensor, torch.Tensor] = prepared.get(freqs, "tables")
    return tables
