"""Weights in another format without rounding: bits are rearranged. Imports torch, for its dtypes.

Source: DeepSeek-V4 inference/convert.py (FP4 to FP8), whose bound on the spread of scales this is.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from v4_ascend.checkpoint.codecs import BLOCK, Kind, Parts, Stored
from v4_ascend.config.inventory import FP4_GROUP, MX_GROUP
from v4_ascend.ops import formats

# FP4 with a scale 2^6 below the largest of its block keeps every value as e4m3 (convert.py).
FP4_HEADROOM = 6
E2M1_TO_E4M3 = 6  # e4m3 exponent bias 7, e2m1's 1


def lossless(source: Stored, target: Stored, parts: Parts) -> Parts | None:
    """Rearrange bits so that every value stays what it is; None where that cannot be."""
    way = _LOSSLESS.get((source.kind, target.kind))
    return way(target, parts) if way else None


def _fp4_to_fp8(target: Stored, parts: Parts) -> Parts | None:
    scale = parts["scale"].view(torch.uint8).numpy()
    rows, groups = scale.shape
    per_block = BLOCK // FP4_GROUP
    padded = np.zeros((-(-rows // BLOCK) * BLOCK, -(-groups // per_block) * per_block), np.uint8)
    padded[:rows, :groups] = scale
    tiles = padded.reshape(-1, BLOCK, padded.shape[1] // per_block, per_block)
    block = tiles.max((1, 3)).astype(np.int16) - FP4_HEADROOM
    wide = block.repeat(BLOCK, 0)[:rows].repeat(per_block, 1)[:, :groups]
    # e4m3's lowest normal exponent is 1; below, or where the block's scale would be, round.
    exponent = scale.astype(np.int16) - wide + E2M1_TO_E4M3
    if exponent.min() < 1 or block.min() < 0:
        return None
    made = torch.from_numpy(block.astype(np.uint8)).view(formats.E8M0)
    is_f32 = target.specs["scale"].dtype == "F32"
    return {
        "weight": _fp4_as_fp8(parts["weight"], exponent.astype(np.uint16)),
        "scale": formats.scale_to_float(made) if is_f32 else made,
    }


def _fp4_to_mxfp8(target: Stored, parts: Parts) -> Parts:
    exponent = np.full(tuple(parts["scale"].shape), E2M1_TO_E4M3, np.uint16)
    return {
        "weight": _fp4_as_fp8(parts["weight"], exponent),
        "weight_scale": parts["scale"].view(torch.uint8),
    }


def _fp4_as_fp8(packed: torch.Tensor, exponent: np.ndarray) -> torch.Tensor:
    """Turn packed e2m1 into e4m3 by bits, two values in each 16-bit lane.

    A code of 2 or more has its exponent and mantissa in place when shifted; 1 is the subnormal
    half, 0 is zero. `exponent` [rows, groups], from 1 on, is what code 1 has in e4m3.
    """
    lane = packed.view(torch.uint8).numpy().astype(np.uint16)
    lane = (lane & 0x0F | (lane & 0xF0) << 4).astype(np.uint16, copy=False)
    sign = (lane & 0x0808) << 4
    lane &= 0x0707
    code = lane.view(np.uint8)
    is_half, is_any = (code == 1).view(np.uint8), (code != 0).view(np.uint8)
    grouped = (lane << 2).reshape(len(packed), exponent.shape[1], FP4_GROUP // 2)
    grouped += (exponent * 0x0808)[..., None]
    value = grouped.reshape(lane.shape).view(np.uint8)
    value -= is_half << 2
    value *= is_any
    value |= sign.view(np.uint8)
    return torch.from_numpy(value).view(formats.FP8)


def _fp8_to_fp8(target: Stored, parts: Parts) -> Parts | None:
    """Change the dtype of the scales alone."""
    weight, scale = parts["weight"], parts["scale"]
    if target.specs["scale"].dtype == "F32":
        return {"weight": weight, "scale": formats.scale_to_float(scale)}
    narrow = formats.ceil_to_e8m0(scale)
    is_exact = torch.equal(formats.scale_to_float(narrow), scale)
    return {"weight": weight, "scale": narrow} if is_exact else None


def _fp8_to_mxfp8(target: Stored, parts: Parts) -> Parts | None:
    weight, scale = parts["weight"], parts["scale"]
    narrow = scale if scale.dtype == formats.E8M0 else formats.ceil_to_e8m0(scale)
    if scale.dtype != formats.E8M0 and not torch.equal(formats.scale_to_float(narrow), scale):
        return None  # not a power of two
    wide = narrow.view(torch.uint8).repeat_interleave(BLOCK, 0)[: len(weight)]
    wide = wide.repeat_interleave(BLOCK // MX_GROUP, 1)[:, : weight.shape[1] // MX_GROUP]
    return {"weight": weight, "weight_scale": wide}


_LOSSLESS: dict[tuple[Kind, Kind], Callable[[Stored, Parts], Parts | None]] = {
    ("fp4", "fp8"): _fp4_to_fp8,
    ("fp8", "fp8"): _fp8_to_fp8,
    ("fp4", "W8A8_MXFP8"): _fp4_to_mxfp8,
    ("fp8", "W8A8_MXFP8"): _fp8_to_mxfp8,
}
