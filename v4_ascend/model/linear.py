"""Weights as the checkpoint stores them, and products with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from v4_ascend.model.numerics import Numerics
from v4_ascend.ops import (
    act_quant,
    fp8_gemm,
    grouped_gemm,
    grouped_int8_gemm,
    int8_act_quant,
    int8_gemm,
    linear,
)
from v4_ascend.ops.formats import E8M0, FP8, dequantize_fp4, dequantize_fp8, unpack_int4_rows
from v4_ascend.ops.gemm import ACT_GROUP
from v4_ascend.ops.op import Op

# Reads one tensor by its official name, in its official dtype.
Source = Callable[[str], torch.Tensor]


def _widen(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the values in fp32; dtypes and shapes say which format it is."""
    if weight.dtype == FP8:
        return dequantize_fp8(weight, scale)
    if scale.dtype == E8M0:
        return dequantize_fp4(weight, scale)
    values = weight if len(weight) == len(scale) else unpack_int4_rows(weight)
    return values.float() * scale.unsqueeze(-1)


def read_plain(source: Source, name: str, dtype: torch.dtype) -> torch.Tensor:
    """Read a weight that is never quantised."""
    return source(f"{name}.weight").to(dtype)


def read_wide(source: Source, name: str, numerics: Numerics) -> torch.Tensor:
    """Read a weight and widen it if it is quantised."""
    weight, scale = _read(source, name, numerics)
    return (weight if scale is None else _widen(weight, scale)).to(numerics.dtype)


def _read(
    source: Source, name: str, numerics: Numerics
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Read a weight and its scales, as one layout for each format whoever wrote them."""
    weight, kind = source(f"{name}.weight"), numerics.type_of(name)
    if kind == "W8A8_MXFP8":
        return weight, source(f"{name}.weight_scale").view(E8M0)
    if kind is not None:
        return weight, source(f"{name}.weight_scale").squeeze(-1)
    if weight.dtype in (FP8, torch.int8):
        return weight, source(f"{name}.scale")
    return weight, None


@dataclass(frozen=True)
class Int8Rows:
    """Rows that were quantised where they were made: values [n, in] and scales [n]."""

    values: torch.Tensor
    scales: torch.Tensor

    def __getitem__(self, rows: slice) -> Int8Rows:
        """Return some of the rows."""
        return Int8Rows(self.values[rows], self.scales[rows])


@dataclass(frozen=True)
class Linear:
    """``x @ weight.T`` in the weight's own format.

    Shapes:
        weight  [out, in]  the numerics' dtype; with `scale` e4m3 or int8
    """

    weight: torch.Tensor
    scale: torch.Tensor | None
    dtype: torch.dtype

    @classmethod
    def read(cls, source: Source, name: str, numerics: Numerics) -> Linear:
        """Read ``name.weight``, and its scale if it has one."""
        linear = cls.read_raw(source, name, numerics)
        if linear.scale is not None:
            gemm = int8_gemm if linear.weight.dtype == torch.int8 else fp8_gemm
            gemm.prepare(linear.weight, linear.scale)
        return linear

    @classmethod
    def read_raw(cls, source: Source, name: str, numerics: Numerics) -> Linear:
        """Read it to be joined with others: it is not prepared for products of its own."""
        weight, scale = _read(source, name, numerics)
        if scale is not None and numerics.quant_sim:
            return cls(weight, scale, numerics.dtype)
        wide = weight if scale is None else _widen(weight, scale)
        return cls(wide.to(numerics.dtype), None, numerics.dtype)

    @property
    def is_int8(self) -> bool:
        """Whether it multiplies `Int8Rows`, or what becomes them."""
        return self.scale is not None and self.weight.dtype == torch.int8

    def __call__(self, x: torch.Tensor | Int8Rows) -> torch.Tensor:
        """Multiply [n_tokens, in] to [n_tokens, out].

        Raises:
            ValueError: the rows are INT8 and the weight is not.
        """
        if isinstance(x, Int8Rows):
            if self.scale is None or not self.is_int8:
                raise ValueError(f"INT8 rows with a weight of {self.weight.dtype}")
            return int8_gemm(x.values, x.scales, self.weight, self.scale, self.dtype)
        if self.scale is None:
            return linear(x, self.weight)
        if self.is_int8:
            return self(Int8Rows(*int8_act_quant(x)))
        return fp8_gemm(*act_quant(x, ACT_GROUP), self.weight, self.scale, self.dtype)


@dataclass(frozen=True)
class GroupedLinear:
    """One weight per expert, stacked; rows come grouped by expert.

    Shapes:
        weight  [n_experts, out, in], or with `scale` as `grouped_gemm` and, if that is fp32 and
                the weight int8, `grouped_int8_gemm` say
    """

    weight: torch.Tensor
    scale: torch.Tensor | None
    dtype: torch.dtype

    @classmethod
    def read(
        cls,
        source: Source,
        names: list[tuple[str, ...]],
        numerics: Numerics,
        int_gemm: Op[..., Any] = grouped_int8_gemm,
    ) -> GroupedLinear:
        """Stack experts; the parts of one expert are joined along its outputs.

        `int_gemm` is what multiplies by INT8 and INT4.

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
            gemm = int_gemm if _is_int(weight, scale) else grouped_gemm
            gemm.prepare(weight, scale)
        return cls(weight, scale, numerics.dtype)

    @property
    def rounds_input(self) -> bool:
        """Whether a product begins with `act_quant` of its rows."""
        return self.scale is not None and not self.is_int

    @property
    def is_int(self) -> bool:
        """Whether it is INT8 or INT4."""
        return self.scale is not None and _is_int(self.weight, self.scale)

    def __call__(self, x: torch.Tensor, group_sizes: torch.Tensor) -> torch.Tensor:
        """Multiply [n_rows, in] to [n_rows, out], group by group."""
        if self.scale is None:
            return grouped_gemm(x, None, self.weight, None, group_sizes, self.dtype)
        quantised = int8_act_quant(x) if self.is_int else act_quant(x, ACT_GROUP)
        return self.of_quantised(*quantised, group_sizes)

    def of_quantised(
        self, values: torch.Tensor, scales: torch.Tensor, group_sizes: torch.Tensor
    ) -> torch.Tensor:
        """Multiply rows as the weight's format wants them: of `int8_act_quant` or `act_quant`."""
        gemm: Op[..., torch.Tensor] = grouped_int8_gemm if self.is_int else grouped_gemm
        return gemm(values, scales, self.weight, self.scale, group_sizes, self.dtype)


def _is_int(weight: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether int8 bytes are INT8 or INT4; with E8M0 scales they are FP4."""
    return weight.dtype == torch.int8 and scale.dtype == torch.float32


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
