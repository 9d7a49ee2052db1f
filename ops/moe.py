"""Moving token rows to their experts and back, on one device and across a group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch

from v4_ascend.ops.act_quant import fp8_round_trip
from v4_ascend.ops.op import OF_DIM, ROUNDED, Case, op

DISPATCH_GROUP = 128  # channels with one scale: those of the experts' products


class Group(Protocol):
    """The ranks that share one layer's experts; built by the runtime.

    Attributes:
        hccl_name: of an HCCL communicator that these ranks have for the vendor's dispatch and
            combine alone, which address ranks by it; None where there is none.
    """

    rank: int
    size: int
    hccl_name: str | None

    def all_gather(
        self, x: torch.Tensor, sizes: Sequence[int] | None = None
    ) -> Sequence[torch.Tensor]:
        """Return every rank's tensor in rank order; `sizes` are their dim 0, if known."""
        ...

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum over the ranks of equally shaped tensors."""
        ...

    def all_to_all(
        self, parts: Sequence[torch.Tensor], sizes: Sequence[int]
    ) -> Sequence[torch.Tensor]:
        """Send part r to rank r; return what each rank sent here, `sizes` rows of it."""
        ...

    def noted(self, what: str, x: torch.Tensor) -> AbstractContextManager[None]:
        """Note, for whoever asks what this rank waits for, an exchange made by other means."""
        ...


class Solo:
    """The group of one rank."""

    rank = 0
    size = 1
    hccl_name: str | None = None

    def all_gather(
        self, x: torch.Tensor, sizes: Sequence[int] | None = None
    ) -> Sequence[torch.Tensor]:
        """Return the tensor itself."""
        return (x,)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Return the tensor itself."""
        return x

    def all_to_all(
        self, parts: Sequence[torch.Tensor], sizes: Sequence[int]
    ) -> Sequence[torch.Tensor]:
        """Return the parts themselves."""
        return parts

    def noted(self, what: str, x: torch.Tensor) -> AbstractContextManager[None]:
        """Nobody waits for a rank that is alone."""
        return nullcontext()


def _ids(g: torch.Generator, n_tokens: int, n_experts: int, topk: int) -> torch.Tensor:
    return torch.rand(n_tokens, n_experts, generator=g).argsort(-1)[:, :topk].contiguous()


SHAPES = ((0, 8, 4, 2), (1, 8, 4, 2), (33, 9, 7, 3), (64, 4096, 256, 6), (64, 7168, 384, 6))


def _cases(make: Any) -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        for n_tokens, dim, n_experts, topk in SHAPES:
            name = f"{str(dtype).removeprefix('torch.')}-{n_tokens}x{dim}-e{n_experts}"
            shape = {"n_tokens": n_tokens, "dim": dim, "n_experts": n_experts, "topk": topk}
            yield Case(name, partial(make, **shape, dtype=dtype), models=OF_DIM.get(dim, ()))


def _permute_inputs(
    g: torch.Generator, n_tokens: int, dim: int, n_experts: int, topk: int, dtype: torch.dtype
) -> dict[str, Any]:
    x = torch.randn(n_tokens, dim, generator=g).to(dtype)
    return {"x": x, "ids": _ids(g, n_tokens, n_experts, topk), "n_experts": n_experts}


def _unpermute_inputs(
    g: torch.Generator, n_tokens: int, dim: int, n_experts: int, topk: int, dtype: torch.dtype
) -> dict[str, Any]:
    source = _ids(g, n_tokens, n_experts, topk).flatten().sort(stable=True).indices
    rows = torch.randn(n_tokens * topk, dim, generator=g).to(dtype)
    return {"rows": rows, "source": source, "topk": topk}


def dispatch_inputs(
    g: torch.Generator,
    n_tokens: int,
    dim: int,
    n_experts: int,
    topk: int,
    dtype: torch.dtype,
    fp8: bool = False,
) -> dict[str, Any]:
    """Make a case's arguments, of a group of one rank."""
    inputs = _permute_inputs(g, n_tokens, dim, n_experts, topk, dtype)
    weights = torch.rand(n_tokens, topk, generator=g)
    return inputs | {"weights": weights, "group": Solo(), "fp8": fp8}


def _dispatch_cases() -> Iterator[Case]:
    yield from _cases(dispatch_inputs)
    shape: dict[str, Any] = {
        "n_tokens": 33,
        "dim": 256,
        "n_experts": 7,
        "topk": 3,
        "dtype": torch.bfloat16,
    }
    yield Case("bfloat16-33x256-e7-fp8", partial(dispatch_inputs, **shape, fp8=True))


def _combine_inputs(
    g: torch.Generator, n_tokens: int, dim: int, n_experts: int, topk: int, dtype: torch.dtype
) -> dict[str, Any]:
    inputs = _unpermute_inputs(g, n_tokens, dim, n_experts, topk, dtype)
    return inputs | {"tokens_per_rank": torch.tensor([n_tokens]), "group": Solo()}


@op(cases=partial(_cases, _permute_inputs), tolerance={})
def moe_permute(
    x: torch.Tensor, ids: torch.Tensor, n_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Copy each token's row to its experts, rows of one expert together, tokens in order.

    Shapes:
        x       [n_tokens, dim]
        ids     [n_tokens, topk]  int64
        return  rows [n_tokens * topk, dim] as x, group_sizes [n_experts] int64,
                source [n_tokens * topk] int64: row r came from pair (source // topk, source % topk)

    Source: DeepSeek-V4 inference/model.py, MoE.forward.
    """
    flat = ids.flatten()
    source = flat.sort(stable=True).indices
    return x[source // ids.shape[1]], torch.bincount(flat, minlength=n_experts), source


@op(cases=partial(_cases, _unpermute_inputs), tolerance=ROUNDED)
def moe_unpermute(rows: torch.Tensor, source: torch.Tensor, topk: int) -> torch.Tensor:
    """Sum the rows of each token in fp32, in the order of its choices.

    Shapes:
        rows    [n_tokens * topk, dim]  bf16 or fp32, as `moe_permute` ordered them
        source  [n_tokens * topk]  int64
        return  [n_tokens, dim]  fp32

    Source: DeepSeek-V4 inference/model.py, MoE.forward.
    """
    pairs = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    pairs[source] = rows.float()
    return pairs.unflatten(0, (-1, topk)).sum(1)


@op(cases=_dispatch_cases, tolerance={})
def moe_dispatch(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    n_experts: int,
    group: Group,
    fp8: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bring to this rank the rows for its experts, from every rank of the group.

    Rank r holds experts [r * E, (r + 1) * E) with E = n_experts / group.size. Rows are
    ordered by expert, then by the rank and token they came from. With `fp8` they come as
    `act_quant` rounds them, so that they may travel in a byte a value; experts that round
    their input so see no difference, as rounding twice is rounding once.

    Shapes:
        x        [n_tokens, dim]; n_tokens may differ between ranks and be 0
        ids      [n_tokens, topk]  int64, global expert ids
        weights  [n_tokens, topk]  fp32
        return   rows [n_rows, dim] as x, row_weights [n_rows] fp32, group_sizes [E] int64,
                 source [n_rows] int64 (pair number over all ranks), tokens_per_rank [size] int64

    Raises:
        ValueError: the group's size does not divide n_experts; fp8 and 128 does not divide dim.
    """
    if n_experts % group.size:
        raise ValueError(f"ep_size ({group.size}) must divide n_routed_experts ({n_experts})")
    all_x = group.all_gather(fp8_round_trip(x, DISPATCH_GROUP, 0) if fp8 else x)
    all_ids = torch.cat(list(group.all_gather(ids)))
    all_weights = torch.cat(list(group.all_gather(weights)))
    local = n_experts // group.size
    flat = all_ids.flatten() - group.rank * local
    mine = ((flat >= 0) & (flat < local)).nonzero().flatten()
    source = mine[flat[mine].sort(stable=True).indices]
    rows = torch.cat(list(all_x))[source // ids.shape[1]]
    group_sizes = torch.bincount(flat[mine], minlength=local)
    tokens_per_rank = torch.tensor([part.shape[0] for part in all_x])
    return rows, all_weights.flatten()[source], group_sizes, source, tokens_per_rank


@op(cases=partial(_cases, _combine_inputs), tolerance=ROUNDED)
def moe_combine(
    rows: torch.Tensor, source: torch.Tensor, topk: int, tokens_per_rank: torch.Tensor, group: Group
) -> torch.Tensor:
    """Return each rank the fp32 sum of its tokens' rows, wherever they were computed.

    Every pair is summed in the order of the token's choices, so the result does not depend
    on the size of the group. A vendor operator that returns sums in the rows' dtype may stand
    in for this: its result is the sum rounded once.

    Shapes:
        rows             [n_rows, dim]  bf16 or fp32, as `moe_dispatch` ordered them
        source           [n_rows]  int64
        tokens_per_rank  [size]  int64
        return           [n_tokens, dim]  fp32
    """
    counts: list[int] = tokens_per_rank.tolist()
    pairs = torch.zeros(sum(counts) * topk, rows.shape[1], device=rows.device)
    pairs[source] = rows.float()
    start = sum(counts[: group.rank])
    summed = group.all_reduce(pairs).unflatten(0, (-1, topk)).sum(1)
    return summed[start : start + counts[group.rank]]
