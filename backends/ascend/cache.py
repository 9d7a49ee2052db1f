"""Writing rows of the paged caches."""

from __future__ import annotations

import torch

from v4_ascend.backends.ascend.custom_ops import c_ascend, torch_npu
from v4_ascend.backends.ascend.soc import NARROW_CHIPS, current_chip
from v4_ascend.ops import store_rows
from v4_ascend.ops.formats import FP8
from v4_ascend.ops.records import KV_GROUP, RECORDS

PAGE_STEP, MAX_PAGE = 16, 1024  # rows of a page the vendor's kernels read


def why_no_page(name: str, storage: torch.Tensor) -> str | None:
    """Refuse pages that the kernels reading them cannot address."""
    rows = storage.shape[1]
    if rows % PAGE_STEP or not 0 < rows <= MAX_PAGE:
        return (
            f"{name} has pages of {rows} rows, must be a multiple of {PAGE_STEP} up to {MAX_PAGE}"
        )
    return None


def _why_no_epilog(want: str, record: str, rows: torch.Tensor) -> str | None:
    if record != want:
        return f"the record is {record}, it writes {want}"
    if rows.dtype != torch.bfloat16:
        return f"rows are {rows.dtype}, must be bf16"
    return None


def _why_no_kv(
    storage: torch.Tensor, rows: torch.Tensor, slot_mapping: torch.Tensor, record: str
) -> str | None:
    return _why_no_epilog("fp8_640", record, rows)


@store_rows.kernel("ascend", provider="_C_ascend", why_not=_why_no_kv)
def kv_compress_epilog(
    storage: torch.Tensor, rows: torch.Tensor, slot_mapping: torch.Tensor, record: str
) -> torch.Tensor:
    """Quantise and write fp8 rows of 640 bytes in one call; negative slots are skipped."""
    if len(rows):
        c_ascend("kv_compress_epilog")(
            kv_compress_cache=storage.view(FP8).view(-1, 1, storage.shape[-1]),
            x=rows.contiguous(),
            slot_mapping=slot_mapping.int(),
            quant_group_size=KV_GROUP,
            quant_mode=2,
            round_scale_flag=True,
            layout=1,
        )
    return storage


def _why_no_index(
    storage: torch.Tensor, rows: torch.Tensor, slot_mapping: torch.Tensor, record: str
) -> str | None:
    return _why_no_epilog("fp8_132", record, rows) or why_no_page("storage", storage)


@store_rows.kernel("ascend", provider="_C_ascend", why_not=_why_no_index)
def indexer_compress_epilog(
    storage: torch.Tensor, rows: torch.Tensor, slot_mapping: torch.Tensor, record: str
) -> torch.Tensor:
    """Quantise and write the indexer's fp8 keys, a page's scales behind its keys."""
    if len(rows):
        c_ascend("indexer_compress_epilog_v2")(
            indexer_compress_cache=storage.unsqueeze(2),
            x=rows.contiguous(),
            slot_mapping=slot_mapping.int(),
            layout=2,
        )
    return storage


def _block_and_offset(
    storage: torch.Tensor, slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    block_rows = storage.shape[1]
    return slots.div(block_rows, rounding_mode="floor"), slots % block_rows


def _why_no_scatter(
    storage: torch.Tensor, rows: torch.Tensor, slot_mapping: torch.Tensor, record: str
) -> str | None:
    if record not in ("bf16", "int8"):
        return f"the record is {record}, it writes bf16 and int8"
    return None


@store_rows.kernel("ascend", provider="_C_ascend", why_not=_why_no_scatter)
def scatter_nd_update(
    storage: torch.Tensor, rows: torch.Tensor, slot_mapping: torch.Tensor, record: str
) -> torch.Tensor:
    """Write rows at [block, offset]; [-1, last] is the row before the first: skipped.

    int8 rows are encoded by torch; their values and their scales are written one after the
    other, to views of the page they share.
    """
    if not len(rows):
        return storage
    at = torch.stack(_block_and_offset(storage, slot_mapping.int()), dim=-1)
    scatter, fmt = c_ascend("npu_scatter_nd_update_v2"), RECORDS[record]
    if fmt.encode is None:
        scatter(storage, at, rows.to(storage.dtype).contiguous())
        return storage
    parts = fmt.encode(rows).split((fmt.data_bytes, fmt.tail_bytes), dim=-1)
    dtypes = (torch.int8, torch.float16)
    for region, part, dtype in zip(fmt.regions(storage), parts, dtypes, strict=True):
        scatter(region.view(dtype), at, part.contiguous().view(dtype))
    return storage


def _why_no_stock(
    storage: torch.Tensor, rows: torch.Tensor, slot_mapping: torch.Tensor, record: str
) -> str | None:
    if record.startswith(("fp8", "fp4")) and current_chip() not in NARROW_CHIPS:
        return f"the record is {record}: {current_chip()} has no fp8 and no fp4"
    return None


@store_rows.kernel("ascend", provider="torch_npu", why_not=_why_no_stock)
def stock_scatter_nd_update(
    storage: torch.Tensor, rows: torch.Tensor, slot_mapping: torch.Tensor, record: str
) -> torch.Tensor:
    """Write rows that torch has encoded; the operator skips nothing, so skipped rows repeat one."""
    if not len(rows):
        return storage
    fmt = RECORDS[record]
    regions: tuple[torch.Tensor, ...] = (storage,)
    parts: tuple[torch.Tensor, ...] = (rows.to(storage.dtype),)
    if fmt.encode is not None:
        regions = tuple(r.view(torch.int8) for r in fmt.regions(storage))
        parts = fmt.encode(rows).view(torch.int8).split((fmt.data_bytes, fmt.tail_bytes), dim=-1)
    last, row = slot_mapping.max(0, keepdim=True)
    slots = torch.where(slot_mapping < 0, last.clamp_min(0), slot_mapping).int()
    at = torch.stack(_block_and_offset(storage, slots), dim=-1)
    skipped = (slot_mapping < 0).unsqueeze(1)
    for region, part in zip(regions, parts, strict=True):
        if not part.shape[1]:
            continue
        # The last slot's row again; where there is none, what the first slot has.
        there = region[_block_and_offset(storage, last.clamp_min(0))]
        again = torch.where(last.unsqueeze(1) < 0, there, part[row])
        torch_npu().npu_scatter_nd_update_(region, at, torch.where(skipped, again, part))
    return storage
