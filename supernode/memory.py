"""What one rank's memory holds, term by term, and what is left for requests."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

from pydantic import Field

from v4_ascend.config.devices import DeviceProfile, Figure, WeightFormat
from v4_ascend.config.load import Section, load_yaml
from v4_ascend.config.model import ModelConfig
from v4_ascend.config.topology import ParallelConfig
from v4_ascend.supernode.cache import (
    BLOCK_TOKENS,
    RecordBytes,
    block_bytes,
    snapshot_bytes,
    state_bytes,
    window_bytes,
)
from v4_ascend.supernode.collective_buffers import buffer_bytes
from v4_ascend.supernode.weights import layer_weights, outer_weights

Engine = Literal["native", "vllm"]


class Overhead(Section):
    """Bytes measured or assumed beside our tensors, and when."""

    term: Literal["driver", "graphs"]
    family: str
    date: str = Field(pattern=r"^\d{4}-\d\d-\d\d$")
    bytes: Figure


class Overheads(Section):
    """The file configs/overheads.yaml."""

    overheads: tuple[Overhead, ...] = Field(min_length=1)


@lru_cache(maxsize=1)
def overheads() -> tuple[Overhead, ...]:
    """Read the bundled entries."""
    path = Path(str(files("v4_ascend.configs") / "overheads.yaml"))
    return load_yaml(Overheads, path).value.overheads


@dataclass(frozen=True, slots=True)
class Serving:
    """What memory and time depend on beside the layout."""

    weight_format: WeightFormat
    engine: Engine
    max_model_len: int
    max_chunk: int
    n_draft_tokens: int
    utilisation: float
    n_snapshots: int = 0  # of prefixes, in each DP group


@dataclass(frozen=True, slots=True)
class StageMemory:
    """One rank of a stage. Bytes.

    `terms` is all that does not depend on how long requests are; `per_block` is what 128
    tokens of context add, `available` what may be used.
    """

    terms: dict[str, int]
    per_block: int
    available: int

    @property
    def fixed(self) -> int:
        """Bytes before the first token of context."""
        return sum(self.terms.values())

    @property
    def free(self) -> int:
        """Bytes left for context; negative if it does not fit."""
        return self.available - self.fixed

    @property
    def n_blocks(self) -> int:
        """Blocks of 128 tokens that fit."""
        return max(0, self.free) // self.per_block if self.per_block else 0

    def n_requests(self, n_tokens: int) -> int:
        """Requests of `n_tokens` that fit at once."""
        return self.n_blocks // -(-n_tokens // BLOCK_TOKENS)

    def fits(self, n_tokens: int) -> bool:
        """Say whether one request of `n_tokens` fits beside everything else."""
        return self.free >= -(-n_tokens // BLOCK_TOKENS) * self.per_block

    @property
    def binding_term(self) -> str:
        """Name the largest term."""
        return max(self.terms, key=lambda name: self.terms[name])


class MemoryModel:
    """Sizes ranks of any layout of one model on one device, for one way of serving."""

    def __init__(self, config: ModelConfig, profile: DeviceProfile, serving: Serving) -> None:
        self.config, self.profile, self.serving = config, profile, serving
        self.records = RecordBytes.of(config, profile.records.kv, profile.records.index)
        self.drafts = serving.n_draft_tokens > 0
        self.available = int(profile.memory_bytes.value * serving.utilisation)
        self._weighed: dict[tuple[object, ...], dict[str, int]] = {}
        self._overhead: dict[str, int] = {
            o.term: int(o.bytes.value) for o in overheads() if o.family == profile.family
        }

    def local_experts(self, parallel: ParallelConfig) -> int:
        """Routed experts of one rank in each layer, copies included."""
        return -(-(self.config.n_routed_experts + parallel.n_redundant_experts) // parallel.ep_size)

    def stage(
        self, parallel: ParallelConfig, layers: tuple[int, int], concurrency: int
    ) -> StageMemory:
        """Size one rank of the stage that has `layers` (half-open), for its DP group's requests."""
        c, p = self.config, parallel
        is_last = layers[1] == c.n_layers
        own = list(range(*layers))
        has_drafter = is_last and self.drafts
        drafting = list(range(c.n_layers, c.n_layers + c.n_draft_layers)) if has_drafter else []
        caching = [*own, *drafting]
        # vLLM keeps states as rows of its own.
        n_guesses = self.serving.n_draft_tokens if self.serving.engine == "native" else 0
        key = (p.tp_size, self.local_experts(p), layers)
        if key not in self._weighed:
            self._weighed[key] = self._weights(
                p, [*own, *drafting], is_first=layers[0] == 0, is_last=is_last
            )
        terms = dict(self._weighed[key])
        rows = window_rows(c, self.serving, has_drafter=has_drafter)
        per_request = window_bytes(c, self.records, caching, rows)
        per_request += state_bytes(c, own, n_guesses)
        terms["request state"] = concurrency * per_request
        if self.serving.n_snapshots:
            terms["prefix snapshots"] = self.serving.n_snapshots * snapshot_bytes(
                c, self.records, caching, n_guesses
            )
        terms["activations"] = self._activations(p, concurrency, is_last=is_last)
        if self.profile.kind == "npu" and self.serving.engine == "native":
            terms["angle tables"] = self._angle_tables()
        tokens = -(-concurrency * (1 + self.serving.n_draft_tokens) // (p.tp_size * p.cp_size))
        terms["collective buffers"] = buffer_bytes(
            c, self.profile, p, self.local_experts(p), tokens
        )
        terms |= self._overhead
        return StageMemory(terms, block_bytes(c, self.records, own), self.available)

    def _angle_tables(self) -> int:
        """Cosine and sine of every position, in fp32 and once for each channel of a pair.

        vllm-ascend's compressor_metadata looks the angles of compressed rows up in them.
        """
        return 2 * self.config.rope_head_dim * 4 * self.serving.max_model_len

    def _weights(
        self, p: ParallelConfig, layers: list[int], *, is_first: bool, is_last: bool
    ) -> dict[str, int]:
        fmt, n_experts = self.serving.weight_format, self.local_experts(p)
        terms: dict[str, int] = {"experts": 0}
        for layer in layers:
            w = layer_weights(self.config, layer, fmt)
            terms["experts"] += n_experts * w.expert
            for group, n in w.split.items():
                terms[group] = terms.get(group, 0) + -(-n // p.tp_size)
            for group, n in w.replicated.items():
                terms[group] = terms.get(group, 0) + n
        outer = outer_weights(self.config, fmt)
        if is_first or (is_last and self.drafts):  # the drafter embeds its own tokens
            terms["embed"] = -(-outer.split["embed"] // p.tp_size)
        if is_last:
            terms["head"] = -(-outer.split["head"] // p.tp_size)
            terms["mixing"] = terms.get("mixing", 0) + outer.replicated["mixing"]
        return terms

    def _activations(self, p: ParallelConfig, concurrency: int, *, is_last: bool) -> int:
        """Peak of one chunk: streams, and the wider of attention and experts; derived."""
        c, item = self.config, 2
        n_steps = concurrency * (1 + self.serving.n_draft_tokens)
        split = p.cp_size * (p.tp_size if p.dsa_cp else 1)
        n = max(-(-self.serving.max_chunk // split), n_steps)
        streams = 3 * n * c.hc_mult * c.dim * item
        heads = c.n_heads if p.dsa_cp else -(-c.n_heads // p.tp_size)
        attention = n * (2 * heads * c.head_dim * item + c.index_topk * 4)
        routed = n * c.n_activated_experts
        experts = routed * (2 * c.dim + 2 * c.moe_inter_dim) * item
        logits = 2 * n_steps * -(-c.vocab_size // p.tp_size) * 4 if is_last else 0
        return streams + max(attention, experts) + logits


def window_rows(config: ModelConfig, serving: Serving, *, has_drafter: bool) -> int:
    """Rows of a window: vLLM frees what has left it; our ring holds the chunk beside it.

    On the stage that has the drafter, that goes on behind the last token.
    """
    if serving.engine == "vllm":
        return config.window_size
    ahead = 0
    if has_drafter:
        ahead = config.dspark.block_size if config.dspark else serving.n_draft_tokens - 1
    blocks = (serving.max_chunk + config.window_size - 2) // BLOCK_TOKENS + 2
    return BLOCK_TOKENS * min(blocks, -(-(serving.max_model_len + ahead) // BLOCK_TOKENS))
