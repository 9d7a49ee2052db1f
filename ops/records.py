"""Record formats of paged caches, and how operators address them.

A cache is ``(storage, block_table)``. Storage is ``[n_blocks, block_rows, width]`` and says
itself how many rows a block has; row r of request b is at block ``block_table[b, r //
block_rows]``, offset ``r % block_rows``. A window row is one token, a compressed row
`compress_ratio` tokens, so the reference's 128-token blocks have 128, 32 (CSA, indexer) or
1 (HCA) rows, and the 128-row pages of vendor kernels are the same contract with another
table. Table entries of blocks no query can see are never read. A window ring is a table
whose entries repeat.

Packed records put a page's scales behind all its data where their kernels expect it.

Source: FlashMLA (fp8_584), vllm-ascend kv_compress_epilog (fp8_640), vLLM indexer caches
(fp4_68, fp8_132), npu_vllm_quant_lightning_indexer (int8).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from v4_ascend.ops import formats
from v4_ascend.ops.act_quant import act_quant, fp4_act_quant
from v4_ascend.ops.op import BOTH, ROUNDED, Case, op

KV_DIM, ROPE_DIM, INDEX_DIM = 512, 64, 128  # what packed records are made for
KV_GROUP, INDEX_FP4_GROUP = 64, 32  # channels per scale
INT8_MAX = 127.0
Codec = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Record:
    """One row format of a cache.

    Attributes:
        name: what configuration and operator calls say.
        dtype: of the storage.
        row_dim: channels it holds; None for plain records of any width.
        data_bytes, tail_bytes: of one row; a page is all rows' data, then all rows' tails.
        encode: rows [n, row_dim] to bytes [n, data_bytes + tail_bytes].
        decode: those bytes to fp32 rows.
    """

    name: str
    dtype: torch.dtype
    row_dim: int | None = None
    data_bytes: int = 0
    tail_bytes: int = 0
    encode: Codec | None = None
    decode: Codec | None = None

    def new_storage(
        self, n_blocks: int, block_rows: int, row_dim: int, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Allocate zeroed storage [n_blocks, block_rows, width].

        Raises:
            ValueError: this record is made for rows of another width.
        """
        if self.row_dim not in (None, row_dim):
            raise ValueError(f"record {self.name} holds rows of {self.row_dim}, got {row_dim}")
        width = row_dim if self.row_dim is None else self.data_bytes + self.tail_bytes
        return torch.zeros(n_blocks, block_rows, width, dtype=self.dtype, device=device)

    def regions(self, storage: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """View packed storage as data and tails, [n_blocks, block_rows, bytes] each."""
        n_blocks, block_rows, _ = storage.shape
        page = storage.view(n_blocks, -1)
        cut = block_rows * self.data_bytes
        data = page[:, :cut].unflatten(1, (block_rows, self.data_bytes))
        tail = page[:, cut:].unflatten(1, (block_rows, self.tail_bytes))
        return data, tail


def _bytes(x: torch.Tensor) -> torch.Tensor:
    # Through one dim: rows of one element may have any stride, which a view by bytes refuses.
    flat = x.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
    return flat.view(len(x), x.shape[-1] * x.element_size())


def _split_kv(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    values, scales = act_quant.reference(rows[:, :-ROPE_DIM], KV_GROUP)
    return _bytes(values), _bytes(scales), _bytes(rows[:, -ROPE_DIM:].to(torch.bfloat16))


def _join_kv(values: torch.Tensor, scales: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    fp8 = values.contiguous().view(formats.FP8)
    nope = formats.dequantize_groups(fp8, scales.contiguous().view(formats.E8M0))
    return torch.cat((nope, rope.contiguous().view(torch.bfloat16).float()), dim=-1)


def _encode_584(rows: torch.Tensor) -> torch.Tensor:
    values, scales, rope = _split_kv(rows)
    return torch.cat((values, rope, scales, torch.zeros_like(scales[:, :1])), dim=-1)


def _decode_584(packed: torch.Tensor) -> torch.Tensor:
    values, rope, scales, _ = packed.split((448, 128, 7, 1), dim=-1)
    return _join_kv(values, scales, rope)


def _encode_640(rows: torch.Tensor) -> torch.Tensor:
    values, scales, rope = _split_kv(rows)
    pad = torch.zeros(len(rows), 57, dtype=torch.uint8, device=rows.device)
    return torch.cat((rope, values, scales, pad), dim=-1)


def _decode_640(packed: torch.Tensor) -> torch.Tensor:
    rope, values, scales, _ = packed.split((128, 448, 7, 57), dim=-1)
    return _join_kv(values, scales, rope)


def _encode_fp4(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([_bytes(t) for t in fp4_act_quant.reference(rows, INDEX_FP4_GROUP)], dim=-1)


def _decode_fp4(packed: torch.Tensor) -> torch.Tensor:
    values, scales = packed.split((INDEX_DIM // 2, INDEX_DIM // INDEX_FP4_GROUP), dim=-1)
    e8m0 = scales.contiguous().view(formats.E8M0)
    return formats.dequantize_fp4(values.contiguous(), e8m0, INDEX_FP4_GROUP)


def _encode_fp8_index(rows: torch.Tensor) -> torch.Tensor:
    values, scale = act_quant.reference(rows, INDEX_DIM)
    return torch.cat((_bytes(values), _bytes(formats.scale_to_float(scale))), dim=-1)


def _decode_fp8_index(packed: torch.Tensor) -> torch.Tensor:
    values, scale = packed.split((INDEX_DIM, 4), dim=-1)
    fp8 = values.contiguous().view(formats.FP8)
    return fp8.float() * scale.contiguous().view(torch.float32)


def _encode_int8(rows: torch.Tensor) -> torch.Tensor:
    scale = (rows.float().abs().amax(-1, keepdim=True) / INT8_MAX).half().clamp_min(2**-24)
    values = (rows.float() / scale.float()).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
    return torch.cat((_bytes(values), _bytes(scale)), dim=-1)


def _decode_int8(packed: torch.Tensor) -> torch.Tensor:
    values, scale = packed.split((INDEX_DIM, 2), dim=-1)
    return values.contiguous().view(torch.int8).float() * scale.contiguous().view(torch.float16).to(
        torch.float32
    )


U8 = torch.uint8
RECORDS: dict[str, Record] = {
    r.name: r
    for r in (
        Record("fp32", torch.float32),
        Record("bf16", torch.bfloat16),
        Record("fp8_584", U8, KV_DIM, 576, 8, _encode_584, _decode_584),
        Record("fp8_640", U8, KV_DIM, 640, 0, _encode_640, _decode_640),
        Record("fp4_68", U8, INDEX_DIM, 64, 4, _encode_fp4, _decode_fp4),
        Record("fp8_132", U8, INDEX_DIM, 128, 4, _encode_fp8_index, _decode_fp8_index),
        Record("int8", U8, INDEX_DIM, 128, 2, _encode_int8, _decode_int8),
    )
}


def _slots(
    storage: torch.Tensor, block_table: torch.Tensor, request: torch.Tensor, row: torch.Tensor
) -> torch.Tensor:
    """Flat slot of each (request, row)."""
    block_rows = storage.shape[1]
    return block_table[request, row // block_rows].long() * block_rows + row % block_rows


def load_rows(
    storage: torch.Tensor,
    record: str,
    block_table: torch.Tensor,
    request: torch.Tensor,
    row: torch.Tensor,
) -> torch.Tensor:
    """Read rows of a paged cache; `request` and `row` broadcast against each other.

    Shapes:
        storage      as `Record.new_storage`
        block_table  [batch, max_blocks]  int32
        request, row any common shape, integers
        return       [*shape, row_dim]  the storage's dtype; fp32 for packed records
    """
    return load_slots(storage, record, _slots(storage, block_table, request, row))


def load_slots(storage: torch.Tensor, record: str, slots: torch.Tensor) -> torch.Tensor:
    """Read rows by their flat slots, block * block_rows + offset; otherwise as `load_rows`."""
    fmt = RECORDS[record]
    if fmt.decode is None:
        return storage.view(-1, storage.shape[-1])[slots]
    block, offset = slots // storage.shape[1], slots % storage.shape[1]
    parts = [region[block, offset] for region in fmt.regions(storage)]
    return fmt.decode(torch.cat(parts, dim=-1).flatten(0, -2)).unflatten(0, slots.shape)


def _inputs(g: torch.Generator, record: str, n_rows: int, row_dim: int) -> dict[str, Any]:
    fmt = RECORDS[record]
    slots = torch.randperm(5 * 32, generator=g)[:n_rows]
    slots[n_rows // 2 : n_rows // 2 + 1] = -1
    return {
        "storage": fmt.new_storage(5, 32, row_dim),
        "rows": torch.randn(n_rows, row_dim, generator=g).to(
            fmt.dtype if fmt.decode is None else torch.bfloat16
        ),
        "slot_mapping": slots,
        "record": record,
    }


def _cases() -> Iterator[Case]:
    for record in RECORDS.values():
        for n_rows in (0, 1, 33):
            make = partial(_inputs, record=record.name, n_rows=n_rows, row_dim=record.row_dim or 72)
            yield Case(f"{record.name}-{n_rows}", make)
        for row_dim in (record.row_dim,) if record.row_dim else (KV_DIM, INDEX_DIM):
            make = partial(_inputs, record=record.name, n_rows=130, row_dim=row_dim)
            yield Case(f"{record.name}-130x{row_dim}", make, BOTH)


@op(cases=_cases, tolerance=ROUNDED, mutates=("storage",))
def store_rows(
    storage: torch.Tensor, rows: torch.Tensor, slot_mapping: torch.Tensor, record: str
) -> torch.Tensor:
    """Write rows to their slots of a paged cache, encoded as `record`; slot -1 is skipped.

    Packed records quantise what they are given; a value already on their grid is unchanged.

    Shapes:
        storage       as `Record.new_storage`, written in place
        rows          [n_rows, row_dim]  bf16 or fp32
        slot_mapping  [n_rows]  int64: block * block_rows + offset
        return        storage
    """
    kept = slot_mapping >= 0
    rows, slots = rows[kept], slot_mapping[kept]
    fmt = RECORDS[record]
    if fmt.encode is None:
        storage.view(-1, storage.shape[-1])[slots] = rows.to(storage.dtype)
        return storage
    block, offset = slots // storage.shape[1], slots % storage.shape[1]
    packed = fmt.encode(rows).split((fmt.data_bytes, fmt.tail_bytes), dim=-1)
    for region, part in zip(fmt.regions(storage), packed, strict=True):
        region[block, offset] = part
    return storage
