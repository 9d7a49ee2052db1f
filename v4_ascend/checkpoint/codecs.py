"""How linear weights are stored, and from one way to another. Imports torch: it decodes.

A weight is taken apart by rows, `BLOCK` at a time or a multiple: every format is made of such rows
alone, so that memory does not grow with the weight.

Sources: OCP MX 1.0; DeepSeek-V4 inference/convert.py (FP4 to FP8); vllm-ascend's
methods/w8a8_dynamic.py and methods/w4a8.py (INT8, INT4 and the bias), msmodelslim (symmetric, by
output channel).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

import torch

from v4_ascend.checkpoint.header import TensorHeader
from v4_ascend.config.inventory import FP4_GROUP, FP8_BLOCK, MX_GROUP, TensorSpec
from v4_ascend.config.quant_types import ENDINGS, QuantType, base_of
from v4_ascend.errors import CheckpointError
from v4_ascend.ops import formats

BLOCK = FP8_BLOCK
INT8_MAX, INT4_MAX = 127, 7
CLIPS = tuple(1 - step / 20 for step in range(11))  # of a channel's largest value, with calibration
Kind = Literal["plain", "fp8", "fp4"] | QuantType
Parts = dict[str, torch.Tensor]
_KINDS: dict[tuple[tuple[str, str], ...], Kind] = {
    (("weight", "BF16"),): "plain",
    (("weight", "F32"),): "plain",
    (("weight", "F8_E4M3"), ("scale", "F8_E8M0")): "fp8",
    (("weight", "F8_E4M3"), ("scale", "F32")): "fp8",
    (("weight", "I8"), ("scale", "F8_E8M0")): "fp4",
    (("weight", "F8_E4M3"), ("weight_scale", "U8")): "W8A8_MXFP8",
    (("weight", "I8"), ("weight_scale", "F32"), ("weight_offset", "F32")): "W8A8_DYNAMIC",
    (
        ("weight", "I8"),
        ("weight_scale", "F32"),
        ("weight_offset", "F32"),
        ("scale_bias", "F32"),
    ): "W4A8_DYNAMIC",
}


class RowErrors(NamedTuple):
    """How far rows are from what they were made of.

    Shapes: n_changed [rows] int64, largest [rows] fp32, of_errors, of_values [rows] fp64: the
    largest error, the sum of the errors' squares, and that of the source's values.
    """

    n_changed: torch.Tensor
    largest: torch.Tensor
    of_errors: torch.Tensor
    of_values: torch.Tensor

    @classmethod
    def empty(cls, rows: int) -> RowErrors:
        """Make room for so many rows."""
        types = (torch.int64, torch.float32, torch.float64, torch.float64)
        return cls(*(torch.empty(rows, dtype=t) for t in types))

    @classmethod
    def between(cls, x: torch.Tensor, y: torch.Tensor) -> RowErrors:
        """Compare values `x` [rows, n_in] fp32 with what became of them."""
        error = y - x
        return cls(error.count_nonzero(-1), error.abs().amax(-1), _squares(error), _squares(x))


def _squares(x: torch.Tensor) -> torch.Tensor:
    """Sum squares along rows in fp64: the order of the sum is lost in the digits reported."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64).square()


@dataclass(frozen=True)
class Stored:
    """One linear layer, or another plain tensor, as a checkpoint has it."""

    kind: Kind
    n_out: int
    n_in: int
    specs: Mapping[str, TensorSpec | TensorHeader]  # by ending

    @classmethod
    def of(cls, specs: Iterable[TensorSpec | TensorHeader]) -> Stored:
        """Tell the format from names and dtypes.

        Raises:
            CheckpointError: it is none that can be converted.
        """
        listed = tuple(specs)
        found = {s.name.removeprefix(f"{base_of(s.name)}."): s for s in listed}
        by_ending = {e: found[e] for e in ENDINGS if e in found}
        kind = _KINDS.get(tuple((e, s.dtype) for e, s in by_ending.items()))
        if kind is None:
            told = ", ".join(f"{s.name} {s.dtype}" for s in listed)
            raise CheckpointError(f"{told}: no format that can be converted")
        shape = by_ending["weight"].shape
        n_out, n_in = shape[0], prod(shape[1:])
        if kind == "fp4":
            n_in *= 2
        elif kind == "W4A8_DYNAMIC":
            n_out *= 2
        return cls(kind, n_out, n_in, by_ending)

    def span(self, ending: str, first: int, end: int) -> tuple[int, int]:
        """Return the rows of one tensor that weight rows `first` to `end` need."""
        if self.kind == "fp8" and ending == "scale":
            return first // BLOCK, -(-end // BLOCK)
        if self.kind == "W4A8_DYNAMIC" and ending == "weight":
            return first // 2, end // 2
        return first, end


def decode(stored: Stored, parts: Parts) -> torch.Tensor:
    """Return the values in fp32, [rows, n_in]."""
    weight = parts["weight"]
    match stored.kind:
        case "plain":
            return weight.float().reshape(len(weight), -1)
        case "fp8":
            return formats.dequantize_fp8_block(weight, parts["scale"])
        case "fp4":
            return _fp4_values(weight, parts["scale"])
        case "W8A8_MXFP8":
            return formats.dequantize_groups(weight, parts["weight_scale"].view(formats.E8M0))
        case "W8A8_DYNAMIC":
            return weight.float() * parts["weight_scale"]
        case "W4A8_DYNAMIC":
            return formats.unpack_int4_rows(weight).float() * parts["weight_scale"]


def _fp4_values(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return fp4 values by bits: a code at the top of fp16's mantissa is the value by 2^14."""
    byte = packed.view(torch.uint8).to(torch.int16)
    low = ((byte & 0x07) << 9) | ((byte & 0x08) << 12)
    high = ((byte & 0x70) << 5) | ((byte & 0x80) << 8)
    value = torch.stack((low, high), -1).flatten(-2).view(torch.float16).float().mul_(2**14)
    grouped = value.unflatten(-1, (-1, FP4_GROUP))
    return (grouped * formats.scale_to_float(scale).unsqueeze(-1)).flatten(-2)


def encode(stored: Stored, x: torch.Tensor, importance: torch.Tensor | None) -> Parts:
    """Round values to a format; `importance` [n_in] weighs errors where a scale may be chosen."""
    match stored.kind:
        case "plain":
            spec = stored.specs["weight"]
            dtype = torch.float32 if spec.dtype == "F32" else torch.bfloat16
            return {"weight": x.to(dtype).reshape(-1, *spec.shape[1:])}
        case "fp8":
            weight, scale = formats.quantize_fp8_block(x)
            is_f32 = stored.specs["scale"].dtype == "F32"
            return {"weight": weight, "scale": formats.scale_to_float(scale) if is_f32 else scale}
        case "fp4":
            weight, scale = formats.quantize_fp4(x)
            return {"weight": weight, "scale": scale}
        case "W8A8_MXFP8":
            grouped = x.unflatten(-1, (-1, MX_GROUP))
            scale = formats.fp8_scale(grouped.abs().amax(-1))
            scaled = grouped / formats.scale_to_float(scale).unsqueeze(-1)
            weight = formats.round_to_fp8(scaled).flatten(-2)
            return {"weight": weight, "weight_scale": scale.view(torch.uint8)}
        case "W8A8_DYNAMIC":
            value, scale = _by_channel(x, INT8_MAX, importance)
            return {"weight": value, "weight_scale": scale, "weight_offset": _zeros(scale)}
        case "W4A8_DYNAMIC":
            value, scale = _by_channel(x, INT4_MAX, importance)
            n_columns = stored.specs["scale_bias"].shape[1]
            sums = value.unflatten(-1, (n_columns, -1)).sum(-1, dtype=torch.float32)
            return {
                "weight": formats.pack_int4_rows(value),
                "weight_scale": scale,
                "weight_offset": _zeros(scale),
                # The kernel takes 8 from the low half of each INT8 activation to make it signed.
                "scale_bias": 8 * sums * scale,
            }


def _zeros(scale: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(scale)


def _by_channel(
    x: torch.Tensor, most: int, importance: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round rows to the nearest of -most..most steps: int8 [rows, n_in], scale fp32 [rows, 1]."""
    largest = x.abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, largest / most, 1.0)
    if importance is not None:
        best = torch.full_like(scale, float("inf"))
        chosen = scale
        for clip in CLIPS:
            tried = scale * clip
            error = (_rounded(x, tried, most) * tried - x).square() @ importance.unsqueeze(-1)
            is_better = error < best
            best = torch.where(is_better, error, best)
            chosen = torch.where(is_better, tried, chosen)
        scale = chosen
    return _rounded(x, scale, most).to(torch.int8), scale


def _rounded(x: torch.Tensor, scale: torch.Tensor, most: int) -> torch.Tensor:
    return (x / scale).round_().clamp_(-most, most)
