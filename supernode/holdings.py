"""Which tensors of the checkpoint a rank reads, and which part of each.

TP splits query heads, output groups and the vocabulary; everything else of a layer is whole on
every rank of its stage. Experts are whole, each on the ranks the plan puts it on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from v4_ascend.config.inventory import TensorSpec, inventory
from v4_ascend.config.model import ModelConfig
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
    """Return what a rank reads, by name, in the checkpoint's order.

    Raises:
        ValueError: TP does not divide a tensor, or a block of its scales.
    """
    p, held = plan.parallel, {}
    tp_rank = rank.rank % p.tp_size
    experts = experts_of(plan, rank)
    for spec in inventory(config):
        if not _is_held(spec.name, config, rank, experts):
            continue
        dim = SPLIT_DIM.get(_place(spec.name))
        is_whole = dim is None or p.tp_size == 1
        # With the tokens split instead of the heads, a rank attends with all heads.
        if p.dsa_cp and spec.name.endswith("attn_sink"):
            is_whole = True
        part = None if is_whole or dim is None else Part(dim, tp_rank, p.tp_size)
        if part is not None:
            try:
                part.bounds(spec.shape)
            except ValueError as e:
                raise ValueError(f"tp_size {p.tp_size}: {spec.name}: {e}") from e
        held[spec.name] = Held(spec, part)
    return held


def bytes_read(held: Mapping[str, Held]) -> int:
    """Sum what a rank reads."""
    return sum(h.nbytes for h in held.values())


def _is_held(
    name: str, config: ModelConfig, rank: Rank, experts: tuple[tuple[int, ...], ...]
) -> bool:
    head, _, rest = name.partition(".")
    if head == "mtp":
        return False  # nothing drafts yet
    if head == "embed":
        return rank.layers[0] == 0
    if head != "layers":
        return rank.layers[1] == config.n_layers
    number, _, tensor = rest.partition(".")
    first, end = rank.layers
    if not first <= int(number) < end:
        return False
    if not tensor.startswith("ffn.experts."):
        return True
    return int(tensor.split(".")[2]) in experts[int(number) - first]


def _place(name: str) -> str:
    """Name a tensor without its layer, and without .weight or .scale."""
    place = name.split(".", 2)[2] if name.startswith("layers.") else name
    return place.removesuffix(".weight").removesuffix(".scale")
