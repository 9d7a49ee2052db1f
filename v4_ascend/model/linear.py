"""Weights as the checkpoint stores them, and products with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from v4_ascend.model.numerics import Numerics
from v4_ascend.ops import act_quant, fp8_gemm, grouped_gemm
from v4_ascend.ops.formats import FP8, dequantize_fp4, dequantize_fp8_block
from v4_ascend.ops.gemm import ACT_GROUP

# Reads one tensor by its official name, in its official dtype.
Source = Callable[[str], torch.Tensor]


def _is_quantized(weight: torch.Tensor) -> bool:
    return weight.dtype in (FP8, torch.int8)


def _widen(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    dequantize = dequantize_fp4 if weight.dtype == torch.int8 else dequantize_fp8_block
    return dequantize(weight, scale)


def read_plain(source: Source, name: str, dtype: torch.dtype) -> torch.Tensor:
    """Read a weight and widen it if it is quantised."""
    weight = source(f"{name}.weight")
    if _is_quantized(weight):
        weight = _widen(weight, source(f"{name}.scale"))
    return weight.to(dtype)


@dataclass(frozen=True)
class Linear:
    """``x @ weight.T`` in the weight's own format.

    Shapes:
        weight  [out, in]  the numerics' dtype, or e4m3 with `scale`
    """

    weight: torch.Tensor
    scale: torch.Tensor | None
    dtype: torch.dtype

    @classmethod
    def read(cls, source: Source, name: str, numerics: Numerics) -> Linear:
        """Read ``name.weight``, and its scale if it has one."""
        linear = cls.read_raw(source, name, numerics)
        if linear.scale is not None:
            fp8_gemm.prepare(linear.weight, linear.scale)
        return linear

    @classmethod
    def read_raw(cls, source: Source, name: str, numerics: Numerics) -> Linear:
        """Read it to be joined with others: it is not prepared for products of its own."""
        weight = source(f"{name}.weight")
        if not _is_quantized(weight):
            return cls(weight.to(numerics.dtype), None, numerics.dtype)
        scale = source(f"{name}.scale")
        if numerics.quant_sim:
            return cls(weight, scale, numerics.dtype)
        return cls(_widen(weight, scale).to(numerics.dtype), None, numerics.dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply [n_tokens, in] to [n_tokens, out]."""
        if self.scale is None:
            return F.linear(x, self.weight)
        return fp8_gemm(*act_quant(x, ACT_GROUP), self.weight, self.scale, self.dtype)


@dataclass(frozen=True)
class GroupedLinear:
    """One weight per expert, stacked; rows come grouped by expert.

    Shapes:
        weight  [n_experts, out, in], or packed as `grouped_gemm` says, with `scale`
    """

    weight: torch.Tensor
    scale: torch.Tensor | None
    dtype: torch.dtype

    @classmethod
    def read(
        cls, source: Source, names: list[tuple[str, ...]], numerics: Numerics
    ) -> GroupedLinear:
        """Stack experts; the parts of one expert are joined along its outputs.

        An expert is let go before the next one is read: beside the stack there is never more.
        """
        weight = scale = None

        def place(number: int) -> None:
            nonlocal weight, scale
            parts = [Linear.read_raw(source, name, numerics) for name in names[number]]
            weight = _placed(weight, number, len(names), [p.weight for p in parts])
            if parts[0].scale is not None:
                scales = [p.scale for p in parts if p.scale is not None]
                scale = _placed(scale, number, len(names), scales)

        for number in range(len(names)):
            place(number)
        if weight is None:
            raise ValueError("no experts to read")
        if scale is not None:
            grouped_gemm.prepare(weight, scale)
        return cls(weight, scale, numerics.dtype)

    @property
    def rounds_input(self) -> bool:
        """Whether a product begins with `act_quant` of its rows."""
        return self.scale is not None

    def __call__(self, x: torch.Tensor, group_sizes: torch.Tensor) -> torch.Tensor:
        """Multiply [n_rows, in] to [n_rows, out], group by group."""
        if self.scale is None:
            return grouped_gemm(x, None, self.weight, None, group_sizes, self.dtype)
        values, scales = act_quant(x, ACT_GROUP)
        return grouped_gemm(values, scales, self.weight, self.scale, group_sizes, self.dtype)


def _placed(
    stack: torch.Tensor | None, number: int, count: int, parts: list[torch.Tensor]
) -> torch.Tensor:
    """Write one expert, its parts joined, to its place of `count` in the stack."""
    if stack is None:
        rows = sum(len(p) for p in parts)
        stack = parts[0].new_empty(count, rows, *parts[0].shape[1:])
    place = _raw(stack)[number]
    first = 0
    for part in parts:
        place[first : first + len(part)] = _raw(part)
        first += len(part)
    return stack


def _raw(x: torch.Tensor) -> torch.Tensor:
    """View one-byte formats as bytes: torch joins those, and never converts them."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x
