"""Drawing tokens on the CPU: only rows that are drawn by chance are sorted."""

from __future__ import annotations

import torch

from v4_ascend.ops import sample


@sample.kernel("cpu", provider="torch")
def sample_unsorted(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    top_k: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """Take the highest logit where the temperature is 0; sort the other rows alone.

    A sort of 129,280 logits takes milliseconds, their maximum microseconds. Of equal ones argmax
    returns the first, as the reference does.
    """
    by_chance = temperature.nonzero().squeeze(-1)
    ids = logits.argmax(-1)
    if len(by_chance):
        rows = (logits, temperature, top_p, seeds, positions, top_k, min_p)
        ids[by_chance] = sample.reference(*(row[by_chance] for row in rows))
    return ids
