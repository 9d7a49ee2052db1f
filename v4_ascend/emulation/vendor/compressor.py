"""The KV compressor and its metadata.

Sources: vllm-ascend csrc/attention/compressor/README.md and the compressor_metadata kernel.
"""

from __future__ import annotations

import torch

from v4_ascend.emulation.checks import Checks
from v4_ascend.emulation.stand_in import running_on, stand_in

# (head dim, coff, ratio): CSA, its indexer, HCA
KINDS = ((512, 2, 4), (128, 2, 4), (512, 1, 128))
ROPE_DIM, INTERLEAVE = 64, 2
FLAT, BLOCK_OFFSET = 1, 2


def rotate_interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return ``x cos + (-x1, x0, -x3, x2, ..) sin``, fp32."""
    x = x.float()
    even, odd = x[..., ::2], x[..., 1::2]
    return x * cos.float() + torch.stack((-odd, even), -1).flatten(-2) * sin.float()


@stand_in("_C_ascend::compressor")
def compressor(
    x: torch.Tensor,
    wkv: torch.Tensor,
    wgate: torch.Tensor,
    state_cache: torch.Tensor,
    ape: torch.Tensor,
    norm_weight: torch.Tensor,
    rope_sin: torch.Tensor,
    rope_cos: torch.Tensor,
    state_block_table: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    seqused: torch.Tensor | None,
    start_pos: torch.Tensor | None,
    rope_head_dim: int,
    cmp_ratio: int,
    coff: int,
    norm_eps: float,
    rotary_mode: int,
    cache_mode: int,
) -> torch.Tensor:
    """Compress each group of cmp_ratio tokens that is complete into one normed, rotated row.

    Shapes:
        x            [T, H]
        wkv, wgate   [coff * D, H]  dtype of x
        state_cache  [block_num, block_size, 2 * coff * D]  fp32: kv_state | score_state of the
                     token at its position, ape added; block 0 is nobody's
        ape          [cmp_ratio, coff * D]  fp32
        rope_*       [min(T, T // cmp_ratio + B), 64]  of the rows that come out
        return       [min(T, T // cmp_ratio + B), D]  packed; NaN where there is no row
    """
    given = locals()
    check = Checks("compressor", "vllm-ascend csrc/attention/compressor/README.md")
    _check_compressor(check, **given)
    assert cu_seqlens is not None
    assert start_pos is not None
    assert state_block_table is not None
    dim, r = norm_weight.numel(), cmp_ratio
    starts, positions = cu_seqlens.tolist(), start_pos.tolist()
    kv = x.float() @ wkv.float().T
    score = x.float() @ wgate.float().T
    pooled: list[torch.Tensor] = []
    for b, p in enumerate(positions):
        n = starts[b + 1] - starts[b] if seqused is None else int(seqused[b])
        mine = slice(starts[b], starts[b] + n)
        at = torch.arange(p, p + n)
        new = torch.cat((kv[mine], score[mine] + ape[at % r]), dim=-1)
        state = _State(check, state_cache, state_block_table[b])
        # What this call pools: from the group before the first complete one on.
        from_ = max(0, (p // r - (coff - 1)) * r)
        whole = torch.cat((state.read(from_, p) if (p + n) // r > p // r else new[:0], new))
        for g in range(p // r, (p + n) // r):
            pooled.append(_pool(whole, g * r - from_, r, coff, dim))
        state.write(at, new)
    rows = min(len(x), len(x) // r + len(positions))
    out = torch.full((rows, dim), float("nan"), dtype=x.dtype)
    if pooled:
        c = torch.stack(pooled)
        c = c * torch.rsqrt(c.square().mean(-1, keepdim=True) + norm_eps) * norm_weight.float()
        turned = rotate_interleaved(c[:, -ROPE_DIM:], rope_cos[: len(c)], rope_sin[: len(c)])
        out[: len(c)] = torch.cat((c[:, :-ROPE_DIM], turned), -1).to(x.dtype)
    return out


def _pool(whole: torch.Tensor, first: int, r: int, coff: int, dim: int) -> torch.Tensor:
    """Softmax-weighted sum over a group, and the one before it if coff is 2."""
    kv, score = whole.split(coff * dim, dim=-1)
    if coff == 1:
        return (torch.softmax(score[first : first + r], 0) * kv[first : first + r]).sum(0)
    # First half of the channels: the previous group (none before group 0); second: this one.
    now, before = slice(first, first + r), slice(max(0, first - r), first)
    kv = torch.cat((kv[before, :dim], kv[now, dim:]))
    score = torch.cat((score[before, :dim], score[now, dim:]))
    return (torch.softmax(score, 0) * kv).sum(0)


class _State:
    """One request's rows of the paged state."""

    def __init__(self, check: Checks, cache: torch.Tensor, table: torch.Tensor) -> None:
        self.check, self.cache, self.table = check, cache, table.long()

    def _blocks(self, at: torch.Tensor) -> torch.Tensor:
        index = at // self.cache.shape[1]
        width, most = len(self.table), int(index.max()) + 1 if len(at) else 0
        limit = f"the sequence reaches block {most - 1}"
        self.check.need(width >= most, "state_block_table.shape[1]", width, limit)
        return self.table[index]

    def read(self, first: int, last: int) -> torch.Tensor:
        at = torch.arange(first, last)
        blocks = self._blocks(at)
        limit = "block 0 is never written, and these positions are read"
        self.check.need(bool((blocks > 0).all()), "state_block_table", blocks.tolist(), limit)
        return self.cache[blocks, at % self.cache.shape[1]]

    def write(self, at: torch.Tensor, rows: torch.Tensor) -> None:
        blocks = self._blocks(at)
        kept = blocks != 0
        blocks, offset = blocks[kept], at[kept] % self.cache.shape[1]
        # Tokens are written by many cores at once: who is last on a shared row is anyone's guess.
        places = torch.stack((blocks, offset), -1).tolist()
        twice = len(places) - len({tuple(place) for place in places})
        limit = "give old blocks 0, or a chunk its own blocks"
        self.check.need(not twice, "state_block_table: rows written twice by a call", twice, limit)
        self.cache[blocks, offset] = rows[kept]


def _check_compressor(
    check: Checks,
    x: torch.Tensor,
    wkv: torch.Tensor,
    wgate: torch.Tensor,
    state_cache: torch.Tensor,
    ape: torch.Tensor,
    norm_weight: torch.Tensor,
    rope_sin: torch.Tensor,
    rope_cos: torch.Tensor,
    state_block_table: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    seqused: torch.Tensor | None,
    start_pos: torch.Tensor | None,
    rope_head_dim: int,
    cmp_ratio: int,
    coff: int,
    norm_eps: float,
    rotary_mode: int,
    cache_mode: int,
) -> None:
    check.given(state_block_table=state_block_table, cu_seqlens=cu_seqlens, start_pos=start_pos)
    assert start_pos is not None
    assert cu_seqlens is not None
    check.shape(None, None, x=x)
    tokens, hidden = x.shape
    limit = "it must be a multiple of 512, 1024 to 10240"
    check.need(hidden % 512 == 0 and 1024 <= hidden <= 10240, "x's H", hidden, limit)
    check.shape(None, norm_weight=norm_weight)
    kind = norm_weight.numel(), coff, cmp_ratio
    check.one_of(KINDS, **{"(D, coff, cmp_ratio)": kind})
    width, batch = coff * kind[0], start_pos.numel()
    check.dtype(torch.bfloat16, torch.float16, x=x)
    check.dtype(x.dtype, wkv=wkv, wgate=wgate, rope_sin=rope_sin, rope_cos=rope_cos)
    if running_on().generation == "950":
        check.dtype(torch.float32, norm_weight=norm_weight)
    else:
        check.dtype(x.dtype, norm_weight=norm_weight)
    check.dtype(torch.float32, state_cache=state_cache, ape=ape)
    check.dtype(
        torch.int32, state_block_table=state_block_table, cu_seqlens=cu_seqlens, seqused=seqused,
        start_pos=start_pos,
    )  # fmt: skip
    check.shape(width, hidden, wkv=wkv, wgate=wgate)
    check.shape(None, None, 2 * width, state_cache=state_cache)
    rows = state_cache.shape[1]
    check.need(0 < rows <= 1024, "state_cache block_size", rows, "it must be 1 to 1024")
    check.shape(cmp_ratio, width, ape=ape)
    check.shape(batch, None, state_block_table=state_block_table)
    check.shape(batch + 1, cu_seqlens=cu_seqlens)
    check.prefix_sums(tokens, cu_seqlens=cu_seqlens)
    check.shape(batch, seqused=seqused)
    out_rows = min(tokens, tokens // cmp_ratio + batch)
    check.shape(out_rows, ROPE_DIM, rope_sin=rope_sin, rope_cos=rope_cos)
    check.contiguous(x=x, wkv=wkv, wgate=wgate, ape=ape)
    check.one_of((ROPE_DIM,), rope_head_dim=rope_head_dim)
    check.one_of((INTERLEAVE,), rotary_mode=rotary_mode)
    check.one_of((1,), cache_mode=cache_mode)


@stand_in("_C_ascend::compressor_metadata")
def compressor_metadata(
    rope_cos: torch.Tensor,
    rope_sin: torch.Tensor,
    cu_seqlens: torch.Tensor,
    start_pos: torch.Tensor,
    kv_block_table: torch.Tensor,
    kv_block_size: int,
    slot_mapping_format: int,
    compress_ratio: int,
    num_compressed_tokens: int,
    num_reqs_actual: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return cos, sin and cache slot of every row that `compressor` will write.

    rope_cos and rope_sin hold every original position; a row's angle is its group's start.
    Rows there are none of: cos 1, sin 0, slot -1 (format 1) or [-1, kv_block_size - 1] (2).

    Shapes:
        return  [num_compressed_tokens, 1, 1, rope dim] twice, [n] or [n, 2] int32
    """
    check = Checks("compressor_metadata", "vllm-ascend's compressor_metadata kernel")
    check.one_of((FLAT, BLOCK_OFFSET), slot_mapping_format=slot_mapping_format)
    check.shape(None, None, rope_cos=rope_cos)
    check.shape(*rope_cos.shape, rope_sin=rope_sin)
    check.dtype(torch.float32, torch.float16, torch.bfloat16, rope_cos=rope_cos)
    check.dtype(rope_cos.dtype, rope_sin=rope_sin)
    check.dtype(
        torch.int32, cu_seqlens=cu_seqlens, start_pos=start_pos, kv_block_table=kv_block_table
    )
    batch = start_pos.numel()
    check.shape(batch + 1, cu_seqlens=cu_seqlens)
    check.shape(batch, None, kv_block_table=kv_block_table)
    limit = f"there are {batch} requests"
    check.need(0 <= num_reqs_actual <= batch, "num_reqs_actual", num_reqs_actual, limit)
    cos = torch.ones(num_compressed_tokens, rope_cos.shape[1], dtype=rope_cos.dtype)
    sin = torch.zeros_like(cos)
    slots = torch.tensor([-1, kv_block_size - 1], dtype=torch.int32).repeat(
        num_compressed_tokens, 1
    )
    starts = cu_seqlens.tolist()
    row = 0
    for b in range(num_reqs_actual):
        p, n = int(start_pos[b]), starts[b + 1] - starts[b]
        for g in range(p // compress_ratio, (p + n) // compress_ratio):
            if row == num_compressed_tokens:
                break
            there = g // kv_block_size < kv_block_table.shape[1] and g * compress_ratio < len(
                rope_cos
            )
            block = int(kv_block_table[b, g // kv_block_size]) if there else -1
            if block >= 0:
                cos[row], sin[row] = rope_cos[g * compress_ratio], rope_sin[g * compress_ratio]
                slots[row] = torch.tensor([block, g % kv_block_size])
            row += 1
    cos, sin = cos[:, None, None], sin[:, None, None]
    if slot_mapping_format == BLOCK_OFFSET:
        return cos, sin, slots
    flat = torch.where(slots[:, 0] < 0, -1, slots[:, 0] * kv_block_size + slots[:, 1])
    return cos, sin, flat.int()
