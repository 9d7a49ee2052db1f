"""The DSA lightning indexer: which compressed rows each token attends to."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from v4_ascend.ops.op import BOTH, FLASH, PRO, ROUNDED, Case, Tolerance, op
from v4_ascend.ops.ragged import locate, spans
from v4_ascend.ops.records import RECORDS, load_rows, store_rows

MAX_PRODUCTS = 1 << 24  # fp32 q.k products held at once: 64 MiB
NEG_INF = float("-inf")


def _score_inputs(
    g: torch.Generator,
    lengths: tuple[tuple[int, int], ...],
    n_heads: int,
    head_dim: int,
    record: str,
    dtype: torch.dtype,
    active: int | None = None,
) -> dict[str, Any]:
    ratio, block_rows = 4, 32
    seq_lens = torch.tensor([p + n for p, n in lengths], dtype=torch.int32)
    new = torch.tensor([n for _, n in lengths])
    blocks = int(seq_lens.max()) // (ratio * block_rows) + 1
    order = torch.randperm(len(lengths) * blocks, generator=g)
    storage = RECORDS[record].new_storage(len(order), block_rows, head_dim)
    # Eighths of small integers: every product and sum is exact, so ties are real ties.
    keys = torch.randint(-2, 3, (len(order) * block_rows, head_dim), generator=g) / 8
    store_rows.reference(storage, keys, torch.arange(len(keys)), record)
    n_tokens = int(new.sum())
    q = torch.randint(-2, 3, (n_tokens, n_heads, head_dim), generator=g) / 4
    weights = torch.randint(-2, 5, (n_tokens, n_heads), generator=g) / 4
    if active is not None:
        weights = (torch.rand(n_tokens, n_heads, generator=g).argsort(-1) < active).float()
    return {
        "q": q.to(dtype),
        "weights": weights.to(dtype),
        "storage": storage,
        "record": record,
        "block_table": order.view(len(lengths), blocks).int(),
        "seq_lens": seq_lens,
        "cu_seqlens": F.pad(new.cumsum(0), (1, 0)).int(),
        "compress_ratio": ratio,
    }


def _score_cases() -> Iterator[Case]:
    lengths = {
        "empty": ((8, 0),),
        "one": ((0, 1),),
        "edges": ((2, 3), (127, 2), (0, 9)),
        "ragged": ((0, 5), (300, 1), (64, 66)),
    }
    for dtype, record in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for name, seqs in lengths.items():
            make = partial(
                _score_inputs, lengths=seqs, n_heads=3, head_dim=16, record=record, dtype=dtype
            )
            yield Case(f"{record}-{name}", make)
    for record in ("bf16", "fp4_68", "fp8_132", "int8"):
        make = partial(
            _score_inputs,
            lengths=((4000, 3), (0, 40)),
            n_heads=64,
            head_dim=128,
            record=record,
            dtype=torch.bfloat16,
        )
        yield Case(f"{record}-flash-pro", make, models=BOTH)


@op(
    cases=_score_cases,
    # bf16: products and their sum over heads are rounded; a kernel may keep fp32 inside.
    tolerance={**ROUNDED, torch.float32: Tolerance(rtol=2**-6, atol=2**-5, diff=1e-4)},
)
def index_scores(
    q: torch.Tensor,
    weights: torch.Tensor,
    storage: torch.Tensor,
    record: str,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    compress_ratio: int,
) -> torch.Tensor:
    """Score each token's compressed rows: ``sum_h relu(q_h . k_s) * w_h``.

    The arithmetic is that of q's dtype, as published. A row is a candidate once all its
    tokens are there: s < (t + 1) // compress_ratio; the others score -inf.

    Shapes:
        q            [n_tokens, n_heads, head_dim]  bf16 or fp32
        weights      [n_tokens, n_heads]  as q; may be negative
        storage, block_table, record  the indexer cache, see `records`
        seq_lens     [batch] int32, cu_seqlens [batch + 1] int32
        return       [n_tokens, max(seq_lens) // compress_ratio]  fp32

    Source: DeepSeek-V4 inference/model.py, Indexer.
    """
    n_rows = int(seq_lens.max()) // compress_ratio if len(seq_lens) else 0
    scores = torch.full((q.shape[0], n_rows), NEG_INF, device=q.device)
    for span in spans(seq_lens, cu_seqlens):
        seen = span.stop // compress_ratio
        if not seen or span.begin == span.end:
            continue
        rows = torch.arange(seen, device=q.device)
        request = torch.full_like(rows, span.request)
        keys = load_rows(storage, record, block_table, request, rows).to(q.dtype)
        step = max(1, MAX_PRODUCTS // (seen * q.shape[1]))
        for begin in range(span.begin, span.end, step):
            part = slice(begin, min(begin + step, span.end))
            products = torch.einsum("thd,sd->ths", q[part], keys).relu_()
            scores[part, :seen] = (products * weights[part].unsqueeze(-1)).sum(1).float()
    _, position = locate(seq_lens, cu_seqlens)
    visible = (position + 1) // compress_ratio
    hidden = torch.arange(n_rows, device=q.device) >= visible.unsqueeze(-1)
    return scores.masked_fill_(hidden, NEG_INF)


def _sorted_ids(ids: torch.Tensor) -> torch.Tensor:
    return ids.sort(dim=-1).values


def _topk_inputs(g: torch.Generator, n_tokens: int, n_rows: int, topk: int) -> dict[str, Any]:
    scores = torch.randint(-3, 4, (n_tokens, n_rows), generator=g).float()
    visible = torch.randint(0, n_rows + 1, (n_tokens, 1), generator=g)
    scores = scores.masked_fill(torch.arange(n_rows) >= visible, NEG_INF)
    return {"scores": scores, "topk": topk}


def _topk_cases() -> Iterator[Case]:
    for n_tokens, n_rows, topk, models in (
        (0, 8, 4, ()),
        (1, 0, 4, ()),
        (1, 8, 4, ()),
        (33, 9, 4, ()),
        (33, 3, 4, ()),
        (64, 4096, 512, FLASH),
        (64, 4096, 1024, PRO),
    ):
        make = partial(_topk_inputs, n_tokens=n_tokens, n_rows=n_rows, topk=topk)
        yield Case(f"{n_tokens}x{n_rows}-top{topk}", make, models=models)


@op(cases=_topk_cases, tolerance={}, canonical=_sorted_ids)
def index_topk(scores: torch.Tensor, topk: int) -> torch.Tensor:
    """Choose the rows of highest score; ties go to the lower row.

    The order of the ids is open (the reference: ascending); ids of rows that score -inf
    are -1.

    Shapes:
        scores  [n_tokens, n_rows]  fp32
        return  [n_tokens, min(topk, n_rows)]  int32
    """
    topk = min(topk, scores.shape[1])
    if topk == 0 or len(scores) == 0:
        return torch.empty(len(scores), topk, dtype=torch.int32, device=scores.device)
    threshold = scores.topk(topk, dim=-1).values[:, -1:]
    above, equal = scores > threshold, scores == threshold
    vacant = topk - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= vacant))
    ids = chosen.nonzero()[:, 1].view(len(scores), topk)
    return ids.masked_fill(scores.gather(-1, ids) == NEG_INF, -1).int()


def _named_ids(ids: torch.Tensor) -> torch.Tensor:
    """Ids ascending, without the columns that name no row for anybody."""
    ids = ids.sort(dim=-1).values
    return ids[:, (ids >= 0).any(0)]


def _select_inputs(g: torch.Generator, topk: int, make: Any) -> dict[str, Any]:
    return make(g) | {"topk": topk}


def _select_cases() -> Iterator[Case]:
    for case in _score_cases():
        topk = 512 if case.slow else 8
        make: Any = case.make
        if case.id.startswith(("fp8_132", "int8")):
            # So few heads count that no sum is rounded: a kernel that keeps fp32 inside then
            # sees the order, and the ties, of one that computes in bf16.
            make = partial(make, active=1 if case.id.startswith("int8") else 2)
        make = partial(_select_inputs, topk=topk, make=make)
        yield Case(f"{case.id}-top{topk}", make, case.models)


@op(cases=_select_cases, tolerance={}, canonical=_named_ids)
def index_select(
    q: torch.Tensor,
    weights: torch.Tensor,
    storage: torch.Tensor,
    record: str,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    compress_ratio: int,
    topk: int,
) -> torch.Tensor:
    """Score and choose in one call, so that a kernel need not write the scores.

    Shapes: as `index_scores`; return as `index_topk`, but its width is open: topk, or less if
    that holds every row a token sees. A kernel that knows no lengths need not wait for them.
    """
    scores = index_scores.reference(
        q, weights, storage, record, block_table, seq_lens, cu_seqlens, compress_ratio
    )
    return index_topk.reference(scores, topk)
