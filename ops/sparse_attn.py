"""Attention over a token's window and its compressed rows, with a sink."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from v4_ascend.ops.op import ROUNDED, Case, Tolerance, op
from v4_ascend.ops.ragged import locate
from v4_ascend.ops.records import RECORDS, load_rows, store_rows

# Blocks of a drafter: each of five tokens is a request that ends with the block.
BLOCKS = ((4, 1),) * 5 + ((139, 1),) * 5 + ((1000, 1),) * 5
MAX_GATHERED = 1 << 24  # elements of gathered rows held at once: 64 MiB in fp32


def _paged(
    g: torch.Generator, batch: int, n_rows: int, block_rows: int, head_dim: int, record: str
) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = n_rows // block_rows + 1
    order = torch.randperm(batch * blocks, generator=g)
    storage = RECORDS[record].new_storage(len(order), block_rows, head_dim)
    rows = torch.randn(len(order) * block_rows, head_dim, generator=g)
    store_rows.reference(storage, rows, torch.arange(len(rows)), record)
    return storage, order.view(batch, blocks).int()


def _inputs(
    g: torch.Generator,
    lengths: tuple[tuple[int, int], ...],
    ratio: int,
    topk: int | None,
    n_heads: int,
    head_dim: int,
    window_size: int,
    record: str,
    dtype: torch.dtype,
    block_rows: int | None = None,
) -> dict[str, Any]:
    seq_lens = torch.tensor([p + n for p, n in lengths], dtype=torch.int32)
    new = torch.tensor([n for _, n in lengths])
    cu_seqlens = F.pad(new.cumsum(0), (1, 0)).int()
    longest, n_tokens = int(seq_lens.max()), int(new.sum())
    window, window_table = _paged(g, len(lengths), longest, 128, head_dim, record)
    compressed = table = indices = None
    if ratio:
        n_rows = longest // ratio
        compressed, table = _paged(
            g, len(lengths), n_rows, block_rows or 128 // ratio, head_dim, record
        )
        if topk is not None:
            indices = torch.rand(n_tokens, n_rows, generator=g).argsort(-1)[:, :topk].int()
            _, position = locate(seq_lens, cu_seqlens)
            hidden = indices >= (position.unsqueeze(-1) + 1) // ratio
            indices = indices.masked_fill(hidden, -1)
    return {
        "q": torch.randn(n_tokens, n_heads, head_dim, generator=g).to(dtype),
        "window": window,
        "window_block_table": window_table,
        "compressed": compressed,
        "block_table": table,
        "indices": indices,
        "record": record,
        "seq_lens": seq_lens,
        "cu_seqlens": cu_seqlens,
        "sink": torch.randn(n_heads, generator=g),
        "softmax_scale": head_dim**-0.5,
        "window_size": window_size,
        "compress_ratio": ratio,
    }


def _cases() -> Iterator[Case]:
    lengths = {
        "empty": ((5, 0),),
        "one": ((0, 1),),
        "edges": ((3, 1), (126, 3), (0, 9)),
        "ragged": ((0, 5), (300, 1), (250, 140)),
    }
    kinds = {"swa": (0, None), "csa": (4, 7), "csa-all": (4, None), "hca": (128, None)}
    for dtype, record in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for kind, (ratio, topk) in kinds.items():
            for name, seqs in lengths.items():
                small: dict[str, Any] = {
                    "n_heads": 3,
                    "head_dim": 8,
                    "window_size": 128,
                    "record": record,
                }
                make = partial(_inputs, lengths=seqs, ratio=ratio, topk=topk, dtype=dtype, **small)
                yield Case(f"{record}-{kind}-{name}", make)
        block: dict[str, Any] = {
            "ratio": 0,
            "topk": None,
            "n_heads": 3,
            "head_dim": 8,
            "window_size": 133,
        }
        make = partial(_inputs, lengths=BLOCKS, record=record, dtype=dtype, **block)
        yield Case(f"{record}-swa-block", make)
    # Few heads of V4's width, for kernels that are made for it.
    few: dict[str, Any] = {"n_heads": 3, "head_dim": 512, "window_size": 40}
    for record, kind, seqs in (
        ("bf16", "swa", ((150, 1), (0, 3), (8, 0))),
        ("bf16", "csa", ((150, 1), (0, 3), (8, 0))),
        ("bf16", "hca", ((150, 1), (0, 3), (8, 0))),
        ("fp8_584", "csa", ((150, 1), (0, 3))),
        ("fp8_584", "hca", ((150, 1),)),
        ("fp8_640", "csa", ((150, 1), (0, 3))),
        ("bf16", "csa-all", ((0, 17),)),
    ):
        ratio, topk = kinds[kind]
        make = partial(
            _inputs,
            lengths=seqs,
            ratio=ratio,
            topk=topk,
            dtype=torch.bfloat16,
            record=record,
            **few,
        )
        yield Case(f"{record}-{kind}-512", make)
    for record in ("bf16", "fp8_584", "fp8_640"):
        for model, n_heads, topk in (("flash", 64, 512), ("pro", 128, 1024)):
            for kind, ratio, block_rows in (
                ("swa", 0, None),
                ("csa", 4, None),
                ("hca", 128, None),
                ("hca-pages32", 128, 32),  # what the vendors' kernels can address
            ):
                wide: dict[str, Any] = {
                    "n_heads": n_heads,
                    "head_dim": 512,
                    "window_size": 128,
                    "record": record,
                }
                make = partial(
                    _inputs,
                    lengths=((5000, 3), (0, 9)),
                    ratio=ratio,
                    topk=topk if ratio == 4 else None,
                    dtype=torch.bfloat16,
                    block_rows=block_rows,
                    **wide,
                )
                yield Case(f"{record}-{model}-{kind}", make, models=(model,))
            wide |= {"ratio": 0, "topk": None, "window_size": 133}
            make = partial(_inputs, lengths=BLOCKS, dtype=torch.bfloat16, **wide)
            yield Case(f"{record}-{model}-swa-block", make, models=(model,))


def _attend(
    q: torch.Tensor,
    rows: torch.Tensor,
    is_visible: torch.Tensor,
    sink: torch.Tensor,
    softmax_scale: float,
) -> torch.Tensor:
    """One softmax over every row a token sees; the sink adds to its denominator only."""
    scores = torch.einsum("thd,tnd->thn", q.float(), rows.float()) * softmax_scale
    scores = scores.masked_fill(~is_visible.unsqueeze(1), float("-inf"))
    top = scores.amax(-1, keepdim=True)
    p = (scores - top).exp()
    total = p.sum(-1, keepdim=True) + (sink.unsqueeze(-1) - top).exp()
    # The published kernel multiplies probabilities in q's dtype and sums unrounded ones.
    o = torch.einsum("thn,tnd->thd", p.to(q.dtype).float(), rows.float())
    return (o / total).to(q.dtype)


@op(
    cases=_cases,
    # bf16: a kernel may keep probabilities in fp32, or round them against a running maximum.
    # Rounding p moves a result by at most 2^-9 max|row|: 2^-7 for rows of +-4.
    tolerance={**ROUNDED, torch.bfloat16: Tolerance(rtol=2**-7, atol=2**-8, diff=1e-5)},
)
def sparse_attn(
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
    """Attend to the last `window_size` tokens and to compressed rows, under one softmax.

    Rows are key and value, shared by all heads. This step's rows are already in the
    caches. Without `indices` a token sees every row completed up to and including itself:
    s < (t + 1) // compress_ratio; without `compressed`, its window alone.

    Shapes:
        q             [n_tokens, n_heads, head_dim]  bf16 or fp32
        window, window_block_table    one row a token, see `records`
        compressed, block_table       one row per compress_ratio tokens; None for SWA layers
        indices       [n_tokens, topk]  int32 rows of the token's request, -1 for none
        seq_lens      [batch]  int32, cu_seqlens [batch + 1] int32
        sink          [n_heads]  fp32, not scaled
        return        [n_tokens, n_heads, head_dim]  dtype of q; fp32 inside

    Source: DeepSeek-V4 inference/kernel.py, sparse_attn; model.py, get_window_topk_idxs.
    """
    request, position = locate(seq_lens, cu_seqlens)
    back = torch.arange(1 - window_size, 1, device=q.device)
    seen = (position + 1) // compress_ratio if compress_ratio else position * 0
    n_rows = int(seen.max()) if len(seen) else 0
    width = window_size + (n_rows if indices is None else indices.shape[1])
    out = torch.empty_like(q)
    step = max(1, MAX_GATHERED // (width * q.shape[-1]))
    for begin in range(0, q.shape[0], step):
        part = slice(begin, begin + step)
        owner = request[part].unsqueeze(-1)
        token = position[part].unsqueeze(-1) + back
        is_visible = token >= 0
        rows = load_rows(window, record, window_block_table, owner, token.clamp_min(0))
        if compressed is not None and block_table is not None and width > window_size:
            row = torch.arange(n_rows, device=q.device) if indices is None else indices[part].long()
            here = (row >= 0) & (row < seen[part].unsqueeze(-1))
            row = torch.where(here, row, 0)
            # A request without rows yet reads block 0 of the table, which may be unset.
            table = block_table.clamp_min(0)
            more = load_rows(compressed, record, table, owner, row)
            rows = torch.cat((rows, more.masked_fill(~here.unsqueeze(-1), 0.0)), dim=1)
            is_visible = torch.cat((is_visible, here), dim=1)
        out[part] = _attend(q[part], rows, is_visible, sink, softmax_scale)
    return out
