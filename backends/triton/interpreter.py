"""Mend Triton's CPU interpreter where it computes wrong numbers or stops.

Without TRITON_INTERPRET nothing is changed.
"""

from __future__ import annotations

import os
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl


def is_interpreting() -> bool:
    """Whether kernels run step by step on the CPU in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def mend() -> None:
    """Mend bf16 products and casts, and loop bounds, once, if this process interprets."""
    if not is_interpreting():
        return
    from triton.runtime import interpreter

    _widen_products(interpreter)
    _round_casts(interpreter)
    _accept_bounds(interpreter)
    _scale_products(interpreter)
    _run_assembly(interpreter)


def _widen_products(interpreter: Any) -> None:
    """Let tl.dot multiply bf16 values; it multiplies their raw 16 bits.

    Widening is what hardware does: products of bf16 are exact in fp32.
    """
    original = interpreter.InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original(self, widened(a), widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _round_casts(interpreter: Any) -> None:
    """Round fp32 to the nearest bf16, ties to even, as hardware does; it cuts the bits off."""
    original = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return original(self, src, dst_type)
        bits = src.data.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        kept = np.where(np.isnan(src.data), bits >> 16, rounded)
        return interpreter.TensorHandle(kept.astype(np.uint16), tl.bfloat16)

    interpreter.InterpreterBuilder.cast_impl = cast_impl


def _accept_bounds(interpreter: Any) -> None:
    """Let a kernel's scalar bound a loop; numpy 2.4 refuses to convert an array of one element."""
    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


def _scale_products(interpreter: Any) -> None:
    """Give it tl.dot_scaled of FP4 in groups of 32 with bf16, which it lacks."""
    magnitudes = np.array((0, 0.5, 1, 1.5, 2, 3, 4, 6), np.float32)
    values = np.concatenate((magnitudes, -magnitudes))

    def widened(x: Any, scale: Any, is_packed: bool) -> Any:
        """Rows [n, depth] in fp32, of FP4 if there are scales, else of bf16."""
        if scale is None:
            if x.dtype.scalar != tl.bfloat16:
                raise NotImplementedError(f"{x.dtype} without scales, must be bf16")
            return (x.data.astype(np.uint32) << 16).view(np.float32)
        if x.dtype.scalar != tl.uint8 or not is_packed:
            raise NotImplementedError("scales of what is not FP4 packed along the depth")
        return np.stack((values[x.data & 15], values[x.data >> 4]), -1)

    def create_dot_scaled(
        self: Any, a: Any, a_scale: Any, a_format: Any, b: Any, b_scale: Any, *rest: Any
    ) -> Any:
        _b_format, _fast, a_packed, b_packed, acc = rest
        left, right = widened(a, a_scale, a_packed), widened(b, b_scale, b_packed)
        if a_scale is not None:
            scale = np.exp2(a_scale.data.astype(np.float32) - 127).repeat(32, -1)
            left = left.reshape(len(a.data), -1) * scale
        if b_scale is not None:
            scale = np.exp2(b_scale.data.astype(np.float32) - 127).repeat(32, -1)
            right = np.moveaxis(right, 2, 1).reshape(-1, b.data.shape[1]) * scale.T
        return interpreter.TensorHandle(left @ right + acc.data, tl.float32)

    interpreter.InterpreterBuilder.create_dot_scaled = create_dot_scaled


def _run_assembly(interpreter: Any) -> None:
    """Give it PTX on packed 32-bit words, an instruction at a time; of PTX what our kernels use."""

    def value(registers: dict[str, Any], operand: str) -> Any:
        return np.uint32(int(operand, 0)) if operand[0].isdigit() else registers[operand]

    def instruction(registers: dict[str, Any], text: str) -> None:
        name, _, rest = text.partition(" ")
        to, *operands = (part.strip() for part in rest.split(","))
        a, b, *more = (value(registers, operand) for operand in operands)
        if name == "shl.b32":
            registers[to] = a << b
        elif name == "shr.u32":
            registers[to] = a >> b
        elif name == "and.b32":
            registers[to] = a & b
        elif name == "lop3.b32" and more[1] == 0xEA:
            registers[to] = (a & b) | more[0]
        else:
            raise NotImplementedError(f"PTX {text!r}")

    def create_inline_asm(
        self: Any, text: str, constraints: str, values: Any, types: Any, *rest: Any
    ) -> Any:
        n_outputs = constraints.count("=")
        registers = {
            f"${n_outputs + i}": np.ascontiguousarray(v.data).view(np.uint32)
            for i, v in enumerate(values)
        }
        for line in text.strip("{}\n").replace("\n", " ").split(";"):
            if (line := line.strip()) and not line.startswith(".reg"):
                instruction(registers, line)
        results = [
            interpreter.TensorHandle(registers[f"${i}"].view(values[0].data.dtype), types[i].scalar)
            for i in range(n_outputs)
        ]
        return SimpleNamespace(get_result=lambda i: results[i])

    interpreter.InterpreterBuilder.create_inline_asm = create_inline_asm
