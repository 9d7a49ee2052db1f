"""Sparse attention on the CPU: dense products over the rows a tile of queries can see."""

from __future__ import annotations

import torch

from v4_ascend.backends.cpu.compiled.attention import masked_softmax
from v4_ascend.backends.cpu.compiled.library import MISSING
from v4_ascend.ops import sparse_attn
from v4_ascend.ops.ragged import Span, spans
from v4_ascend.ops.records import load_rows

TILE = 128  # queries; with a window of 128 half of a tile's products are used
# A tile's products with all compressed rows beat gathering each query's rows, up to this
# many of them for each that a query sees.
DENSE_ROWS_PER_SEEN = 4
DECODED = 2  # tokens a sequence brings while it decodes, its draft among them


def _why_not(
    q: torch.Tensor,
    window: torch.Tensor,
    window_block_table: torch.Tensor,
    compressed: torch.Tensor | None,
    block_table: torch.Tensor | None,
    indices: torch.Tensor | None,
    record: str,
    seq_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    sink: torch.Tensor,
    softmax_scale: float,
    window_size: int,
    compress_ratio: int,
) -> str | None:
    if len(seq_lens) > 1 and len(q) <= DECODED * len(seq_lens):
        return f"{len(q)} tokens of {len(seq_lens)} sequences: gathering serves all at once"
    if compressed is None or block_table is None or indices is None:
        return None
    n_rows = block_table.shape[1] * compressed.shape[1]
    n_seen = indices.shape[1] + window_size
    if n_rows > DENSE_ROWS_PER_SEEN * n_seen:
        return f"{n_rows} rows for the {n_seen} a query sees: gathering them is faster"
    return None


@sparse_attn.kernel("cpu", provider="torch", why_not=_why_not)
def sparse_attn_tiled(
    q: torch.Tensor,
    window: torch.Tensor,
    window_block_table: torch.Tensor,
    compressed: torch.Tensor | None,
    block_table: torch.Tensor | None,
    indices: torch.Tensor | None,
    record: str,
    seq_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    sink: torch.Tensor,
    softmax_scale: float,
    window_size: int,
    compress_ratio: int,
) -> torch.Tensor:
    """Read each tile's rows once for all of its queries, and mask what a query may not see."""
    out = torch.empty_like(q)
    for span in spans(seq_lens, cu_seqlens):
        more = _compressed_rows(span, compressed, block_table, record, compress_ratio)
        for begin in range(span.begin, span.end, TILE):
            end = min(begin + TILE, span.end)
            position = torch.arange(begin, end) - span.begin + span.start
            first = max(int(position[0]) - window_size + 1, 0)
            token = torch.arange(first, int(position[-1]) + 1)
            rows = load_rows(window, record, window_block_table, _of(span), token)
            back = position.unsqueeze(1) - token
            is_visible = (back >= 0) & (back < window_size)
            if more is not None:
                here = _visible_rows(indices, position, begin, end, len(more), compress_ratio)
                rows = torch.cat((rows, more))
                is_visible = torch.cat((is_visible, here), dim=1)
            # A row nobody sees may be unwritten; 0 * NaN would reach the sum.
            rows = rows.masked_fill(~is_visible.any(0).unsqueeze(1), 0.0)
            out[begin:end] = _attend(q[begin:end], rows, is_visible, sink, softmax_scale)
    return out


def _of(span: Span) -> torch.Tensor:
    return torch.tensor(span.request)


def _compressed_rows(
    span: Span,
    compressed: torch.Tensor | None,
    block_table: torch.Tensor | None,
    record: str,
    ratio: int,
) -> torch.Tensor | None:
    if compressed is None or block_table is None or span.stop < ratio or span.begin == span.end:
        return None
    row = torch.arange(span.stop // ratio)
    return load_rows(compressed, record, block_table, _of(span), row)


def _visible_rows(
    indices: torch.Tensor | None,
    position: torch.Tensor,
    begin: int,
    end: int,
    n_rows: int,
    ratio: int,
) -> torch.Tensor:
    causal = torch.arange(n_rows) < ((position + 1) // ratio).unsqueeze(1)
    if indices is None:
        return causal
    # One column more, for ids that are -1 or behind what this request has.
    chosen = torch.zeros(end - begin, n_rows + 1, dtype=torch.bool)
    ids = indices[begin:end].long()
    chosen.scatter_(1, torch.where((ids >= 0) & (ids < n_rows), ids, n_rows), value=True)
    return chosen[:, :n_rows] & causal


def _attend(
    q: torch.Tensor,
    rows: torch.Tensor,
    is_visible: torch.Tensor,
    sink: torch.Tensor,
    softmax_scale: float,
) -> torch.Tensor:
    n_tokens, n_heads, head_dim = q.shape
    wide = rows.float()
    scores = (q.reshape(-1, head_dim).float() @ wide.T).view(n_tokens, n_heads, -1)
    if MISSING is None:
        total = masked_softmax(scores, is_visible, sink, softmax_scale, q.dtype).unsqueeze(-1)
        o = scores.view(-1, len(rows)) @ wide
        return (o.view(n_tokens, n_heads, head_dim) / total).to(q.dtype)
    hidden = torch.where(is_visible, 0.0, float("-inf")).unsqueeze(1)
    scores.mul_(softmax_scale).add_(hidden)
    top = scores.amax(-1, keepdim=True)
    p = scores.sub_(top).exp_()
    total = p.sum(-1, keepdim=True) + (sink.unsqueeze(-1) - top).exp()
    # As the reference: probabilities in q's dtype are multiplied, unrounded ones summed.
    o = p.to(q.dtype).float().view(-1, len(rows)) @ wide
    return (o.view(n_tokens, n_heads, head_dim) / total).to(q.dtype)
