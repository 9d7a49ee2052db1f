"""Which tensors of the checkpoint a rank reads, and which part of each.

TP splits query heads, output groups and the vocabulary; everything else of a layer is whole on
every rank of its stage. Experts are whole, each on the ranks the plan puts it on. The order is
that of `Transformer.read`, so that a file of a rank's own is read from its begin to its end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

from v4_ascend.config.inventory import (
    TensorSpec,
    expert_tensors,
    layer_tensors,
    model_tensors,
)
from v4_ascend.config.model import ModelConfig
from v4_ascend.config.quant_types import DERIVED_ENDINGS, ENDINGS, base_of
from v4_ascend.supernode.plan import Plan, Rank, experts_of

# The dimension TP splits, weights and their scales alike.
SPLIT_DIM = {
    "embed": 0,
    "head": 0,
    "attn.wq_b": 0,
    "attn.attn_sink": 0,
    "attn.wo_a": 0,
    "attn.wo_b": 1,
}
# What a model asks for, in its order. A test compares it with what one does ask for.
READ_ORDER = (
    "embed",
    *("e_proj", "h_proj", "enorm", "hnorm"),
    *("main_proj", "main_norm"),
    "attn_norm",
    "ffn_norm",
    *(f"hc_{at}_{part}" for at in ("attn", "ffn") for part in ("fn", "scale", "base")),
    *(f"attn.{w}" for w in ("wo_a", "wq_a", "q_norm", "wq_b", "wkv", "kv_norm", "wo_b")),
    "attn.attn_sink",
    *(f"attn.compressor.{w}" for w in ("wkv", "wgate", "norm", "ape")),
    "attn.indexer.wq_b",
    "attn.indexer.weights_proj",
    *(f"attn.indexer.compressor.{w}" for w in ("wkv", "wgate", "norm", "ape")),
    "ffn.gate.tid2eid",
    "ffn.gate",
    "ffn.gate.bias",
    *(f"ffn.shared_experts.{w}" for w in ("w1", "w3", "w2")),
    "head",
    "norm",
    *(f"hc_head_{part}" for part in ("fn", "scale", "base")),
    *("markov_head.markov_w1", "markov_head.markov_w2", "confidence_head.proj"),
)


@dataclass(frozen=True, slots=True)
class Part:
    """The `index`-th of `count` equal parts of a tensor along `dim`."""

    dim: int
    index: int
    count: int

    def bounds(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return first and end along `dim`.

        Raises:
            ValueError: the parts would not be equal.
        """
        n = shape[self.dim]
        if n % self.count:
            raise ValueError(f"{n} along dimension {self.dim} in {self.count} equal parts")
        return self.index * n // self.count, (self.index + 1) * n // self.count

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Return the part's shape.

        Raises:
            ValueError: the parts would not be equal.
        """
        first, end = self.bounds(whole)
        return (*whole[: self.dim], end - first, *whole[self.dim + 1 :])


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor of the checkpoint, and the part of it a rank reads; None is the whole."""

    spec: TensorSpec
    part: Part | None

    @property
    def nbytes(self) -> int:
        """Bytes the rank reads."""
        return self.spec.nbytes // (self.part.count if self.part else 1)


def holdings(config: ModelConfig, plan: Plan, rank: Rank) -> Mapping[str, Held]:
    """Return what a rank reads, by name, in the order it reads it.

    Raises:
        ValueError: TP does not divide a tensor, or a block of its scales.
    """
    reads = _reads(config)
    held: dict[str, Held] = {}
    first, end = rank.layers
    drafts = plan.n_draft_tokens > 0 and end == config.n_layers
    if first == 0 or drafts:  # the drafter embeds its own tokens
        _hold(held, reads.embed, plan, rank)
    for layer, experts in enumerate(experts_of(plan, rank), first):
        of_layer = reads.layers[layer]
        _hold(held, of_layer.before, plan, rank)
        held |= {h.spec.name: h for e in experts for h in of_layer.w13[e]}
        held |= {h.spec.name: h for e in experts for h in of_layer.w2[e]}
        _hold(held, of_layer.shared, plan, rank)
    if end == config.n_layers:
        _hold(held, reads.head, plan, rank)
        for drafting in reads.drafting if drafts else ():
            _hold(held, drafting.before, plan, rank)
            held |= {h.spec.name: h for e in range(*rank.experts) for h in drafting.w13[e]}
            held |= {h.spec.name: h for e in range(*rank.experts) for h in drafting.w2[e]}
            _hold(held, drafting.shared, plan, rank)
            _hold(held, drafting.head, plan, rank)
    return held


def reading_order(config: ModelConfig, *, with_drafter: bool) -> Iterator[str]:
    """Yield the tensors of a whole model in the order it reads them."""
    reads = _reads(config)

    def of(layer: _LayerReads) -> Iterator[Held]:
        yield from layer.before
        for experts in (layer.w13, layer.w2):
            for expert in experts:
                yield from expert
        yield from (*layer.shared, *layer.head)

    drafting = reads.drafting if with_drafter else ()
    layers, drafters = (chain.from_iterable(map(of, x)) for x in (reads.layers, drafting))
    yield from (h.spec.name for h in chain(reads.embed, layers, reads.head, drafters))


def layout_digest(config: ModelConfig, plan: Plan) -> str:
    """Digest what decides which rank reads what: two plans of one layout read the same files."""
    layout: dict[str, Any] = {
        "parallel": plan.parallel.model_dump(mode="json"),
        "ranks": [(r.rank, r.layers, r.experts) for r in plan.ranks],
        "expert_placement": plan.expert_placement,
        "config": config.model_dump(mode="json"),
    }
    if plan.n_draft_tokens:
        layout["drafts"] = True
    return hashlib.sha256(json.dumps(layout, sort_keys=True).encode()).hexdigest()


def bytes_read(held: Mapping[str, Held]) -> int:
    """Sum what a rank reads."""
    return sum(h.nbytes for h in held.values())


def _hold(held: dict[str, Held], whole: Iterable[Held], plan: Plan, rank: Rank) -> None:
    """Add tensors, cut where TP cuts them."""
    p = plan.parallel
    for h in whole:
        name = h.spec.name
        dim = SPLIT_DIM.get(_place(name)) if p.tp_size > 1 else None
        # With the tokens split instead of the heads, a rank attends with all heads.
        # A scale for each output belongs to every part of the inputs.
        is_by_row = dim == 1 and h.spec.shape[1] == 1
        if dim is None or is_by_row or (p.dsa_cp and name.endswith("attn_sink")):
            held[name] = h
            continue
        part = Part(dim, rank.rank % p.tp_size, p.tp_size)
        try:
            part.bounds(h.spec.shape)
        except ValueError as e:
            raise ValueError(f"tp_size {p.tp_size}: {name}: {e}") from e
        held[name] = Held(h.spec, part)


@dataclass(frozen=True)
class _LayerReads:
    """One layer, in the order it is read: gate and up projections of all experts come first.

    A drafter has a `head` of its own: MTP, or the last of DSpark's stages.
    """

    before: tuple[Held, ...]
    w13: tuple[tuple[Held, ...], ...]
    w2: tuple[tuple[Held, ...], ...]
    shared: tuple[Held, ...]
    head: tuple[Held, ...]


@dataclass(frozen=True)
class _Reads:
    embed: tuple[Held, ...]
    layers: tuple[_LayerReads, ...]
    head: tuple[Held, ...]
    drafting: tuple[_LayerReads, ...]


@lru_cache(maxsize=4)
def _reads(config: ModelConfig) -> _Reads:
    """Order the inventory once for all ranks: Pro has 145,116 tensors, a plan up to 8,192 ranks."""
    outside = model_tensors(config)
    return _Reads(
        embed=_ordered(t for t in outside if t.name.startswith("embed.")),
        layers=tuple(_layer_reads(config, n) for n in range(config.n_layers)),
        head=_ordered(t for t in outside if not t.name.startswith("embed.")),
        drafting=tuple(
            _layer_reads(config, config.n_layers + n) for n in range(config.n_draft_layers)
        ),
    )


def _layer_reads(config: ModelConfig, layer: int) -> _LayerReads:
    stage = layer - config.n_layers
    at = f"layers.{layer}." if stage < 0 else f"mtp.{stage}."
    tensors = [
        TensorSpec(at + t.name.removeprefix("layer."), t.dtype, t.shape)
        for t in _read_by_models(layer_tensors(config, layer))
    ]
    one = {t.name.removeprefix("expert."): t for t in _read_by_models(expert_tensors(config))}
    experts = [f"{at}ffn.experts.{e}." for e in range(config.n_routed_experts)]
    w13 = [(n, t) for w in ("w1", "w3") for n, t in one.items() if base_of(n) == w]
    w2 = [(n, t) for n, t in one.items() if base_of(n) == "w2"]

    def of(expert: str, parts: Sequence[tuple[str, TensorSpec]]) -> tuple[Held, ...]:
        return tuple(Held(TensorSpec(expert + n, t.dtype, t.shape), None) for n, t in parts)

    first_shared, head = READ_ORDER.index("ffn.shared_experts.w1"), READ_ORDER.index("head")
    order = [(t, READ_ORDER.index(_place(t.name))) for t in tensors]
    return _LayerReads(
        before=_ordered(t for t, place in order if place < first_shared),
        w13=tuple(of(at, w13) for at in experts),
        w2=tuple(of(at, w2) for at in experts),
        shared=_ordered(t for t, place in order if first_shared <= place < head),
        head=_ordered(t for t, place in order if place > head),
    )


def _ordered(tensors: Iterable[TensorSpec]) -> tuple[Held, ...]:
    """Put tensors in reading order, a weight before its scales."""

    def key(t: TensorSpec) -> tuple[int, int]:
        ending = t.name.rpartition(".")[2]
        return READ_ORDER.index(_place(t.name)), ENDINGS.index(ending) if ending in ENDINGS else 0

    return tuple(Held(t, None) for t in sorted(tensors, key=key))


def _read_by_models(tensors: Iterable[TensorSpec]) -> Iterable[TensorSpec]:
    return (t for t in tensors if not t.name.endswith(DERIVED_ENDINGS))


def _place(name: str) -> str:
    """Name a tensor without its layer and its ending."""
    return base_of(name.split(".", 2)[2] if name.startswith(("layers.", "mtp.")) else name)
