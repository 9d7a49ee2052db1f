"""The switches that decide what is rounded where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from v4_ascend.config.model import ModelConfig

Dtype = Literal["fp32", "bf16"]
QuantSim = Literal["auto", "on", "off"]
TORCH_DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Numerics:
    """How one process computes.

    Attributes:
        dtype: of streams and GEMM outputs; what the precision ledger keeps in fp32 stays there.
        quant_sim: simulate FP8 and FP4 in caches and indexer, and quantise the input of every
            GEMM whose weight is quantised. Off, quantised weights are widened at load.
    """

    dtype: torch.dtype
    quant_sim: bool

    @classmethod
    def of(cls, config: ModelConfig, dtype: Dtype | None, quant_sim: QuantSim) -> Numerics:
        """Resolve the user's choices; the defaults follow the checkpoint."""
        on = config.quantization is not None if quant_sim == "auto" else quant_sim == "on"
        return cls(dtype=TORCH_DTYPES[dtype or config.dtype], quant_sim=on)
