"""ModelConfig: V4's dimensions under the names of DeepSeek's own inference code.

The keys of a Hugging Face ``config.json`` are translated here and appear nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from v4_ascend.config.quant_types import DESCRIPTION, Types, read_types
from v4_ascend.config.transformers5 import fold
from v4_ascend.errors import ConfigError

LayerKind = Literal["swa", "csa", "hca"]
KINDS: dict[int, LayerKind] = {0: "swa", 4: "csa", 128: "hca"}
SUPPORTED = "deepseek_v4"
ACT_GROUP, KV_GROUP, INDEX_GROUP = 128, 64, 32  # channels that share a scale when quantised

Count = Annotated[int, Field(ge=1)]
Ordinal = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]

# HF key -> ours. What is not here is either in DERIVED, known and dropped, or reported.
NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "head_dim": "head_dim",
    "qk_rope_head_dim": "rope_head_dim",
    "q_lora_rank": "q_lora_rank",
    "o_lora_rank": "o_lora_rank",
    "o_groups": "o_groups",
    "sliding_window": "window_size",
    "index_n_heads": "index_n_heads",
    "index_head_dim": "index_head_dim",
    "index_topk": "index_topk",
    "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "num_experts_per_tok": "n_activated_experts",
    "moe_intermediate_size": "moe_inter_dim",
    "scoring_func": "score_func",
    "routed_scaling_factor": "route_scale",
    "num_hash_layers": "n_hash_layers",
    "swiglu_limit": "swiglu_limit",
    "hc_mult": "hc_mult",
    "hc_sinkhorn_iters": "hc_sinkhorn_iters",
    "hc_eps": "hc_eps",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
    "compress_rope_theta": "compress_rope_theta",
    "max_position_embeddings": "max_seq_len",
    "num_nextn_predict_layers": "n_mtp_layers",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
}
DERIVED = {
    "model_type",
    "compress_ratios",
    "rope_scaling",
    "quantization_config",
    "expert_dtype",
    "torch_dtype",
    "dtype",
    "dspark_block_size",
    "dspark_noise_token_id",
    "dspark_target_layer_ids",
    "dspark_markov_rank",
}
# Known, and the same in every V4 model: each value is checked, none is kept.
FIXED: dict[str, Any] = {
    "num_key_value_heads": 1,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "norm_topk_prob": True,
    "topk_method": "noaux_tc",
}
DROPPED = {
    "architectures",
    "attention_dropout",
    "initializer_range",
    "transformers_version",
    "use_cache",
    "pad_token_id",
    "_name_or_path",
}


class DSparkConfig(BaseModel):
    """The later releases' drafter: one stage for each target layer, a block of guesses at once."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    block_size: Count
    noise_token_id: Ordinal
    target_layer_ids: tuple[Ordinal, ...] = Field(min_length=1)
    markov_rank: Count


class ModelConfig(BaseModel):
    """One V4 model. `compress_ratios` has an entry per layer, those that draft last."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    vocab_size: Count
    dim: Count
    n_layers: Count
    n_heads: Count
    head_dim: Count
    rope_head_dim: Count
    q_lora_rank: Count
    o_lora_rank: Count
    o_groups: Count
    window_size: Count
    compress_ratios: tuple[int, ...]
    index_n_heads: Count
    index_head_dim: Count
    index_topk: Count
    n_routed_experts: Count
    n_shared_experts: Count = 1
    n_activated_experts: Count
    moe_inter_dim: Count
    score_func: Literal["sqrtsoftplus"] = "sqrtsoftplus"
    route_scale: Positive
    n_hash_layers: Ordinal
    swiglu_limit: Positive
    hc_mult: Count = 4
    hc_sinkhorn_iters: Count = 20
    hc_eps: Positive = 1e-6
    norm_eps: Positive = 1e-6
    rope_theta: Positive = 10000.0
    compress_rope_theta: Positive = 160000.0
    rope_factor: Positive = 16.0
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    original_seq_len: Count = 65536
    max_seq_len: Count = 1048576
    n_mtp_layers: Ordinal = 1
    bos_token_id: Ordinal = 0
    eos_token_id: Ordinal = 1
    quantization: Literal["fp8", "ascend"] | None = None
    expert_dtype: Literal["fp4", "fp8"] | None = None
    quant_types: Types = ()  # by place in a layer, for "ascend"; the others are not quantised
    dtype: Literal["bf16", "fp32"] = "bf16"
    dspark: DSparkConfig | None = None
    unknown_keys: tuple[str, ...] = ()  # of config.json; `inspect` reports them

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        expected = self.n_layers + self.n_draft_layers
        if len(self.compress_ratios) != expected:
            raise ValueError(
                f"compress_ratios has {len(self.compress_ratios)} entries, must have one per "
                f"layer: {expected} (n_layers {self.n_layers} + {self.n_draft_layers} that draft)"
            )
        if odd := sorted(set(self.compress_ratios) - set(KINDS)):
            raise ValueError(f"compress_ratios has {odd}, must be 0, 4 or 128")
        if any(self.compress_ratios[self.n_layers :]):
            raise ValueError("compress_ratios of layers that draft must be 0")
        self._check_divides("o_groups", "n_heads")
        if self.rope_head_dim % 2 or self.rope_head_dim > self.head_dim:
            raise ValueError(
                f"rope_head_dim ({self.rope_head_dim}) must be even and at most head_dim "
                f"({self.head_dim})"
            )
        if self.n_activated_experts > self.n_routed_experts:
            raise ValueError(
                f"n_activated_experts ({self.n_activated_experts}) must not exceed "
                f"n_routed_experts ({self.n_routed_experts})"
            )
        if self.n_shared_experts != 1:
            raise ValueError(f"n_shared_experts ({self.n_shared_experts}) must be 1")
        if self.n_hash_layers > self.n_layers:
            raise ValueError(
                f"n_hash_layers ({self.n_hash_layers}) must not exceed n_layers ({self.n_layers})"
            )
        if self.dspark:
            self._check_dspark(self.dspark)
        if bool(self.quant_types) != (self.quantization == "ascend"):
            raise ValueError(f"quant_types {self.quant_types} and {self.quantization!r} disagree")
        if self.quantization:
            self._check_groups()
        return self

    def _check_dspark(self, dspark: DSparkConfig) -> None:
        targets, noise = list(dspark.target_layer_ids), dspark.noise_token_id
        if max(targets) >= self.n_layers:
            raise ValueError(
                f"dspark_target_layer_ids {targets} must be below n_layers ({self.n_layers})"
            )
        if targets != sorted(set(targets)):
            raise ValueError(f"dspark_target_layer_ids {targets} must be ascending")
        if noise >= self.vocab_size:
            raise ValueError(
                f"dspark_noise_token_id ({noise}) must be below vocab_size ({self.vocab_size})"
            )

    def _check_groups(self) -> None:
        for name, width, group in (
            ("dim", self.dim, ACT_GROUP),
            ("q_lora_rank", self.q_lora_rank, ACT_GROUP),
            ("o_groups * o_lora_rank", self.o_groups * self.o_lora_rank, ACT_GROUP),
            ("moe_inter_dim", self.moe_inter_dim, ACT_GROUP),
            ("head_dim - rope_head_dim", self.head_dim - self.rope_head_dim, KV_GROUP),
            ("index_head_dim", self.index_head_dim, INDEX_GROUP),
        ):
            if width % group:
                raise ValueError(f"{name} ({width}) must be a multiple of {group} when quantised")

    def _check_divides(self, part: str, whole: str) -> None:
        n, of = getattr(self, part), getattr(self, whole)
        if of % n:
            raise ValueError(f"{part} ({n}) must divide {whole} ({of})")

    @property
    def n_draft_layers(self) -> int:
        """Blocks that draft: MTP layers, or DSpark's stages, which no key of the file counts."""
        return len(self.dspark.target_layer_ids) if self.dspark else self.n_mtp_layers

    def kind(self, layer: int) -> LayerKind:
        """Return what attention layer `layer` has; those that draft follow the main ones."""
        return KINDS[self.compress_ratios[layer]]

    @classmethod
    def read(cls, path: Path) -> ModelConfig:
        """Read a ``config.json``, or the one of a checkpoint folder.

        Raises:
            ConfigError: not there, not JSON, not a V4 model, or a value is wrong.
        """
        file = path / "config.json" if path.is_dir() else path
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(str(file), "no such file; a checkpoint has a config.json") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
            raise ConfigError(str(file), f"cannot be read: {e}") from e
        if not isinstance(raw, dict):
            raise ConfigError(str(file), f"must be a JSON object, got {type(raw).__name__}")
        return cls.from_hf(raw, str(file), read_types(file.with_name(DESCRIPTION)))

    @classmethod
    def from_hf(
        cls, raw: Mapping[str, Any], where: str = "config.json", types: Types | None = None
    ) -> ModelConfig:
        """Translate a Hugging Face configuration, published or saved by transformers 5.

        `types` are those of a description beside it: what the file says of formats does not count.

        Raises:
            ConfigError: not a V4 model, a key is missing, or a value is wrong.
        """
        found = raw.get("model_type")
        if found != SUPPORTED:
            raise ConfigError(
                where, f"model_type is {found!r}; supported: {SUPPORTED!r} (V4 Flash, Pro, Base)"
            )
        raw = fold(raw, where)
        if "compress_ratios" not in raw:
            raise ConfigError(where, "no compress_ratios; layers cannot be told apart without it")
        for key, value in FIXED.items():
            if raw.get(key, value) != value:
                raise ConfigError(where, f"{key} is {raw[key]!r}, V4 has {value!r}")
        values = {ours: raw[key] for key, ours in NAMES.items() if key in raw}
        known = NAMES.keys() | DERIVED | FIXED.keys() | DROPPED
        values |= _derived(raw, values, where)
        if types:
            values |= {"quantization": "ascend", "expert_dtype": None, "quant_types": types}
        values["unknown_keys"] = tuple(sorted(raw.keys() - known))
        try:
            return cls(**values)
        except ValidationError as e:
            raise ConfigError(where, _refusal(e)) from None

    def to_hf(self) -> dict[str, Any]:
        """Return the ``config.json`` that `from_hf` reads back as this configuration."""
        out: dict[str, Any] = {
            "architectures": ["DeepseekV4ForCausalLM"],
            "model_type": SUPPORTED,
            **{key: getattr(self, ours) for key, ours in NAMES.items()},
            **FIXED,
            "compress_ratios": list(self.compress_ratios),
            "rope_scaling": {
                "type": "yarn",
                "factor": self.rope_factor,
                "beta_fast": self.beta_fast,
                "beta_slow": self.beta_slow,
                "original_max_position_embeddings": self.original_seq_len,
            },
            "torch_dtype": {"bf16": "bfloat16", "fp32": "float32"}[self.dtype],
        }
        if self.quantization == "fp8":
            out["quantization_config"] = {
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "scale_fmt": "ue8m0",
                "weight_block_size": [128, 128],
            }
            out["expert_dtype"] = self.expert_dtype
        if self.dspark:
            out |= {f"dspark_{k}": v for k, v in self.dspark.model_dump(mode="json").items()}
        return out


def _refusal(e: ValidationError) -> str:
    """Say what is wrong under the key the file has."""
    problem = e.errors()[0]
    if problem["type"] == "value_error":
        return problem["msg"].removeprefix("Value error, ")
    name, *rest = map(str, problem["loc"])
    key = next((hf for hf, ours in NAMES.items() if ours == name), name)
    key = "_".join([key, *rest]) if name == "dspark" else ".".join([key, *rest])
    if problem["type"] == "missing":
        return f"{key} is missing"
    if problem["type"] == "extra_forbidden":
        return f"{key} is not known"
    rule = problem["msg"].partition(" should ")[2]
    return f"{key} must {rule}, got {problem['input']!r}"


def _section(raw: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any] | None:
    section = raw.get(key)
    if section is not None and not isinstance(section, Mapping):
        raise ConfigError(where, f"{key} must be an object, got {section!r}")
    return section


def _derived(raw: Mapping[str, Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    out = _rope(raw, where) | _dtypes(raw, where)
    dspark = {k.removeprefix("dspark_"): v for k, v in raw.items() if k.startswith("dspark_")}
    out["compress_ratios"] = _layer_ratios(raw, values, dspark)
    return out | ({"dspark": dspark} if dspark else {})


def _rope(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    scaling = _section(raw, "rope_scaling", where)
    if scaling is None:
        raise ConfigError(where, "no rope_scaling; V4 has YaRN on its compressed layers")
    kind = scaling.get("type", scaling.get("rope_type"))
    if kind != "yarn":
        raise ConfigError(where, f"rope_scaling.type is {kind!r}, V4 has 'yarn'")
    names = {
        "factor": "rope_factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "original_max_position_embeddings": "original_seq_len",
    }
    return {ours: scaling[key] for key, ours in names.items() if key in scaling}


def _dtypes(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    dtype = str(raw.get("torch_dtype", raw.get("dtype", "bfloat16")))
    names = {"bfloat16": "bf16", "float32": "fp32"}
    if dtype not in names:
        raise ConfigError(where, f"torch_dtype is {dtype!r}; supported: {', '.join(names)}")
    quantization = _section(raw, "quantization_config", where)
    if quantization is None:
        return {"dtype": names[dtype]}
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    if method != "fp8" or block != [128, 128]:
        raise ConfigError(
            where,
            f"quantization_config is {method!r} in blocks of {block}; V4 has 'fp8' in "
            "blocks of [128, 128]",
        )
    # The April Flash config leaves expert_dtype out; its experts are FP4 all the same.
    experts = raw.get("expert_dtype") or "fp4"
    return {"dtype": names[dtype], "quantization": "fp8", "expert_dtype": experts}


def _layer_ratios(
    raw: Mapping[str, Any], values: Mapping[str, Any], dspark: Mapping[str, Any]
) -> Any:
    """Cut the list to one entry per layer; DSpark's stages are SWA, however many it lists."""
    ratios, n = raw["compress_ratios"], values.get("n_layers")
    stages, n_drafting = dspark.get("target_layer_ids"), values.get("n_mtp_layers", 1)
    if isinstance(stages, list):
        n_drafting = len(stages)
    if not (isinstance(ratios, list) and isinstance(n, int) and isinstance(n_drafting, int)):
        return ratios  # which is wrong with them, the fields say
    if any(ratios[n + n_drafting :]):
        return ratios
    more = [0] * n_drafting if dspark and len(ratios) >= n else []
    return [*ratios, *more][: n + n_drafting]
