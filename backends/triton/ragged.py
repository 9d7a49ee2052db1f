"""Ragged batches on the device: nothing here waits for it."""

from __future__ import annotations

import torch


def locate(
    n_tokens: int, seq_lens: torch.Tensor, cu_seqlens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's request and position, int32 [n_tokens], as `ops.ragged.locate`."""
    token = torch.arange(n_tokens, device=seq_lens.device, dtype=torch.int32)
    request = torch.searchsorted(cu_seqlens[1:].int().contiguous(), token, right=True)
    position = token + (seq_lens - cu_seqlens[1:]).int()[request]
    return request.int(), position
