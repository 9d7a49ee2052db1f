"""The switches that decide what is rounded where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from v4_ascend.config.model import ModelConfig
from v4_ascend.config.quant_types import QuantType, Types, place_of

Dtype = Literal["fp32", "bf16"]
QuantSim = Literal["auto", "on", "off"]
TORCH_DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Numerics:
    """How one process computes.

    Attributes:
        dtype: of streams and GEMM outputs; what the precision ledger keeps in fp32 stays there.
        quant_sim: quantise the input of every GEMM whose weight is quantised, and simulate FP8
            and FP4 in caches and indexer. Off, quantised weights are widened at load.
        quant_types: how a converted checkpoint stores which linear layers. With INT8 among them
            caches are not simulated: A2 and A3 keep them in bf16.
    """

    dtype: torch.dtype
    quant_sim: bool
    quant_types: Types = ()

    @classmethod
    def of(cls, config: ModelConfig, dtype: Dtype | None, quant_sim: QuantSim) -> Numerics:
        """Resolve the user's choices; the defaults follow the checkpoint."""
        on = config.quantization is not None if quant_sim == "auto" else quant_sim == "on"
        wide = TORCH_DTYPES[dtype or config.dtype]
        return cls(dtype=wide, quant_sim=on, quant_types=config.quant_types)

    @property
    def cache_sim(self) -> bool:
        """Whether caches and indexer are rounded as the model was trained."""
        return self.quant_sim and all(t == "W8A8_MXFP8" for _, t in self.quant_types)

    def type_of(self, linear: str) -> QuantType | None:
        """Return how a linear layer is stored; None as its dtype says."""
        return dict(self.quant_types).get(place_of(linear))
