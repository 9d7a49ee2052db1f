"""Rows of paged caches, written and read in every record format that CUDA kernels use."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from v4_ascend.backends.triton.quant import (
    e2m1_to_float,
    e4m3_to_half,
    e8m0_to_float,
    float_to_e2m1,
    float_to_e4m3,
    fp4_scale_byte,
    fp8_scale_byte,
    inverse_of_e8m0,
)

CODES = {"fp32": 0, "bf16": 0, "fp8_584": 1, "fp8_640": 2, "fp4_68": 3, "fp8_132": 4}


@triton.jit
def _store_plain(storage, rows, slots, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if slot >= 0:
        cols = tl.arange(0, BLOCK)
        mask = cols < width
        values = tl.load(rows + row * width + cols, mask, 0.0).to(tl.float32)
        at = storage + slot * width + cols
        tl.store(at, values.to(storage.dtype.element_ty), mask)


@triton.jit
def _store_bf16(at, x, mask):
    """Write fp32 x as the two bytes of its nearest bf16."""
    bits = x.to(tl.bfloat16).to(tl.int16, bitcast=True)
    tl.store(at, (bits & 0xFF).to(tl.uint8), mask)
    tl.store(at + 1, ((bits >> 8) & 0xFF).to(tl.uint8), mask)


@triton.jit
def _load_bf16(at, mask):
    low = tl.load(at, mask, 0).to(tl.int32)
    high = tl.load(at + 1, mask, 0).to(tl.int32)
    return ((low | (high << 8)) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _store_kv(storage, rows, slots, block_rows, RECORD: tl.constexpr):
    """Records of 448 FP8 channels in groups of 64, and 64 rotated ones in bf16."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if slot >= 0:
        group, channel = tl.arange(0, 8)[:, None], tl.arange(0, 64)[None, :]
        x = tl.load(rows + row * 512 + group * 64 + channel).to(tl.float32)
        byte = fp8_scale_byte(tl.max(tl.abs(x), 1))
        code = float_to_e4m3(x * inverse_of_e8m0(byte)[:, None])
        if RECORD == 1:
            page = storage + slot // block_rows * (block_rows * 584)
            data = page + slot % block_rows * 576
            tail = page + block_rows * 576 + slot % block_rows * 8
            rope = data + 448
        else:
            rope = storage + slot * 640
            data = rope + 128
            tail = data + 448
            pad = tl.arange(0, 64)
            tl.store(tail + 7 + pad, tl.zeros((64,), tl.uint8), pad < 57)
        tl.store(data + group * 64 + channel, code.to(tl.uint8), group < 7)
        at = rope + 2 * channel + 0 * group
        _store_bf16(at, x, group == 7)
        each = tl.arange(0, 8)
        # The 8th tail byte of fp8_584 is zero; fp8_640 has its padding there already.
        tl.store(tail + each, tl.where(each < 7, byte, 0).to(tl.uint8))


@triton.jit
def _store_fp4_index(storage, rows, slots, block_rows):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if slot >= 0:
        group, pair = tl.arange(0, 4)[:, None], tl.arange(0, 16)[None, :]
        at = rows + row * 128 + group * 32 + 2 * pair
        low, high = tl.load(at).to(tl.float32), tl.load(at + 1).to(tl.float32)
        byte = fp4_scale_byte(tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1)))
        inverse = inverse_of_e8m0(byte)[:, None]
        code = float_to_e2m1(low * inverse) | (float_to_e2m1(high * inverse) << 4)
        page = storage + slot // block_rows * (block_rows * 68)
        tl.store(page + slot % block_rows * 64 + group * 16 + pair, code.to(tl.uint8))
        tail = page + block_rows * 64 + slot % block_rows * 4
        tl.store(tail + tl.arange(0, 4), byte.to(tl.uint8))


@triton.jit
def _store_fp8_index(storage, rows, slots, block_rows):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if slot >= 0:
        channel = tl.arange(0, 128)
        x = tl.load(rows + row * 128 + channel).to(tl.float32)
        byte = fp8_scale_byte(tl.max(tl.abs(x), 0))
        code = float_to_e4m3(x * inverse_of_e8m0(byte))
        page = storage + slot // block_rows * (block_rows * 132)
        tl.store(page + slot % block_rows * 128 + channel, code.to(tl.uint8))
        bits = e8m0_to_float(byte).to(tl.int32, bitcast=True)
        each = tl.arange(0, 4)
        tail = page + block_rows * 128 + slot % block_rows * 4
        tl.store(tail + each, ((bits >> (8 * each)) & 0xFF).to(tl.uint8))


def store_rows(
    storage: torch.Tensor, rows: torch.Tensor, slot_mapping: torch.Tensor, record: str
) -> torch.Tensor:
    """As the op `store_rows`."""
    n_rows, code = len(rows), CODES[record]
    if not n_rows:
        return storage
    rows, slots, block_rows = rows.contiguous(), slot_mapping.contiguous(), storage.shape[1]
    grid = (n_rows,)
    if code == 0:
        width = storage.shape[-1]
        _store_plain[grid](storage, rows, slots, width, triton.next_power_of_2(width))
    elif record in ("fp8_584", "fp8_640"):
        _store_kv[grid](storage, rows, slots, block_rows, code)
    elif record == "fp4_68":
        _store_fp4_index[grid](storage, rows, slots, block_rows)
    else:
        _store_fp8_index[grid](storage, rows, slots, block_rows)
    return storage


@triton.jit
def _kv_rows(storage, slot, cols, mask, block_rows, RECORD: tl.constexpr):
    if RECORD == 1:
        page = storage + slot // block_rows * (block_rows * 584)
        data = page + slot % block_rows * 576
        tail = page + block_rows * 576 + slot % block_rows * 8
        rope = data + 448
    else:
        rope = storage + slot * 640
        data = rope + 128
        tail = data + 448
    is_fp8 = mask & (cols < 448)
    value = e4m3_to_half(tl.load(data + cols, is_fp8, 0)).to(tl.float32)
    value *= e8m0_to_float(tl.load(tail + cols // 64, is_fp8, 0))
    rotated = _load_bf16(rope + 2 * (cols - 448), mask & (cols >= 448))
    return tl.where(cols < 448, value, rotated).to(tl.bfloat16)


@triton.jit
def _fp4_index_rows(storage, slot, cols, mask, block_rows):
    page = storage + slot // block_rows * (block_rows * 68)
    byte = tl.load(page + slot % block_rows * 64 + cols // 2, mask, 0).to(tl.int32)
    code = tl.where(cols % 2 == 0, byte & 15, byte >> 4)
    tail = page + block_rows * 64 + slot % block_rows * 4
    return e2m1_to_float(code) * e8m0_to_float(tl.load(tail + cols // 32, mask, 0))


@triton.jit
def _fp8_index_rows(storage, slot, cols, mask, block_rows):
    page = storage + slot // block_rows * (block_rows * 132)
    byte = tl.load(page + slot % block_rows * 128 + cols, mask, 0)
    tail = page + block_rows * 128 + slot % block_rows * 4 + 0 * cols
    bits = tl.load(tail, mask, 0).to(tl.int32)
    for i in tl.static_range(1, 4):
        bits |= tl.load(tail + i, mask, 0).to(tl.int32) << (8 * i)
    return e4m3_to_half(byte).to(tl.float32) * bits.to(tl.float32, bitcast=True)


@triton.jit
def load_rows(
    storage, slot, is_row, width, block_rows, RECORD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Rows [n, BLOCK] of flat slots [n]; zero where not `is_row` or behind `width`.

    Plain rows in their own dtype; fp8_584 and fp8_640 as bf16, which holds them exactly;
    index records as fp32.
    """
    cols = tl.arange(0, BLOCK)[None, :]
    slot = slot.to(tl.int64)[:, None]
    mask = is_row[:, None] & (cols < width)
    # One return: Triton compiles what follows a return in a branch it knows at compile time.
    if RECORD == 0:
        rows = tl.load(storage + slot * width + cols, mask, 0.0)
    elif RECORD <= 2:
        rows = _kv_rows(storage, slot, cols, mask, block_rows, RECORD)
    elif RECORD == 3:
        rows = _fp4_index_rows(storage, slot, cols, mask, block_rows)
    else:
        rows = _fp8_index_rows(storage, slot, cols, mask, block_rows)
    return rows


@triton.jit
def slots_of(block_table, request, row, is_row, max_blocks, block_rows):
    """Flat slots of a request's rows; table entries behind what it has are not read."""
    block = tl.load(block_table + request * max_blocks + row // block_rows, is_row, 0)
    return block.to(tl.int64) * block_rows + row % block_rows
