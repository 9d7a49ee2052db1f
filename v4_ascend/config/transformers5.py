"""Fold the nested ``config.json`` that transformers 5 saves back to the published form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from v4_ascend.errors import ConfigError

RATIOS = {
    "sliding_attention": 0,
    "compressed_sparse_attention": 4,
    "heavily_compressed_attention": 128,
}
# What folding uses up, and what transformers adds for training.
CONSUMED = {
    "layer_types",
    "mlp_layer_types",
    "rope_parameters",
    "compress_rates",
    "partial_rotary_factor",
    "mlp_bias",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
}


def fold(raw: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return the published form of what transformers 5 saved, and anything else as it is.

    Raises:
        ConfigError: a nested part is not what transformers 5 writes.
    """
    if "layer_types" not in raw:
        return raw
    kept = {k: v for k, v in raw.items() if k not in CONSUMED}
    kept["num_hash_layers"] = _n_hash_layers(raw.get("mlp_layer_types"), where)
    # transformers forgets the entries of MTP layers, which are all 0.
    n_mtp = raw.get("num_nextn_predict_layers", 1)
    kept["compress_ratios"] = _ratios(raw["layer_types"], where) + [0] * _count(n_mtp)
    match raw.get("rope_parameters"):
        case {"main": {"rope_theta": theta}, "compress": {"rope_theta": compress} as scaling}:
            kept |= {"rope_theta": theta, "compress_rope_theta": compress, "rope_scaling": scaling}
        case other:
            raise ConfigError(where, f"rope_parameters must have main and compress, got {other!r}")
    match raw.get("quantization_config"):
        case {"expert_dtype": experts}:
            kept["expert_dtype"] = experts
    return kept


def _ratios(layer_types: Any, where: str) -> list[int]:
    match layer_types:
        case [*kinds] if all(isinstance(k, str) and k in RATIOS for k in kinds):
            return [RATIOS[k] for k in kinds]
    raise ConfigError(where, f"layer_types must be a list of {', '.join(RATIOS)}")


def _n_hash_layers(mlp_layer_types: Any, where: str) -> int:
    match mlp_layer_types:
        case [*kinds] if kinds == sorted(kinds, key=lambda kind: kind != "hash_moe"):
            return kinds.count("hash_moe")
    raise ConfigError(where, "mlp_layer_types must be a list, every hash_moe before every moe")


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0  # a wrong one, its field refuses
