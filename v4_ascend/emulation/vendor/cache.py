"""Writes into paged caches, and rotation in place.

Sources: vllm-ascend device/device_op.py and csrc/attention (the calls, page layouts).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from v4_ascend.emulation.checks import Checks
from v4_ascend.emulation.stand_in import stand_in
from v4_ascend.emulation.vendor.compressor import rotate_interleaved
from v4_ascend.emulation.vendor.formats import E8M0, FP8_MAX, power_of_two_scale, to_fp8

SCATTERED = (
    torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.int64, torch.int8
)  # fmt: skip
KV_DIM, ROPE_DIM, KV_BYTES, KV_GROUP = 512, 64, 640, 64
INDEX_DIM, INDEX_BYTES = 128, 132


def _bytes(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(torch.uint8)


def _slots(check: Checks, slot_mapping: torch.Tensor, n: int, room: int) -> torch.Tensor:
    check.dtype(torch.int32, torch.int64, slot_mapping=slot_mapping)
    check.shape(n, slot_mapping=slot_mapping)
    inside = bool((slot_mapping < room).all())
    check.need(inside, "slot_mapping", "past the end", f"the cache has {room} slots")
    return slot_mapping.long()


@stand_in("_C_ascend::kv_compress_epilog", ("950",))
def kv_compress_epilog(
    kv_compress_cache: torch.Tensor,
    x: torch.Tensor,
    slot_mapping: torch.Tensor,
    quant_group_size: int,
    quant_mode: int,
    round_scale_flag: bool,
    layout: int,
) -> None:
    """Quantise rows x [n, 512] bf16 and write them to flat slots; negative slots are skipped.

    Cache: [slots, 1, 640] fp8_e4m3, a row being 64 bf16 rope | 448 e4m3 | 7 e8m0 | pad.
    """
    check = Checks("kv_compress_epilog", "vllm-ascend device_op.py, A5 adaptor")
    check.one_of((KV_GROUP,), quant_group_size=quant_group_size)
    check.one_of((2,), quant_mode=quant_mode)
    check.one_of((True,), round_scale_flag=round_scale_flag)
    check.one_of((1,), layout=layout)
    check.shape(None, KV_DIM, x=x)
    check.dtype(torch.bfloat16, x=x)
    check.shape(None, 1, KV_BYTES, kv_compress_cache=kv_compress_cache)
    check.dtype(torch.float8_e4m3fn, kv_compress_cache=kv_compress_cache)
    check.contiguous(kv_compress_cache=kv_compress_cache, x=x)
    slots = _slots(check, slot_mapping, len(x), len(kv_compress_cache))
    nope = x[:, :-ROPE_DIM].float().unflatten(-1, (-1, KV_GROUP))
    scale = power_of_two_scale(nope.abs().amax(-1), FP8_MAX)
    values = to_fp8(nope / scale.unsqueeze(-1)).flatten(-2)
    pad = torch.zeros(len(x), 57, dtype=torch.uint8)
    parts = (_bytes(x[:, -ROPE_DIM:]), _bytes(values), _bytes(scale.to(E8M0)), pad)
    written = slots >= 0
    cache = kv_compress_cache.view(torch.uint8).view(-1, KV_BYTES)
    cache[slots[written]] = torch.cat(parts, -1)[written]


@stand_in("_C_ascend::indexer_compress_epilog_v2", ("950",))
def indexer_compress_epilog_v2(
    indexer_compress_cache: torch.Tensor,
    x: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: int = 2,
) -> None:
    """Quantise rows x [n, 128] bf16 and write them to flat slots; negative slots are skipped.

    Cache: [blocks, rows, 1, 132] uint8, a page being all rows' 128 e4m3, then all rows' fp32
    scale, which is a power of two here (the kernel's own rounding is not documented).
    """
    check = Checks("indexer_compress_epilog_v2", "vllm-ascend indexer_compress_epilog_v2 kernel")
    check.one_of((2,), layout=layout)
    check.shape(None, INDEX_DIM, x=x)
    check.dtype(torch.bfloat16, x=x)
    check.shape(None, None, 1, INDEX_BYTES, indexer_compress_cache=indexer_compress_cache)
    check.dtype(torch.uint8, indexer_compress_cache=indexer_compress_cache)
    check.pages(indexer_compress_cache=indexer_compress_cache)
    check.contiguous(x=x, **{"a page of indexer_compress_cache": indexer_compress_cache[0]})
    blocks, rows = indexer_compress_cache.shape[:2]
    slots = _slots(check, slot_mapping, len(x), blocks * rows)
    scale = power_of_two_scale(x.float().abs().amax(-1, keepdim=True), FP8_MAX)
    values, factors = _bytes(to_fp8(x.float() / scale)), _bytes(scale)
    for i in torch.nonzero(slots >= 0).flatten().tolist():
        block, row = divmod(int(slots[i]), rows)
        page = indexer_compress_cache[block].view(-1)
        page[row * INDEX_DIM : (row + 1) * INDEX_DIM] = values[i]
        at = rows * INDEX_DIM + row * 4
        page[at : at + 4] = factors[i]


def _scatter(check: Checks, var: torch.Tensor, indices: torch.Tensor, update: torch.Tensor) -> None:
    check.dtype(torch.int32, torch.int64, indices=indices)
    check.need(indices.dim() == 2, "indices.dim()", indices.dim(), "[n, dims indexed]")
    k = indices.shape[1]
    check.need(1 <= k < var.dim(), "indices.shape[1]", k, f"var has {var.dim()} dims")
    check.shape(len(indices), *var.shape[k:], update=update)
    check.dtype(var.dtype, update=update)
    linear = torch.zeros(len(indices), dtype=torch.int64)
    for axis in range(k):
        linear = linear * var.shape[axis] + indices[:, axis]
    rows = var.shape[:k].numel()
    check.need(
        bool((linear < rows).all()),
        "indices",
        int(linear.max()) if len(linear) else 0,
        f"var has {rows} rows",
    )
    for row, value in zip(linear.tolist(), update, strict=True):
        if row >= 0:
            at: list[int] = []
            for axis in reversed(range(k)):
                row, offset = divmod(row, var.shape[axis])
                at.insert(0, offset)
            var[tuple(at)] = value


@stand_in("_C_ascend::npu_scatter_nd_update_v2", ("a2", "a3"))
def npu_scatter_nd_update_v2(
    var: torch.Tensor, indices: torch.Tensor, update: torch.Tensor
) -> None:
    """Write update [n, ...] to var at indices [n, k]; rows before the beginning are skipped.

    [-1, block_size - 1], what compressor_metadata pads with, is row -1.
    """
    _scatter(
        Checks("npu_scatter_nd_update_v2", "vllm-ascend scatter_nd_update_v2"), var, indices, update
    )


@stand_in("npu::npu_scatter_nd_update_")
def npu_scatter_nd_update_(
    input: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor
) -> torch.Tensor:
    """Write updates [n, ...] to input at indices [n, k], which must all be inside."""
    check = Checks("npu_scatter_nd_update_", "op-plugin npu_scatter_nd_update_.md")
    check.dtype(*SCATTERED, input=input)
    inside = bool((indices >= 0).all())
    check.need(inside, "indices", "negative", "every row must be inside")
    _scatter(check, input, indices, updates)
    return input


@stand_in("_C_ascend::inplace_partial_rotary_mul")
def inplace_partial_rotary_mul(
    x: torch.Tensor,
    r1: torch.Tensor,
    r2: torch.Tensor,
    rotary_mode: str,
    partial_slice: Sequence[int],
) -> None:
    """Rotate channels partial_slice of x [B, S, N, D] in place; r1 cos and r2 sin broadcast."""
    check = Checks("inplace_partial_rotary_mul", "vllm-ascend attention/dsa_v1.py")
    check.one_of(("interleave",), rotary_mode=rotary_mode)
    check.need(x.dim() == 4, "x.dim()", x.dim(), "[B, S, N, D]")
    check.need(len(partial_slice) == 2, "partial_slice", partial_slice, "[first, last)")
    first, last = partial_slice
    fits = 0 <= first < last <= x.shape[-1] and (last - first) % 2 == 0
    check.need(fits, "partial_slice", partial_slice, f"x has {x.shape[-1]} channels")
    check.dtype(torch.bfloat16, torch.float16, torch.float32, x=x)
    check.dtype(x.dtype, torch.float32, r1=r1, r2=r2)
    check.shape(None, None, None, last - first, r1=r1)
    check.shape(*r1.shape, r2=r2)
    for axis in range(3):
        check.one_of((1, x.shape[axis]), **{f"r1.shape[{axis}]": r1.shape[axis]})
    x[..., first:last] = rotate_interleaved(x[..., first:last], r1, r2).to(x.dtype)
