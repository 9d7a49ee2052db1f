"""Rows of weights in another format, in C++: each byte as `codecs` and `lossless` make it.

Optional: where the package was built without a compiler those two do it, more slowly, and whoever
converts is told why. A library of plain functions without threads: one call works on one file's
rows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from v4_ascend.checkpoint.codecs import BLOCK, Parts, RowErrors, Stored
from v4_ascend.config.inventory import FP4_GROUP, MX_GROUP
from v4_ascend.ops import formats

NAME = "v4_ascend.checkpoint._recode"
BITS = {"W8A8_DYNAMIC": 8, "W4A8_DYNAMIC": 4}
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64}
_SIGNATURES = {
    "fp4_to_fp8": "ppppii",
    "fp4_to_mxfp8": "ppi",
    "to_bf16": "ippipi",
    "to_integers": "ippiipppippppiii",
}


def _load() -> tuple[dict[str, Callable[..., int]] | None, str | None]:
    spec = find_spec(NAME)
    if spec is None or spec.origin is None:
        return None, "the compiled conversion was not built: v4-ascend was installed without g++"
    found: dict[str, Callable[..., int]] = {}
    try:
        library = ctypes.CDLL(spec.origin)
        for name, arguments in _SIGNATURES.items():
            function: Any = getattr(library, name)
            function.argtypes = [_TYPES[a] for a in arguments]
            function.restype = ctypes.c_int64
            found[name] = function
    except (OSError, AttributeError) as e:  # of another machine, or of another version
        return None, f"the compiled conversion does not load: {e}"
    return found, None


_functions, MISSING = _load()


def is_built() -> bool:
    """Say whether the library is there."""
    return _functions is not None


def recoded(
    source: Stored, target: Stored, parts: Parts, columns: slice
) -> tuple[Parts, RowErrors | None] | None:
    """Convert rows; errors are of those columns alone, and None where no value changed.

    None where the library is not there, or this is not among what it does.
    """
    if _functions is None or source.n_in % MX_GROUP:
        return None
    match target.kind:
        case "fp8" if source.kind == "fp4":
            return _to_fp8(target, parts)
        case "W8A8_MXFP8" if source.kind == "fp4":
            return _to_mxfp8(parts)
        case "plain" if target.specs["weight"].dtype == "BF16":
            return _to_bf16(source, target, parts)
        case "W8A8_DYNAMIC" | "W4A8_DYNAMIC":
            return _to_integers(source, target, parts, columns)
    return None


def _to_fp8(target: Stored, parts: Parts) -> tuple[Parts, None] | None:
    weight, scale = parts["weight"], parts["scale"]
    rows, groups = scale.shape
    out = torch.empty(rows, groups * FP4_GROUP, dtype=formats.FP8)
    blocks = torch.empty(-(-rows // BLOCK), -(-groups * FP4_GROUP // BLOCK), dtype=formats.E8M0)
    if not _call("fp4_to_fp8", weight, scale, out, blocks, rows, groups):
        return None
    is_f32 = target.specs["scale"].dtype == "F32"
    return {"weight": out, "scale": formats.scale_to_float(blocks) if is_f32 else blocks}, None


def _to_mxfp8(parts: Parts) -> tuple[Parts, None]:
    scale = parts["scale"]
    out = torch.empty(len(scale), scale.shape[1] * FP4_GROUP, dtype=formats.FP8)
    _call("fp4_to_mxfp8", parts["weight"], out, scale.numel())
    return {"weight": out, "weight_scale": scale.view(torch.uint8)}, None


def _to_bf16(source: Stored, target: Stored, parts: Parts) -> tuple[Parts, None] | None:
    stored = _as_stored(source, parts)
    if stored is None:
        return None
    out = torch.empty(len(parts["weight"]), source.n_in, dtype=torch.bfloat16)
    if not _call("to_bf16", *stored, out, len(out)):
        return None
    return {"weight": out.reshape(-1, *target.specs["weight"].shape[1:])}, None


def _to_integers(
    source: Stored, target: Stored, parts: Parts, columns: slice
) -> tuple[Parts, RowErrors] | None:
    stored = _as_stored(source, parts)
    rows, n_in = len(parts["weight"]), source.n_in
    begin, end, _ = columns.indices(n_in)
    if stored is None or begin % MX_GROUP or end % MX_GROUP:
        return None
    bits = BITS[target.kind]
    n_sums = 0 if bits == 8 else target.specs["scale_bias"].shape[1]
    values = torch.empty(rows * bits // 8, n_in, dtype=torch.int8)
    scale, sums = torch.empty(rows, 1), torch.empty(rows, n_sums)
    errors = RowErrors.empty(rows)
    _call("to_integers", *stored, bits, values, scale, sums, n_sums, *errors, rows, begin, end)
    made = {"weight": values, "weight_scale": scale, "weight_offset": torch.zeros_like(scale)}
    return made | ({} if bits == 8 else {"scale_bias": 8 * sums * scale}), errors


def _as_stored(
    source: Stored, parts: Parts
) -> tuple[int, torch.Tensor, torch.Tensor | None, int] | None:
    """Return format, weight, scales and width, as csrc/recode.cpp numbers formats."""
    weight = parts["weight"]
    match source.kind:
        case "fp4":
            return 0, weight, parts["scale"], source.n_in
        case "fp8":
            scale = parts["scale"]
            return (1 if scale.dtype == formats.E8M0 else 2), weight, scale, source.n_in
        case "W8A8_MXFP8":
            return 3, weight, parts["weight_scale"], source.n_in
        case "plain":
            return (4 if weight.dtype == torch.bfloat16 else 5), weight, None, source.n_in
        case "W8A8_DYNAMIC" | "W4A8_DYNAMIC":
            return None


def _call(name: str, *arguments: torch.Tensor | int | None) -> int:
    if _functions is None:
        raise RuntimeError(str(MISSING))
    return _functions[name](*map(_passed, arguments))


def _passed(argument: torch.Tensor | int | None) -> int | None:
    if not isinstance(argument, torch.Tensor):
        return argument
    if not argument.is_contiguous():
        raise ValueError(f"a tensor of strides {argument.stride()} for {tuple(argument.shape)}")
    return argument.data_ptr()
