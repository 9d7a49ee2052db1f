"""Attention over window and compressed rows with sinks (A2/A3: bf16 rows; 950: fp8 rows).

Sources: vllm-ascend csrc/attention/sparse_attn_sharedkv and kv_quant_sparse_attn_sharedkv,
README and op_host tiling; the calls in attention/dsa_v1.py.
"""

from __future__ import annotations

import torch

from v4_ascend.emulation.checks import Checks
from v4_ascend.emulation.stand_in import stand_in
from v4_ascend.emulation.vendor.metadata import attention_fields, check_table

DIM, ROPE_DIM, NOPE_DIM = 512, 64, 448
ROW_BYTES, TILE = 640, 64  # of a quantised row; channels per scale


def _rows_512(cache: torch.Tensor) -> torch.Tensor:
    """Every row of a plain cache, fp32 [slots, 512]."""
    return cache.reshape(-1, DIM).float()


def _rows_640(cache: torch.Tensor) -> torch.Tensor:
    """Every row of a quantised cache, fp32 [slots, 512]: rope 64 bf16, nope 448 fp8, 7 e8m0."""
    raw = cache.view(torch.uint8).reshape(-1, ROW_BYTES)
    rope, nope, scale, _ = raw.split((2 * ROPE_DIM, NOPE_DIM, NOPE_DIM // TILE, 57), dim=-1)
    values = nope.contiguous().view(torch.float8_e4m3fn).float().unflatten(-1, (-1, TILE))
    factors = scale.contiguous().view(torch.float8_e8m0fnu).float().unsqueeze(-1)
    return torch.cat(
        ((values * factors).flatten(-2), rope.contiguous().view(torch.bfloat16).float()), -1
    )


def _attend(
    q: torch.Tensor, rows: torch.Tensor, sinks: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """One query's heads [N1, 512] over its rows [n, 512]; a sink adds to the denominator."""
    scores = (q.float() @ rows.T) * scale
    top = scores.amax(-1, keepdim=True)
    if sinks is not None:
        top = torch.maximum(top, sinks.unsqueeze(-1))
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks.unsqueeze(-1) - top)
    return (weights / total) @ rows


def _check_call(
    check: Checks,
    quant: bool,
    q: torch.Tensor,
    ori_kv: torch.Tensor | None,
    cmp_kv: torch.Tensor | None,
    ori_sparse_indices: torch.Tensor | None,
    cmp_sparse_indices: torch.Tensor | None,
    ori_block_table: torch.Tensor | None,
    cmp_block_table: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    seqused_kv: torch.Tensor | None,
    sinks: torch.Tensor | None,
    metadata: torch.Tensor | None,
    cmp_ratio: int,
    ori_win_left: int,
    ori_win_right: int,
    masks: tuple[int, int],
    layouts: tuple[str, str],
    return_softmax_lse: bool,
) -> None:
    check.one_of(("TND",), layout_q=layouts[0])
    check.one_of(("PA_ND",), layout_kv=layouts[1])
    check.given(
        ori_kv=ori_kv, ori_block_table=ori_block_table, cu_seqlens_q=cu_seqlens_q,
        seqused_kv=seqused_kv, sinks=sinks,
    )  # fmt: skip
    assert ori_kv is not None
    assert cu_seqlens_q is not None
    assert seqused_kv is not None
    check.shape(None, None, DIM, q=q)
    heads = q.shape[1]
    width = ROW_BYTES if quant else DIM
    if quant:
        check.one_of((64, 128), **{"q's heads N1": heads})
        check.dtype(torch.bfloat16, q=q)
        check.dtype(torch.float8_e4m3fn, ori_kv=ori_kv, cmp_kv=cmp_kv)
        check.one_of((127,), ori_win_left=ori_win_left)
    else:
        limit = "it must be a multiple of 4, at most 128"
        check.need(heads % 4 == 0 and 0 < heads <= 128, "q's heads N1", heads, limit)
        check.dtype(torch.bfloat16, torch.float16, q=q)
        check.dtype(q.dtype, ori_kv=ori_kv, cmp_kv=cmp_kv)
        check.need(ori_win_left >= 0, "ori_win_left", ori_win_left, "it must not be negative")
    check.shape(None, None, 1, width, ori_kv=ori_kv, cmp_kv=cmp_kv)
    check.pages(ori_kv=ori_kv, cmp_kv=cmp_kv)
    check.contiguous(q=q, ori_kv=ori_kv, cmp_kv=cmp_kv, cmp_sparse_indices=cmp_sparse_indices)
    check.need(
        ori_sparse_indices is None, "ori_sparse_indices", "given", "it is reserved; leave it out"
    )
    check.one_of((4,), ori_mask_mode=masks[0])
    check.one_of((3,), cmp_mask_mode=masks[1])
    check.one_of((0,), ori_win_right=ori_win_right)
    check.one_of((False,), return_softmax_lse=return_softmax_lse)

    batch = seqused_kv.numel()
    check.dtype(
        torch.int32, cu_seqlens_q=cu_seqlens_q, seqused_kv=seqused_kv,
        ori_block_table=ori_block_table, cmp_block_table=cmp_block_table,
        cmp_sparse_indices=cmp_sparse_indices,
    )  # fmt: skip
    check.shape(batch + 1, cu_seqlens_q=cu_seqlens_q)
    check.prefix_sums(q.shape[0], cu_seqlens_q=cu_seqlens_q)
    check.shape(batch, None, ori_block_table=ori_block_table, cmp_block_table=cmp_block_table)
    check.dtype(torch.float32, sinks=sinks)
    check.shape(heads, sinks=sinks)
    topk = 0
    if cmp_kv is None:
        check.one_of((1,), cmp_ratio=cmp_ratio)
        check.need(cmp_sparse_indices is None, "cmp_sparse_indices", "given", "it needs cmp_kv")
    else:
        check.one_of((4, 128), cmp_ratio=cmp_ratio)
        check.given(cmp_block_table=cmp_block_table)
        if cmp_sparse_indices is not None:
            check.shape(q.shape[0], 1, None, cmp_sparse_indices=cmp_sparse_indices)
            topk = cmp_sparse_indices.shape[-1]
            check.one_of((512, 1024), **{"cmp_sparse_indices' K2": topk})
    fields = attention_fields(quant, heads, batch, cmp_ratio, topk, cmp_kv is not None)
    check_table(check, metadata, *fields)


def _compute(
    check: Checks,
    q: torch.Tensor,
    ori_rows: torch.Tensor,
    cmp_rows: torch.Tensor | None,
    block_rows: tuple[int, int],
    cmp_sparse_indices: torch.Tensor | None,
    tables: tuple[torch.Tensor, torch.Tensor | None],
    cu_seqlens_q: torch.Tensor,
    seqused_kv: torch.Tensor,
    sinks: torch.Tensor | None,
    softmax_scale: float,
    cmp_ratio: int,
    ori_win_left: int,
) -> torch.Tensor:
    out = torch.empty_like(q)
    starts = cu_seqlens_q.tolist()
    for b, length in enumerate(seqused_kv.tolist()):
        first, last = starts[b], starts[b + 1]
        # The queries are the last ones of the sequence (right-down causal).
        ahead = length - (last - first)
        check.need(ahead >= 0, f"seqused_kv[{b}]", length, f"there are {last - first} queries")
        if last == first:
            continue
        ori = _slots(check, "ori_block_table", tables[0], b, length, block_rows[0])
        cmp = None
        if tables[1] is not None and cmp_rows is not None:
            n = length // cmp_ratio
            cmp = _slots(check, "cmp_block_table", tables[1], b, n, block_rows[1])
        for t in range(first, last):
            position = ahead + t - first
            window = ori[max(0, position - ori_win_left) : position + 1]
            rows = ori_rows[window]
            if cmp is not None and cmp_rows is not None:
                visible = (position + 1) // cmp_ratio
                picked = torch.arange(visible)
                if cmp_sparse_indices is not None:
                    picked = _picked(check, cmp_sparse_indices[t, 0], visible)
                rows = torch.cat((rows, cmp_rows[cmp[picked]]))
            out[t] = _attend(q[t], rows, sinks, softmax_scale).to(q.dtype)
    return out


def _slots(
    check: Checks, name: str, table: torch.Tensor, b: int, n_rows: int, block_rows: int
) -> torch.Tensor:
    """Flat slots of a request's rows 0..n_rows-1."""
    blocks = -(-n_rows // block_rows)
    limit = f"request {b} has {n_rows} rows, {blocks} blocks"
    check.need(table.shape[1] >= blocks, f"{name}.shape[1]", table.shape[1], limit)
    row = torch.arange(n_rows)
    return table[b, row // block_rows].long() * block_rows + row % block_rows


def _picked(check: Checks, indices: torch.Tensor, visible: int) -> torch.Tensor:
    valid = indices >= 0
    n = int(valid.sum())
    check.need(
        bool(valid[:n].all()), "cmp_sparse_indices", "-1 before an index", "valid ones come first"
    )
    picked = indices[:n].long()
    return picked[picked < visible]  # cmp_mask_mode 3 hides what is not complete yet


@stand_in("_C_ascend::npu_sparse_attn_sharedkv", ("a2", "a3"))
def npu_sparse_attn_sharedkv(
    q: torch.Tensor,
    *,
    ori_kv: torch.Tensor | None = None,
    cmp_kv: torch.Tensor | None = None,
    ori_sparse_indices: torch.Tensor | None = None,
    cmp_sparse_indices: torch.Tensor | None = None,
    ori_block_table: torch.Tensor | None = None,
    cmp_block_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_ori_kv: torch.Tensor | None = None,
    cu_seqlens_cmp_kv: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_kv: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    metadata: torch.Tensor | None = None,
    softmax_scale: float = 0.0,
    cmp_ratio: int = 0,
    ori_mask_mode: int = 4,
    cmp_mask_mode: int = 3,
    ori_win_left: int = 128,
    ori_win_right: int = 0,
    layout_q: str = "BSND",
    layout_kv: str = "PA_ND",
    return_softmax_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend q [T, N1, 512] to bf16 rows; only ori_kv = SWA, with cmp_kv HCA, indices CSA.

    Window rows of the query at position p are p - ori_win_left .. p. seqused_kv counts
    original tokens; compressed row s is visible from position (s + 1) * cmp_ratio - 1 on.
    """
    check = Checks("npu_sparse_attn_sharedkv", "vllm-ascend sparse_attn_sharedkv README and tiling")
    return _run(
        check, False, q, ori_kv, cmp_kv, ori_sparse_indices, cmp_sparse_indices, ori_block_table,
        cmp_block_table, cu_seqlens_q, seqused_kv, sinks, metadata, softmax_scale, cmp_ratio,
        (ori_mask_mode, cmp_mask_mode), (ori_win_left, ori_win_right), (layout_q, layout_kv),
        return_softmax_lse,
    )  # fmt: skip


@stand_in("_C_ascend::npu_kv_quant_sparse_attn_sharedkv", ("950",))
def npu_kv_quant_sparse_attn_sharedkv(
    q: torch.Tensor,
    kv_quant_mode: int,
    ori_kv: torch.Tensor | None = None,
    cmp_kv: torch.Tensor | None = None,
    ori_sparse_indices: torch.Tensor | None = None,
    cmp_sparse_indices: torch.Tensor | None = None,
    ori_block_table: torch.Tensor | None = None,
    cmp_block_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_ori_kv: torch.Tensor | None = None,
    cu_seqlens_cmp_kv: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_kv: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    metadata: torch.Tensor | None = None,
    tile_size: int = 0,
    rope_head_dim: int = 0,
    softmax_scale: float = 0.0,
    cmp_ratio: int = 0,
    ori_mask_mode: int = 4,
    cmp_mask_mode: int = 3,
    ori_win_left: int = 127,
    ori_win_right: int = 0,
    layout_q: str = "BSND",
    layout_kv: str = "PA_ND",
    return_softmax_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `npu_sparse_attn_sharedkv` on fp8 rows of 640 bytes; 64 or 128 query heads."""
    check = Checks(
        "npu_kv_quant_sparse_attn_sharedkv", "vllm-ascend kv_quant_sparse_attn_sharedkv README"
    )
    check.one_of((1,), kv_quant_mode=kv_quant_mode)
    check.one_of((TILE,), tile_size=tile_size)
    check.one_of((ROPE_DIM,), rope_head_dim=rope_head_dim)
    return _run(
        check, True, q, ori_kv, cmp_kv, ori_sparse_indices, cmp_sparse_indices, ori_block_table,
        cmp_block_table, cu_seqlens_q, seqused_kv, sinks, metadata, softmax_scale, cmp_ratio,
        (ori_mask_mode, cmp_mask_mode), (ori_win_left, ori_win_right), (layout_q, layout_kv),
        return_softmax_lse,
    )  # fmt: skip


def _run(
    check: Checks,
    quant: bool,
    q: torch.Tensor,
    ori_kv: torch.Tensor | None,
    cmp_kv: torch.Tensor | None,
    ori_sparse_indices: torch.Tensor | None,
    cmp_sparse_indices: torch.Tensor | None,
    ori_block_table: torch.Tensor | None,
    cmp_block_table: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    seqused_kv: torch.Tensor | None,
    sinks: torch.Tensor | None,
    metadata: torch.Tensor | None,
    softmax_scale: float,
    cmp_ratio: int,
    masks: tuple[int, int],
    window: tuple[int, int],
    layouts: tuple[str, str],
    return_softmax_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    check.need(
        softmax_scale > 0, "softmax_scale", softmax_scale, "it must be given, head_dim**-0.5"
    )
    _check_call(
        check, quant, q, ori_kv, cmp_kv, ori_sparse_indices, cmp_sparse_indices, ori_block_table,
        cmp_block_table, cu_seqlens_q, seqused_kv, sinks, metadata, cmp_ratio, *window, masks,
        layouts, return_softmax_lse,
    )  # fmt: skip
    assert ori_kv is not None
    assert ori_block_table is not None
    assert cu_seqlens_q is not None
    assert seqused_kv is not None
    rows = _rows_640 if quant else _rows_512
    out = _compute(
        check, q, rows(ori_kv), None if cmp_kv is None else rows(cmp_kv),
        (ori_kv.shape[1], 1 if cmp_kv is None else cmp_kv.shape[1]), cmp_sparse_indices,
        (ori_block_table, cmp_block_table if cmp_kv is not None else None), cu_seqlens_q,
        seqused_kv, sinks, softmax_scale, cmp_ratio, window[0],
    )  # fmt: skip
    # "softmax_lse output is invalid", so nobody may ask for it.
    return out, torch.empty(0)
