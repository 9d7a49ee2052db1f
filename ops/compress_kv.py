"""Token-wise compression of keys: CSA (ratio 4, overlapping) and HCA (ratio 128)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from v4_ascend.ops.op import ROUNDED, Case, Tolerance, op
from v4_ascend.ops.ragged import Span, locate, max_new_rows, spans
from v4_ascend.ops.rms_norm import rms_norm
from v4_ascend.ops.rope import rope, rope_freqs, rope_table


def state_rows(compress_ratio: int, overlaps: bool, n_guesses: int = 0) -> int:
    """Tokens of carried state per request: the group in progress, and the one before it.

    With overlap there is room for guesses behind them too, so that a request can go on in front
    of them. Of the long groups none is ended by a guess: whoever brings guesses sees to that.
    """
    if not overlaps:
        return compress_ratio
    pair = 2 * compress_ratio
    return -(-(pair - 1 + n_guesses) // pair) * pair


def row_positions(seq_lens: torch.Tensor, cu_seqlens: torch.Tensor, ratio: int) -> list[int]:
    """Positions (group starts) of the rows a step completes, packed by request."""
    groups = (range(s.start // ratio, s.stop // ratio) for s in spans(seq_lens, cu_seqlens))
    return [g * ratio for of_request in groups for g in of_request]


def _inputs(
    g: torch.Generator,
    lengths: tuple[tuple[int, int], ...],
    ratio: int,
    head_dim: int,
    dim: int,
    dtype: torch.dtype,
    n_guesses: int = 0,
) -> dict[str, Any]:
    coff = 2 if ratio == 4 else 1
    new = torch.tensor([n for _, n in lengths])
    seq_lens = torch.tensor([p + n for p, n in lengths], dtype=torch.int32)
    cu_seqlens = F.pad(new.cumsum(0), (1, 0)).int()
    n_rows = max_new_rows(int(new.sum()), len(lengths), ratio)
    positions = torch.zeros(n_rows, dtype=torch.int64)
    done = row_positions(seq_lens, cu_seqlens, ratio)
    positions[: len(done)] = torch.tensor(done, dtype=torch.int64)
    cos, sin = rope_table(positions, rope_freqs(min(64, head_dim // 2), 160000.0))
    weight = partial(torch.randn, generator=g)

    def stored(x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16().float()  # checkpoints have these in bf16

    return {
        "x": weight(int(new.sum()), dim).to(dtype),
        "wkv": stored(weight(coff * head_dim, dim) * dim**-0.5),
        "wgate": stored(weight(coff * head_dim, dim) * dim**-0.5),
        "ape": weight(ratio, coff * head_dim),
        "norm_weight": stored(weight(head_dim)),
        "cos": cos,
        "sin": sin,
        "state": weight(
            len(lengths) + 1, state_rows(ratio, coff == 2, n_guesses), 2 * coff * head_dim
        ),
        "state_slots": torch.randperm(len(lengths) + 1, generator=g)[: len(lengths)],
        "seq_lens": seq_lens,
        "cu_seqlens": cu_seqlens,
        "compress_ratio": ratio,
        "norm_eps": 1e-6,
    }


def _cases() -> Iterator[Case]:
    lengths = {
        "empty": ((5, 0),),
        "one": ((0, 1),),
        "closing": ((3, 1), (127, 1), (130, 1)),
        "ragged": ((0, 9), (2, 131), (255, 2), (4, 0), (126, 130)),
    }
    for dtype in (torch.bfloat16, torch.float32):
        kind = str(dtype).removeprefix("torch.")
        for ratio in (4, 128):
            for name, seqs in lengths.items():
                make = partial(_inputs, lengths=seqs, ratio=ratio, head_dim=8, dim=24, dtype=dtype)
                yield Case(f"{kind}-r{ratio}-{name}", make)
            small: dict[str, Any] = {"ratio": ratio, "head_dim": 8, "dim": 24, "dtype": dtype}
            make = partial(_inputs, lengths=((9, 6), (62, 6), (0, 6)), n_guesses=5, **small)
            yield Case(f"{kind}-r{ratio}-guesses", make)
            for model, dim in (("flash", 4096), ("pro", 7168)):
                if ratio == 4:
                    wide: dict[str, Any] = {"ratio": 4, "head_dim": 512, "dim": dim, "dtype": dtype}
                    make = partial(_inputs, lengths=((1021, 6), (62, 6)), n_guesses=5, **wide)
                    yield Case(f"{kind}-r4-{model}-guesses", make, models=(model,))
                for head_dim in (512, 128) if ratio == 4 else (512,):
                    seqs = ((1021, 7), (0, 300))
                    make = partial(
                        _inputs, lengths=seqs, ratio=ratio, head_dim=head_dim, dim=dim, dtype=dtype
                    )
                    yield Case(f"{kind}-r{ratio}-{model}-{head_dim}", make, models=(model,))


def _pool(
    kv: torch.Tensor, score: torch.Tensor, ratio: int, head_dim: int, is_first: bool
) -> torch.Tensor:
    """Weigh each group's tokens per channel; `kv` starts one group early if rows overlap."""
    kv, score = kv.unflatten(0, (-1, ratio)), score.unflatten(0, (-1, ratio))
    if kv.shape[-1] == 2 * head_dim:
        if is_first:  # group 0 has no predecessor: weight 0, not score 0
            kv = torch.cat((torch.zeros_like(kv[:1]), kv))
            score = torch.cat((torch.full_like(score[:1], float("-inf")), score))
        # The first half of the channels belongs to the next group, the second to its own.
        kv = torch.cat((kv[:-1, :, :head_dim], kv[1:, :, head_dim:]), dim=1)
        score = torch.cat((score[:-1, :, :head_dim], score[1:, :, head_dim:]), dim=1)
    return (kv * score.softmax(dim=1)).sum(1)


def _with_state(
    span: Span, new: torch.Tensor, state: torch.Tensor, ratio: int, overlaps: bool
) -> torch.Tensor:
    """Rows [K | Z] of the tokens that this step's groups are made of."""
    first = max(span.start // ratio - overlaps, 0) * ratio
    carried = torch.arange(first, span.start, device=new.device) % state.shape[0]
    last = span.stop // ratio * ratio
    return torch.cat((state[carried], new[span.begin : span.end]))[: last - first]


def _carry(
    state: torch.Tensor,
    new: torch.Tensor,
    state_slots: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> None:
    """Keep the last tokens of every request; token t lives in row t % rows of its slot."""
    rows = state.shape[1]
    request, position = locate(seq_lens, cu_seqlens)
    kept = position >= seq_lens.long()[request] - rows
    request, position = request[kept], position[kept]
    state[state_slots[request], position % rows] = new[kept]


@op(
    cases=_cases,
    # bf16: a kernel may keep the pooled row in fp32 through norm and rotation, where the
    # published code rounds it twice on the way: 2^-8 of the two channels that a rotation
    # mixes, and may cancel, which for rows of +-4 is 2^-6. The bound on the whole stays.
    tolerance={**ROUNDED, torch.bfloat16: Tolerance(rtol=2**-6, atol=2**-6, diff=1e-5)},
    mutates=("state",),
)
def compress_kv(
    x: torch.Tensor,
    wkv: torch.Tensor,
    wgate: torch.Tensor,
    ape: torch.Tensor,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    state: torch.Tensor,
    state_slots: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    compress_ratio: int,
    norm_eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compress every group of `compress_ratio` tokens this step completes into one row.

    Per channel, a row is the softmax-weighted sum of its tokens' K; with overlap (ape twice
    as wide as norm_weight) the previous group's tokens take part with the first half of
    their channels. Then RMSNorm and rope at the group's first position. The state carries
    what later steps need, so any chunking of a sequence gives the same rows. Whether a
    group has a predecessor follows from positions: a slot needs no reset between requests.

    Shapes (c = head_dim, w = c or 2c):
        x            [n_tokens, dim]  bf16 or fp32
        wkv, wgate   [w, dim]  fp32
        ape          [compress_ratio, w]  fp32, added to the scores of token t at row t % ratio
        norm_weight  [c]  fp32
        cos, sin     [max_rows, pairs]  fp32, at `row_positions`;
                     max_rows = min(n_tokens, n_tokens // ratio + batch), no look at the lengths
        state        [n_slots, rows, 2 w]  fp32, rows = `state_rows`; K | Z of token t in row
                     t % rows; written in place
        state_slots  [batch]  int64
        seq_lens     [batch]  int32, cu_seqlens [batch + 1] int32
        return       rows [max_rows, c] dtype of x, packed by request, zero behind them; state

    Source: DeepSeek-V4 inference/model.py, Compressor; technical report 2.3.1, 2.3.2. The
    carried state is equivalent to its kv_state and score_state for one prefill and
    one-token steps, and defined for every other chunking too.
    """
    head_dim = norm_weight.shape[0]
    width = ape.shape[1]
    overlaps = width == 2 * head_dim
    wide = x.float()
    _, position = locate(seq_lens, cu_seqlens)
    score = F.linear(wide, wgate) + ape[position % compress_ratio]
    new = torch.cat((F.linear(wide, wkv), score), dim=-1)
    pooled = []
    for span in spans(seq_lens, cu_seqlens):
        if span.stop // compress_ratio > span.start // compress_ratio:
            slot = state[state_slots[span.request]]
            tokens = _with_state(span, new, slot, compress_ratio, overlaps)
            is_first = span.start < compress_ratio
            kv, z = tokens[:, :width], tokens[:, width:]
            pooled.append(_pool(kv, z, compress_ratio, head_dim, is_first))
    _carry(state, new, state_slots, seq_lens, cu_seqlens)
    rows = torch.zeros(cos.shape[0], head_dim, dtype=x.dtype, device=x.device)
    if pooled:
        packed = torch.cat(pooled).to(x.dtype)
        n = packed.shape[0]
        normed = rms_norm.reference(packed, norm_weight, norm_eps)
        rows[:n] = rope.reference(normed, cos[:n], sin[:n])
    return rows, state
