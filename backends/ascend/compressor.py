"""The fused compressor: projections, pooling with carried state, and the norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from v4_ascend.backends import prepared
from v4_ascend.backends.ascend.custom_ops import c_ascend
from v4_ascend.ops import compress_kv, rope
from v4_ascend.ops.ragged import max_new_rows

KINDS = ((512, 2, 4), (128, 2, 4), (512, 1, 128))  # head_dim, coff, ratio: CSA, indexer, HCA
ROPE_DIM, INTERLEAVE, CONTIGUOUS = 64, 2, 1
MAX_BLOCK = 16  # rows of a state block: 16 for HCA as served on 950, all 8 there are for CSA
BF16 = "bf16"  # of weights and norm: their values as bf16, which they were stored in


@compress_kv.preparation("ascend")
def keep_bf16(wkv: torch.Tensor, wgate: torch.Tensor, norm_weight: torch.Tensor) -> None:
    """Keep bf16 copies of what the checkpoint has in bf16; the operator's contract is fp32.

    Weights that bf16 cannot hold get no copy, and their calls are refused.
    """
    for weight in (wkv, wgate, norm_weight):
        narrow = weight.to(torch.bfloat16)
        if weight.dtype == torch.float32 and bool((narrow.float() == weight).all()):
            prepared.keep(weight, BF16, narrow.contiguous())


def _why_not(
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
) -> str | None:
    if x.dtype != torch.bfloat16:
        return f"x is {x.dtype}, must be bf16"
    if x.shape[1] % 512 or not 1024 <= x.shape[1] <= 10240:
        return f"dim is {x.shape[1]}, must be a multiple of 512 from 1024 to 10240"
    kind = (norm_weight.shape[0], ape.shape[1] // norm_weight.shape[0], compress_ratio)
    if kind not in KINDS:
        return f"(head_dim, overlap, compress_ratio) is {kind}, must be one of {KINDS}"
    if cos.shape[0] != max_new_rows(x.shape[0], seq_lens.shape[0], compress_ratio):
        return f"cos has {cos.shape[0]} rows, the kernel returns one for each of max_rows"
    for name, weight in (("wkv", wkv), ("wgate", wgate), ("norm_weight", norm_weight)):
        if not prepared.has(weight, BF16):
            return f"{name} was not prepared, or has values that bf16 does not hold"
    return None


@dataclass(frozen=True)
class _Paging:
    """Where one step's state lies in the kernel's scratch, for one kind of compressor.

    The kernel addresses state by position and reads a block while other cores write later
    ones: a ring, as our state is, would be written under its readers. So every request gets
    blocks of its own for what is read and for what is kept; block 0 takes what nobody needs.
    Positions are moved by whole groups to begin near 0, which keeps the table short.

    Shapes:
        start  [batch]  int32, moved; table [batch, blocks] int32
        load   [batch, rows]  int64: row of the state slot that a scratch row is loaded from
        save   [batch, rows]  int64: scratch row that a state row is saved from
        into   [batch, rows]  int64: that state row; is_new [batch, rows] bool: whether at all
        n_done []  int64: rows this step completes
    """

    start: torch.Tensor
    table: torch.Tensor
    load: torch.Tensor
    save: torch.Tensor
    into: torch.Tensor
    is_new: torch.Tensor
    n_done: torch.Tensor


def _paging(
    seq_lens: torch.Tensor, cu_seqlens: torch.Tensor, n_tokens: int, ratio: int, rows: int
) -> _Paging:
    stop, counts = seq_lens.long(), cu_seqlens.diff().long()
    begin = stop - counts
    start = torch.minimum(begin, begin % ratio + rows - ratio)
    moved = begin - start
    end = start + counts
    size = min(rows, MAX_BLOCK)
    read = rows // size
    own = 2 * read + 1
    block = torch.arange(-(-(rows + n_tokens) // size), device=seq_lens.device)
    request = torch.arange(len(stop), device=seq_lens.device).unsqueeze(1)
    # Kept rows lie in `read` + 1 blocks at most, from this one on.
    kept = ((end - rows).clamp_min(0) // size).clamp_min(read).unsqueeze(1)
    is_kept = (block >= kept) & (block <= kept + read)
    local = torch.where(block < read, block, read + block - kept)
    table = torch.where((block < read) | is_kept, 1 + request * own + local, 0)
    row = torch.arange(rows, device=seq_lens.device)
    token = end.unsqueeze(1) - 1 - row
    # As many tokens in a row as the ring has rows: each writes another one, new or not.
    into = (token + moved.unsqueeze(1)) % rows
    is_new = token >= start.unsqueeze(1)
    token = token.clamp_min(0)
    save = table.gather(1, (token // size).clamp_max(len(block) - 1)) * size
    return _Paging(
        start=start.int(),
        table=table.int(),
        load=(row + moved.unsqueeze(1)) % rows,
        save=save + token % size,
        into=into,
        is_new=is_new,
        n_done=(stop // ratio - begin // ratio).sum(),
    )


@compress_kv.kernel("ascend", provider="_C_ascend", why_not=_why_not)
def compressor(
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
    """Compress on scratch state; rotate afterwards, since its rope tables are bf16.

    Loading and saving the scratch costs the state's bytes of this step's requests twice.
    """
    if not x.shape[0]:
        return x.new_zeros(cos.shape[0], norm_weight.shape[0]), state
    batch, rows, width = len(seq_lens), state.shape[1], state.shape[2]
    at = prepared.once_a_step(
        seq_lens,
        cu_seqlens,
        ("compressor", compress_ratio, rows),
        lambda: _paging(seq_lens, cu_seqlens, x.shape[0], compress_ratio, rows),
    )
    size = min(rows, MAX_BLOCK)
    read = rows // size
    scratch = state.new_zeros(1 + batch * (2 * read + 1), size, width)
    own = scratch[1:].view(batch, 2 * read + 1, size, width)
    own[:, :read] = state[state_slots.unsqueeze(1), at.load].unflatten(1, (read, size))
    norm = norm_weight if _wants_fp32_norm() else prepared.get(norm_weight, BF16)
    no_turn = x.new_ones(cos.shape[0], ROPE_DIM)
    out = c_ascend("compressor")(
        x.contiguous(),
        prepared.get(wkv, BF16),
        prepared.get(wgate, BF16),
        scratch,
        ape,
        norm,
        torch.zeros_like(no_turn),
        no_turn,
        at.table,
        cu_seqlens,
        None,
        at.start,
        ROPE_DIM,
        compress_ratio,
        ape.shape[1] // norm_weight.shape[0],
        norm_eps,
        INTERLEAVE,
        CONTIGUOUS,
    )
    slots = state_slots.unsqueeze(1)
    saved = scratch.view(-1, width)[at.save]
    before = state[slots, at.into]
    state[slots, at.into] = torch.where(at.is_new.unsqueeze(-1), saved, before)
    # Behind its rows the kernel leaves what was there.
    spare = torch.arange(len(out), device=x.device) >= at.n_done
    return rope(out.masked_fill(spare.unsqueeze(1), 0.0), cos, sin), state


def _wants_fp32_norm() -> bool:
    from v4_ascend.backends.ascend.soc import current_chip

    return current_chip() == "950"
