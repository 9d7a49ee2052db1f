"""The scheduling tables that attention and indexer calls must be given.

On hardware an AICPU operator cuts the work for the cores. Here the table says what it was
made for, and the call that gets it checks that: a table of another layer kind, which
hardware would follow into wrong results, is refused.
"""

from __future__ import annotations

import torch

from v4_ascend.emulation.checks import Checks
from v4_ascend.emulation.stand_in import stand_in

SIZE = 1024
_MARK = 0x5634  # "V4": made by one of the operators below
_ATTENTION, _QUANT_ATTENTION, _INDEXER = 1, 2, 3
_FIELDS = ("kind", "num_heads_q", "batch_size", "cmp_ratio", "topk", "has_cmp_kv")


def _table(check: Checks, device: str, *fields: int) -> torch.Tensor:
    check.need(device.startswith("npu"), "device", device, "the table is made on an npu")
    table = torch.zeros(SIZE, dtype=torch.int32)
    table[0] = _MARK
    table[1 : 1 + len(fields)] = torch.tensor(fields, dtype=torch.int32)
    return table


def check_table(check: Checks, metadata: torch.Tensor | None, *fields: int) -> None:
    """Refuse a table that is none, or was made for another call."""
    check.given(metadata=metadata)
    if metadata is None:
        return
    check.dtype(torch.int32, metadata=metadata)
    check.shape(SIZE, metadata=metadata)
    mark, *made_for = metadata[: 1 + len(fields)].tolist()
    check.need(mark == _MARK, "metadata", "not a table", "it must come from the metadata operator")
    for name, made, now in zip(_FIELDS, made_for, fields, strict=True):
        check.need(made == now, f"metadata's {name}", made, f"this call has {now}")


def _batch(
    check: Checks, batch_size: int, cu_seqlens: torch.Tensor | None, seqused: torch.Tensor | None
) -> int:
    lengths = [t for t in (cu_seqlens, seqused) if t is not None]
    check.dtype(torch.int32, **{f"lengths[{i}]": t for i, t in enumerate(lengths)})
    if seqused is not None:
        found = seqused.numel()
    elif cu_seqlens is not None:
        found = cu_seqlens.numel() - 1
    else:
        found = batch_size
    check.need(batch_size in (0, found), "batch_size", batch_size, f"the lengths say {found}")
    return found


def attention_fields(
    quant: bool, num_heads_q: int, batch: int, cmp_ratio: int, topk: int, has_cmp_kv: bool
) -> tuple[int, ...]:
    """Return what an attention table is made for."""
    kind = _QUANT_ATTENTION if quant else _ATTENTION
    # Without compressed rows the ratio is no part of the work.
    return kind, num_heads_q, batch, cmp_ratio if has_cmp_kv else 0, topk, int(has_cmp_kv)


def indexer_fields(num_heads_q: int, batch: int, cmp_ratio: int, topk: int) -> tuple[int, ...]:
    """Return what an indexer's table is made for."""
    return _INDEXER, num_heads_q, batch, cmp_ratio, topk, 1


def _attention_table(
    name: str,
    quant: bool,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    cu_seqlens_q: torch.Tensor | None,
    seqused_kv: torch.Tensor | None,
    batch_size: int,
    cmp_topk: int,
    cmp_ratio: int,
    masks: tuple[int, int],
    window: tuple[int, int],
    layouts: tuple[str, str],
    has_ori_kv: bool,
    has_cmp_kv: bool,
    device: str,
) -> torch.Tensor:
    check = Checks(name, "vllm-ascend sparse_attn_sharedkv README")
    check.one_of((1,), num_heads_kv=num_heads_kv)
    check.one_of((512,), head_dim=head_dim)
    check.one_of((4,), ori_mask_mode=masks[0])
    check.one_of((3,), cmp_mask_mode=masks[1])
    check.one_of((0,), ori_win_right=window[1])
    check.one_of(("TND", "BSND"), layout_q=layouts[0])
    check.one_of(("PA_ND",), layout_kv=layouts[1])
    check.need(has_ori_kv, "has_ori_kv", has_ori_kv, "there is no mode without window rows")
    batch = _batch(check, batch_size, cu_seqlens_q, seqused_kv)
    topk = cmp_topk if has_cmp_kv else 0
    fields = attention_fields(quant, num_heads_q, batch, cmp_ratio, topk, has_cmp_kv)
    return _table(check, device, *fields)


@stand_in("_C_ascend::npu_sparse_attn_sharedkv_metadata", ("a2", "a3"))
def npu_sparse_attn_sharedkv_metadata(
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_ori_kv: torch.Tensor | None = None,
    cu_seqlens_cmp_kv: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_kv: torch.Tensor | None = None,
    batch_size: int = 0,
    max_seqlen_q: int = 0,
    max_seqlen_kv: int = 0,
    ori_topk: int = 0,
    cmp_topk: int = 0,
    cmp_ratio: int = 4,
    ori_mask_mode: int = 4,
    cmp_mask_mode: int = 3,
    ori_win_left: int = 128,
    ori_win_right: int = 0,
    layout_q: str = "BSND",
    layout_kv: str = "PA_ND",
    has_ori_kv: bool = True,
    has_cmp_kv: bool = True,
    device: str = "npu",
) -> torch.Tensor:
    """Return the table [1024] int32 for calls of `npu_sparse_attn_sharedkv`."""
    return _attention_table(
        "npu_sparse_attn_sharedkv_metadata",
        False,
        num_heads_q,
        num_heads_kv,
        head_dim,
        cu_seqlens_q,
        seqused_kv,
        batch_size,
        cmp_topk,
        cmp_ratio,
        (ori_mask_mode, cmp_mask_mode),
        (ori_win_left, ori_win_right),
        (layout_q, layout_kv),
        has_ori_kv,
        has_cmp_kv,
        device,
    )


@stand_in("_C_ascend::npu_kv_quant_sparse_attn_sharedkv_metadata", ("950",))
def npu_kv_quant_sparse_attn_sharedkv_metadata(
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    kv_quant_mode: int,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_ori_kv: torch.Tensor | None = None,
    cu_seqlens_cmp_kv: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_kv: torch.Tensor | None = None,
    batch_size: int = 0,
    max_seqlen_q: int = 0,
    max_seqlen_kv: int = 0,
    ori_topk: int = 0,
    cmp_topk: int = 0,
    tile_size: int = 0,
    rope_head_dim: int = 0,
    cmp_ratio: int = -1,
    ori_mask_mode: int = 4,
    cmp_mask_mode: int = 3,
    ori_win_left: int = 127,
    ori_win_right: int = 0,
    layout_q: str = "BSND",
    layout_kv: str = "PA_ND",
    has_ori_kv: bool = True,
    has_cmp_kv: bool = True,
    device: str = "npu",
) -> torch.Tensor:
    """Return the table [1024] int32 for calls of `npu_kv_quant_sparse_attn_sharedkv`."""
    check = Checks("npu_kv_quant_sparse_attn_sharedkv_metadata", "its README in vllm-ascend")
    check.one_of((1,), kv_quant_mode=kv_quant_mode)
    check.one_of((0, 64), tile_size=tile_size, rope_head_dim=rope_head_dim)
    check.one_of((64, 128), num_heads_q=num_heads_q)
    return _attention_table(
        "npu_kv_quant_sparse_attn_sharedkv_metadata",
        True,
        num_heads_q,
        num_heads_kv,
        head_dim,
        cu_seqlens_q,
        seqused_kv,
        batch_size,
        cmp_topk,
        cmp_ratio,
        (ori_mask_mode, cmp_mask_mode),
        (ori_win_left, ori_win_right),
        (layout_q, layout_kv),
        has_ori_kv,
        has_cmp_kv,
        device,
    )


@stand_in("_C_ascend::npu_vllm_quant_lightning_indexer_metadata")
def npu_vllm_quant_lightning_indexer_metadata(
    num_heads_q: int,
    num_heads_k: int,
    head_dim: int,
    query_quant_mode: int,
    key_quant_mode: int,
    actual_seq_lengths_query: torch.Tensor | None = None,
    actual_seq_lengths_key: torch.Tensor | None = None,
    batch_size: int = 0,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    layout_query: str = "BSND",
    layout_key: str = "BSND",
    sparse_count: int = 2048,
    sparse_mode: int = 3,
    pre_tokens: int = 2**63 - 1,
    next_tokens: int = 2**63 - 1,
    cmp_ratio: int = 1,
    device: str = "npu",
) -> torch.Tensor:
    """Return the table [1024] int32 for calls of `npu_vllm_quant_lightning_indexer`."""
    check = Checks("npu_vllm_quant_lightning_indexer_metadata", "its README in vllm-ascend")
    check.one_of((64,), num_heads_q=num_heads_q)
    check.one_of((1,), num_heads_k=num_heads_k)
    check.one_of((128,), head_dim=head_dim)
    check.one_of((0,), query_quant_mode=query_quant_mode, key_quant_mode=key_quant_mode)
    check.one_of(("PA_BSND",), layout_key=layout_key)
    batch = _batch(check, batch_size, None, actual_seq_lengths_key)
    return _table(check, device, *indexer_fields(num_heads_q, batch, cmp_ratio, sparse_count))
