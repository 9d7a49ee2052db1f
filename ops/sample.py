"""Choose the next token of each sequence."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from v4_ascend.ops.op import BOTH, Case, op


def _inputs(
    g: torch.Generator, n: int, vocab_size: int, temperature: float | None
) -> dict[str, Any]:
    # Rounded logits tie. Without a temperature every second row is greedy.
    warm = torch.arange(n) % 2 * 0.7 if temperature is None else torch.full((n,), temperature)
    return {
        "logits": (torch.randn(n, vocab_size, generator=g) * 8).round() / 8 * 3,
        "temperature": warm,
        "top_p": torch.linspace(0.05, 1.0, n) if n else torch.empty(0),
        "seeds": torch.randint(0, 1 << 62, (n,), generator=g),
        "positions": torch.randint(0, 1 << 20, (n,), generator=g),
        "top_k": torch.randint(0, 2 + vocab_size // 4, (n,), generator=g),
        "min_p": torch.rand(n, generator=g) * 0.5,
    }


def _cases() -> Iterator[Case]:
    for n, vocab_size in ((0, 16), (1, 1), (64, 33), (32, 129280)):
        for temperature in (0.0, 0.6, 1.5, None):
            make = partial(_inputs, n=n, vocab_size=vocab_size, temperature=temperature)
            yield Case(
                f"{n}x{vocab_size}-t{'mixed' if temperature is None else temperature}",
                make,
                models=BOTH if vocab_size > 1000 else (),
            )


def uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Hash (seed, position) to [0, 1): 24 bits, the same on every device and in every batch.

    Shapes:
        seeds, positions  [n]  int64
        return            [n]  fp32
    """
    mask = 0xFFFFFFFF
    x = (seeds ^ (seeds >> 32)) & mask
    for word in (positions & mask, (seeds >> 32) & mask):
        x = (x ^ word) & mask
        # lowbias32 (Wellons): a 32-bit integer hash, exact in 64-bit arithmetic
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = ((x ^ (x >> shift)) * factor) & mask
        x = x ^ (x >> 16)
    return (x >> 8).float() * 2.0**-24


@op(cases=_cases, tolerance={})
def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    top_k: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """Draw a token from ``softmax(logits / temperature)``, cut three times.

    First to the `top_k` most likely tokens and those at least `min_p` times as likely as the
    first, then to the `top_p` nucleus of what is left. The random number is a hash of (seed,
    position), so a request gets the same tokens alone or in a batch. Temperature 0 takes the
    highest logit; ties go to the lower id. A logit of -inf is never drawn.

    Shapes:
        logits       [n, vocab_size]  fp32
        temperature  [n]  fp32
        top_p        [n]  fp32 in (0, 1]
        seeds        [n]  int64, positions [n] int64: where the drawn token will stand
        top_k        [n]  int64, 0 for all
        min_p        [n]  fp32 in [0, 1], 0 for all
        return       [n]  int64
    """
    order = logits.sort(dim=-1, descending=True, stable=True)
    warm = temperature.clamp_min(1e-5).unsqueeze(-1)
    p = (order.values / warm).softmax(-1)
    place = torch.arange(p.shape[-1], device=p.device)
    is_far = place >= torch.where(top_k == 0, p.shape[-1], top_k).unsqueeze(-1)
    p = p.masked_fill(is_far | (p < min_p.unsqueeze(-1) * p[:, :1]), 0.0)
    mass = p.cumsum(-1)
    p = p.masked_fill(mass - p >= top_p.unsqueeze(-1) * mass[:, -1:], 0.0)
    p[:, :1] = p[:, :1].clamp_min(torch.finfo(p.dtype).tiny)
    mass = p.cumsum(-1)
    drawn = uniform(seeds, positions).unsqueeze(-1) * mass[:, -1:]
    rank = (mass > drawn).int().argmax(-1)
    rank = torch.where(temperature == 0, 0, rank)
    return order.indices.gather(-1, rank.unsqueeze(-1)).squeeze(-1)
