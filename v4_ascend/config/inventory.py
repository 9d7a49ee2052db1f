"""Every tensor a checkpoint of a model has: names, dtypes, shapes, shards. No tensor library.

Source: model.safetensors.index.json of DeepSeek-V4-Flash and -Pro.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from v4_ascend.config.model import ModelConfig
from v4_ascend.config.quant_types import QuantType, place_of

Dtype = Literal["BF16", "F32", "F8_E4M3", "F8_E8M0", "I8", "I64", "U8"]
ITEM_BYTES: dict[Dtype, int] = {
    "BF16": 2,
    "F32": 4,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I8": 1,
    "I64": 8,
    "U8": 1,
}
FP8_BLOCK, FP4_GROUP, MX_GROUP = 128, 32, 32
W2_BIAS_COLUMNS = 16  # vllm-ascend: the bias of w2 in as many parts as TP ranks may share
_Linear = Callable[[str, int, int], Iterator["TensorSpec"]]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a checkpoint, under safetensors' names for dtypes."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


def inventory(config: ModelConfig) -> list[TensorSpec]:
    """List the tensors of the official checkpoint of `config`, shard by shard."""
    return list(_Inventory(config).tensors())


def layer_tensors(config: ModelConfig, layer: int) -> list[TensorSpec]:
    """List one layer's tensors but its routed experts; the MTP layers follow the main ones."""
    parts = _Inventory(config, experts=0)
    if layer < config.n_layers:
        return list(parts.block("layer", config.compress_ratios[layer], layer))
    stage = layer - config.n_layers
    extra = parts.drafter("layer", stage) if config.dspark else parts.mtp("layer")
    return [*parts.block("layer", 0, None), *extra]


def expert_tensors(config: ModelConfig) -> list[TensorSpec]:
    """List the tensors of one routed expert; all experts are alike."""
    parts = _Inventory(config)
    return list(parts.expert("expert", parts.expert_linear))


def model_tensors(config: ModelConfig) -> list[TensorSpec]:
    """List what belongs to no layer: embedding, head, last norm and mixer."""
    return list(_Inventory(config).outside())


def shard_of(name: str, config: ModelConfig) -> int:
    """Return the 1-based shard the official layout puts a tensor in.

    Shard 1 is the embedding, then one layer a shard, then the head, then one MTP stage a shard.
    """
    part, _, rest = name.partition(".")
    if part == "embed":
        return 1
    if part == "layers":
        return 2 + int(rest.partition(".")[0])
    if part == "mtp":
        return 3 + config.n_layers + int(rest.partition(".")[0])
    return 2 + config.n_layers


def n_shards(config: ModelConfig) -> int:
    """Count the shards of the official layout."""
    return 2 + config.n_layers + config.n_draft_layers


class _Inventory:
    def __init__(self, config: ModelConfig, experts: int | None = None) -> None:
        self.c = config
        self.n_experts = config.n_routed_experts if experts is None else experts
        self.plain: Dtype = "F32" if config.dtype == "fp32" else "BF16"
        # Base checkpoints (FP8 experts) store their scales as F32.
        self.scale: Dtype = "F32" if config.expert_dtype == "fp8" else "F8_E8M0"
        self.types = dict(config.quant_types)

    def tensors(self) -> Iterator[TensorSpec]:
        c = self.c
        embed, *head = self.outside()
        yield embed
        for layer in range(c.n_layers):
            yield from self.block(f"layers.{layer}", c.compress_ratios[layer], layer)
        yield from head
        for stage in range(c.n_draft_layers):
            at = f"mtp.{stage}"
            yield from self.block(at, 0, None)
            yield from (self.drafter(at, stage) if c.dspark else self.mtp(at))

    def outside(self) -> Iterator[TensorSpec]:
        c = self.c
        yield TensorSpec("embed.weight", self.plain, (c.vocab_size, c.dim))
        yield TensorSpec("head.weight", self.plain, (c.vocab_size, c.dim))
        yield TensorSpec("norm.weight", self.plain, (c.dim,))
        yield from self.mixer("hc_head", c.hc_mult, 1)

    def block(self, at: str, ratio: int, layer: int | None) -> Iterator[TensorSpec]:
        c = self.c
        for part in ("attn", "ffn"):
            yield from self.mixer(f"{at}.hc_{part}", c.hc_mult * (2 + c.hc_mult), 3)
            yield TensorSpec(f"{at}.{part}_norm.weight", self.plain, (c.dim,))
        yield from self.attention(f"{at}.attn", ratio)
        yield from self.moe(f"{at}.ffn", is_hash=layer is not None and layer < c.n_hash_layers)

    def attention(self, at: str, ratio: int) -> Iterator[TensorSpec]:
        c = self.c
        group_dim = c.n_heads // c.o_groups * c.head_dim
        yield TensorSpec(f"{at}.attn_sink", "F32", (c.n_heads,))
        yield from self.linear(f"{at}.wq_a", c.q_lora_rank, c.dim)
        yield TensorSpec(f"{at}.q_norm.weight", self.plain, (c.q_lora_rank,))
        yield from self.linear(f"{at}.wq_b", c.n_heads * c.head_dim, c.q_lora_rank)
        yield from self.linear(f"{at}.wkv", c.head_dim, c.dim)
        yield TensorSpec(f"{at}.kv_norm.weight", self.plain, (c.head_dim,))
        yield from self.linear(f"{at}.wo_a", c.o_groups * c.o_lora_rank, group_dim)
        yield from self.linear(f"{at}.wo_b", c.dim, c.o_groups * c.o_lora_rank)
        if ratio:
            yield from self.compressor(f"{at}.compressor", ratio, c.head_dim)
        if ratio == 4:
            index = f"{at}.indexer"
            yield from self.linear(
                f"{index}.wq_b", c.index_n_heads * c.index_head_dim, c.q_lora_rank
            )
            yield TensorSpec(f"{index}.weights_proj.weight", self.plain, (c.index_n_heads, c.dim))
            yield from self.compressor(f"{index}.compressor", ratio, c.index_head_dim)

    def compressor(self, at: str, ratio: int, head_dim: int) -> Iterator[TensorSpec]:
        width = head_dim * (2 if ratio == 4 else 1)
        yield TensorSpec(f"{at}.ape", "F32", (ratio, width))
        yield TensorSpec(f"{at}.wkv.weight", self.plain, (width, self.c.dim))
        yield TensorSpec(f"{at}.wgate.weight", self.plain, (width, self.c.dim))
        yield TensorSpec(f"{at}.norm.weight", self.plain, (head_dim,))

    def moe(self, at: str, *, is_hash: bool) -> Iterator[TensorSpec]:
        c = self.c
        yield TensorSpec(f"{at}.gate.weight", self.plain, (c.n_routed_experts, c.dim))
        if is_hash:
            yield TensorSpec(f"{at}.gate.tid2eid", "I64", (c.vocab_size, c.n_activated_experts))
        else:
            yield TensorSpec(f"{at}.gate.bias", "F32", (c.n_routed_experts,))
        for expert in range(self.n_experts):
            yield from self.expert(f"{at}.experts.{expert}", self.expert_linear)
        yield from self.expert(f"{at}.shared_experts", self.linear)

    def expert(self, at: str, linear: _Linear) -> Iterator[TensorSpec]:
        yield from linear(f"{at}.w1", self.c.moe_inter_dim, self.c.dim)
        yield from linear(f"{at}.w2", self.c.dim, self.c.moe_inter_dim)
        yield from linear(f"{at}.w3", self.c.moe_inter_dim, self.c.dim)

    def mtp(self, at: str) -> Iterator[TensorSpec]:
        c = self.c
        yield from self.linear(f"{at}.e_proj", c.dim, c.dim)
        yield from self.linear(f"{at}.h_proj", c.dim, c.dim)
        for norm in ("enorm", "hnorm", "norm"):
            yield TensorSpec(f"{at}.{norm}.weight", self.plain, (c.dim,))
        yield from self.mixer(f"{at}.hc_head", c.hc_mult, 1)

    def drafter(self, at: str, stage: int) -> Iterator[TensorSpec]:
        c = self.c
        if c.dspark is None:
            return
        if stage == 0:
            n_targets = len(c.dspark.target_layer_ids)
            yield from self.linear(f"{at}.main_proj", c.dim, n_targets * c.dim)
            yield TensorSpec(f"{at}.main_norm.weight", self.plain, (c.dim,))
        if stage == c.n_draft_layers - 1:
            rank = c.dspark.markov_rank
            yield TensorSpec(f"{at}.norm.weight", self.plain, (c.dim,))
            yield from self.mixer(f"{at}.hc_head", c.hc_mult, 1)
            for w in ("markov_w1", "markov_w2"):
                yield TensorSpec(f"{at}.markov_head.{w}.weight", self.plain, (c.vocab_size, rank))
            yield TensorSpec(f"{at}.confidence_head.proj.weight", self.plain, (1, c.dim + rank))

    def mixer(self, at: str, n_mixes: int, n_scales: int) -> Iterator[TensorSpec]:
        yield TensorSpec(f"{at}_fn", "F32", (n_mixes, self.c.hc_mult * self.c.dim))
        yield TensorSpec(f"{at}_base", "F32", (n_mixes,))
        yield TensorSpec(f"{at}_scale", "F32", (n_scales,))

    def linear(self, at: str, n_out: int, n_in: int) -> Iterator[TensorSpec]:
        if (kind := self.types.get(place_of(at))) is not None:
            yield from described(kind, at, n_out, n_in)
            return
        if self.c.quantization != "fp8":
            yield TensorSpec(f"{at}.weight", self.plain, (n_out, n_in))
            return
        blocks = (-(-n_out // FP8_BLOCK), -(-n_in // FP8_BLOCK))
        yield TensorSpec(f"{at}.weight", "F8_E4M3", (n_out, n_in))
        yield TensorSpec(f"{at}.scale", self.scale, blocks)

    def expert_linear(self, at: str, n_out: int, n_in: int) -> Iterator[TensorSpec]:
        if (kind := self.types.get("ffn.experts")) is not None:
            yield from described(kind, at, n_out, n_in)
            return
        if self.c.expert_dtype != "fp4":
            yield from self.linear(at, n_out, n_in)
            return
        yield TensorSpec(f"{at}.weight", "I8", (n_out, n_in // 2))
        yield TensorSpec(f"{at}.scale", "F8_E8M0", (n_out, n_in // FP4_GROUP))


def described(kind: QuantType, at: str, n_out: int, n_in: int) -> Iterator[TensorSpec]:
    """List the tensors of one linear layer, as vllm-ascend reads that type.

    INT4 is two values a byte along the outputs, the even one in the low half.
    """
    if kind == "W8A8_MXFP8":
        yield TensorSpec(f"{at}.weight", "F8_E4M3", (n_out, n_in))
        yield TensorSpec(f"{at}.weight_scale", "U8", (n_out, n_in // MX_GROUP))
        return
    is_int4 = kind == "W4A8_DYNAMIC"
    yield TensorSpec(f"{at}.weight", "I8", (n_out // 2 if is_int4 else n_out, n_in))
    yield TensorSpec(f"{at}.weight_scale", "F32", (n_out, 1))
    yield TensorSpec(f"{at}.weight_offset", "F32", (n_out, 1))
    if is_int4:
        n_columns = W2_BIAS_COLUMNS if at.endswith(".w2") else 1
        yield TensorSpec(f"{at}.scale_bias", "F32", (n_out, n_columns))
