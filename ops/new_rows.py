"""Where the compressed rows of a step go, and the angles they are turned by."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from v4_ascend.ops.compress_kv import row_positions
from v4_ascend.ops.op import BOTH, ROUNDED, Case, op
from v4_ascend.ops.ragged import max_new_rows
from v4_ascend.ops.rope import rope_freqs, rope_table


def _inputs(
    g: torch.Generator, lengths: tuple[tuple[int, int], ...], ratio: int, block_rows: int, dim: int
) -> dict[str, Any]:
    new = torch.tensor([n for _, n in lengths])
    seq_lens = torch.tensor([p + n for p, n in lengths], dtype=torch.int32)
    width = int(seq_lens.max()) // (ratio * block_rows) + 1
    blocks = torch.randperm(len(lengths) * width, generator=g).int()
    return {
        "freqs": rope_freqs(dim, 160000.0),
        "seq_lens": seq_lens,
        "cu_seqlens": F.pad(new.cumsum(0), (1, 0)).int(),
        "block_table": blocks.view(len(lengths), width),
        "block_rows": block_rows,
        "compress_ratio": ratio,
        "max_rows": max_new_rows(int(new.sum()), len(lengths), ratio),
    }


def _cases() -> Iterator[Case]:
    lengths = {
        "empty": ((5, 0),),
        "one": ((0, 1),),
        "closing": ((3, 1), (127, 1), (130, 1)),
        "ragged": ((0, 9), (2, 131), (255, 2), (4, 0), (126, 130)),
    }
    for ratio in (4, 128):
        for name, seqs in lengths.items():
            make = partial(_inputs, lengths=seqs, ratio=ratio, block_rows=2, dim=8)
            yield Case(f"r{ratio}-{name}", make)
        seqs = ((65533, 300), (0, 700), (40000, 1))
        make = partial(_inputs, lengths=seqs, ratio=ratio, block_rows=32, dim=64)
        yield Case(f"r{ratio}-long", make, BOTH)


@op(cases=_cases, tolerance=ROUNDED)
def new_rows(
    freqs: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    block_table: torch.Tensor,
    block_rows: int,
    compress_ratio: int,
    max_rows: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lay out the rows a step completes, packed by request; a row's angle is its group's start.

    Behind the rows there are: cos 1, sin 0, slot -1.

    Shapes:
        freqs        [pairs]  fp32, as `rope_freqs` gives them
        seq_lens     [batch]  int32, including this step; cu_seqlens [batch + 1] int32
        block_table  [batch, max_blocks]  int32, of blocks of `block_rows` rows
        max_rows     as `max_new_rows` bounds them
        return       cos, sin [max_rows, pairs] fp32; slots [max_rows] int64, as of `store_rows`

    Source: DeepSeek-V4 inference/model.py, Compressor.forward.
    """
    positions = row_positions(seq_lens, cu_seqlens, compress_ratio)
    starts = torch.tensor(positions, dtype=torch.int64, device=freqs.device)
    before = (seq_lens - cu_seqlens.diff()) // compress_ratio
    owner = torch.repeat_interleave((seq_lens // compress_ratio - before).long())
    row = starts // compress_ratio
    slot = block_table[owner, row // block_rows].long() * block_rows + row % block_rows
    spare = (0, max_rows - len(starts))
    cos, sin = rope_table(F.pad(starts, spare), freqs)
    return cos, sin, F.pad(slot, spare, value=-1)
