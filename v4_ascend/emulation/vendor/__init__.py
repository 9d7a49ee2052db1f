"""CPU stand-ins for the vendor's operators, written from the vendor's documents."""

from v4_ascend.emulation.vendor import (
    attention,
    batched,
    cache,
    compressor,
    expert_gemm,
    expert_layer,
    gate,
    gemm,
    hyper_connection,
    indexer,
    mc2,
    metadata,
    norm,
    routing,
)

__all__ = [
    "attention",
    "batched",
    "cache",
    "compressor",
    "expert_gemm",
    "expert_layer",
    "gate",
    "gemm",
    "hyper_connection",
    "indexer",
    "mc2",
    "metadata",
    "norm",
    "routing",
]
