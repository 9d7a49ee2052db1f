"""Rotary embedding of the last dims of a head, in interleaved pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from v4_ascend.ops.op import BOTH, FLASH, PRO, ROUNDED, Case, op


def rope_freqs(
    rope_head_dim: int,
    theta: float,
    *,
    factor: float = 1.0,
    original_seq_len: int = 0,
    beta_fast: float = 32,
    beta_slow: float = 1,
) -> torch.Tensor:
    """Angle per position of each rotated pair, with YaRN if `original_seq_len` > 0.

    YaRN here has no attention factor: neither cos and sin nor the softmax scale change.

    Shapes:
        return  [rope_head_dim / 2]  fp32

    Source: DeepSeek-V4 inference/model.py, precompute_freqs_cis.
    """
    exponent = torch.arange(0, rope_head_dim, 2, dtype=torch.float32) / rope_head_dim
    freqs = 1.0 / (theta**exponent)
    if original_seq_len == 0:
        return freqs

    def pair_turning(rotations: float) -> float:
        turns = math.log(original_seq_len / (rotations * 2 * math.pi))
        return rope_head_dim * turns / (2 * math.log(theta))

    low = max(math.floor(pair_turning(beta_fast)), 0)
    high = min(math.ceil(pair_turning(beta_slow)), rope_head_dim - 1)
    span = max(high - low, 0.001)
    ramp = ((torch.arange(rope_head_dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    keep = 1 - ramp
    return freqs / factor * (1 - keep) + freqs * keep


def rope_table(positions: torch.Tensor, freqs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cos and sin of fp32(position) * fp32(freq): at 1M the fp32 rounding is part of the model.

    Shapes:
        positions  [n]       any integer
        freqs      [pairs]   fp32
        return     cos, sin [n, pairs] fp32
    """
    angle = positions.float().unsqueeze(-1) * freqs
    return angle.cos(), angle.sin()


def _inputs(
    g: torch.Generator, shape: tuple[int, ...], pairs: int, dtype: torch.dtype
) -> dict[str, Any]:
    positions = torch.randint(0, 1 << 20, shape[:1], generator=g)
    cos, sin = rope_table(positions, rope_freqs(2 * pairs, 10000.0))
    return {"x": torch.randn(shape, generator=g).to(dtype), "cos": cos, "sin": sin}


def _cases() -> Iterator[Case]:
    shapes = {
        "empty": ((0, 2, 8), 2, ()),
        "one": ((1, 8), 4, ()),
        "odd": ((3, 5, 70), 3, ()),
        "flash-q": ((128, 64, 512), 32, FLASH),
        "pro-q": ((64, 128, 512), 32, PRO),
        "index-q": ((64, 64, 128), 32, BOTH),
        "kv": ((128, 512), 32, BOTH),
    }
    for dtype in (torch.bfloat16, torch.float32):
        for name, (shape, pairs, models) in shapes.items():
            make = partial(_inputs, shape=shape, pairs=pairs, dtype=dtype)
            yield Case(f"{str(dtype).removeprefix('torch.')}-{name}", make, models)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    pairs = cos.shape[-1]
    plain, turned = x[..., : -2 * pairs], x[..., -2 * pairs :].float()
    if x.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    a, b = turned[..., 0::2], turned[..., 1::2]
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    return torch.cat((plain, turned.to(x.dtype)), dim=-1)


@op(cases=_cases, tolerance=ROUNDED)
def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the last ``2 * pairs`` dims of each row; pair i is dims 2i and 2i + 1 of them.

    Shapes:
        x       [n_tokens, head_dim] or [n_tokens, n_heads, head_dim]  bf16 or fp32
        cos     [n_tokens, pairs]  fp32, as sin
        return  as x; fp32 inside

    Source: DeepSeek-V4 inference/model.py, apply_rotary_emb.
    """
    return _rotate(x, cos, sin)


@op(cases=_cases, tolerance=ROUNDED)
def rope_inverse(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Undo `rope` with the same table: keys are values too, so outputs carry a rotation.

    Shapes: as `rope`.

    Source: technical report 2.3.3; DeepSeek-V4 inference/model.py, apply_rotary_emb(inverse).
    """
    return _rotate(x, cos, -sin)
