"""Guesses behind a step: what the drafter is given, and what of its answer is worth computing.

Every rank takes part: of a TP and CP group one knows what was drawn, of an EP group all have
experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from v4_ascend.model.batch import Batch
from v4_ascend.model.dspark import DSpark, Targets
from v4_ascend.model.shard import Shard, span_of
from v4_ascend.model.transformer import Transformer
from v4_ascend.runtime.kv_cache import KVCache
from v4_ascend.runtime.messages import Sampled, SequenceStep


class Drafter(Protocol):
    """Runs behind the network, on its last stage."""

    def __call__(
        self,
        mine: Sequence[SequenceStep],
        drawn: Sequence[Sequence[Sampled]],
        batch: Batch | None,
        streams: torch.Tensor,
    ) -> list[list[int]]:
        """Return guesses of what follows the last token of each sequence that draws."""


def drafter_of(
    model: Transformer,
    cache: KVCache,
    targets: Targets | None,
    first_slot: int,
    n_drafts: int,
    min_confidence: float,
) -> Drafter | None:
    """Return the drafter a model was read with. Of this DP group's slots `first_slot` is 0."""
    if model.dspark is not None and targets is not None:
        return Blocks(model, model.dspark, cache, targets, first_slot, n_drafts, min_confidence)
    return Ahead(model, cache, first_slot, n_drafts) if model.mtp else None


class Ahead:
    """The MTP module: a guess from the network's streams, each further one from its own."""

    def __init__(self, model: Transformer, cache: KVCache, first_slot: int, n_drafts: int) -> None:
        self._model, self._cache = model, cache
        self._first_slot, self._n_drafts = first_slot, n_drafts

    def __call__(
        self,
        mine: Sequence[SequenceStep],
        drawn: Sequence[Sequence[Sampled]],
        batch: Batch | None,
        streams: torch.Tensor,
    ) -> list[list[int]]:
        """See `Drafter`."""
        next_ids: list[int] = []
        rows: list[int] = []
        turns: list[tuple[int, int]] = []  # slot, and from a row's number to its position
        stops = batch.cu_seqlens[1:].tolist() if batch is not None else []
        for s, tokens, stop in zip(mine, drawn, stops, strict=True):
            ids = [*s.token_ids[1:], s.next_id or 0]
            if s.sampling is not None:
                # What follows a wrong draft is computed again before anything depends on it.
                known = _known(tokens)
                ids[len(ids) - 1 - s.n_drafts :] = known + [0] * (s.n_drafts + 1 - len(known))
                rows.append(stop - 1 - s.n_drafts + len(known) - 1)
                turns.append((s.slot - self._first_slot, s.start + len(s.token_ids) - stop))
            next_ids += ids
        model, layers, n = self._model, self._cache.layers, len(next_ids)
        packed = torch.tensor(next_ids + rows, dtype=torch.int64, device=streams.device)
        packed = _as_first(packed, model.shard)
        rows = packed[n:].tolist()
        x, logits = model.draft(streams, packed[:n], batch, layers, rows)
        guesses = [logits.argmax(-1)]
        slots = [slot for slot, _ in turns]
        first, end = span_of(len(rows), model.shard.cp)
        for ahead in range(1, self._n_drafts):
            at = [row + to + ahead for row, (_, to) in zip(rows, turns, strict=True)]
            last = guesses[-1]
            block = self._cache.block(slots, at, last.unsqueeze(1).tolist()) if slots else None
            x, logits = model.draft(x[first:end], last, block, layers, range(len(slots)))
            guesses.append(logits.argmax(-1))
        drafts: list[list[int]] = torch.stack(guesses, 1).tolist()
        return drafts


class Blocks:
    """DSpark: a block of guesses, as many of them as are likely to be right."""

    def __init__(
        self,
        model: Transformer,
        dspark: DSpark,
        cache: KVCache,
        targets: Targets,
        first_slot: int,
        n_drafts: int,
        min_confidence: float,
    ) -> None:
        self._model, self._dspark, self._cache = model, dspark, cache
        self._targets, self._first_slot = targets, first_slot
        self._n_drafts, self._min_confidence = n_drafts, min_confidence

    def __call__(
        self,
        mine: Sequence[SequenceStep],
        drawn: Sequence[Sequence[Sampled]],
        batch: Batch | None,
        streams: torch.Tensor,
    ) -> list[list[int]]:
        """See `Drafter`. A guess counts only with all before it, and so does its chance."""
        if batch is not None:
            stages = self._cache.layers[len(self._model.layers) :]
            self._dspark.take(self._targets.seen, batch, stages)
        self._targets.seen.clear()
        drawing = [(s, _known(t)) for s, t in zip(mine, drawn, strict=True) if s.sampling]
        if not drawing:
            self._model.draft_blocks(None, self._cache.layers)
            return []
        last = [known[-1] for _, known in drawing]
        at = [s.start + len(s.token_ids) - s.n_drafts + len(known) - 1 for s, known in drawing]
        packed = _as_first(torch.tensor([last, at], device=streams.device), self._model.shard)
        last, at = packed.tolist()
        c = self._dspark.dspark
        block = self._cache.block(
            [s.slot - self._first_slot for s, _ in drawing],
            at,
            [[token, *[c.noise_token_id] * (c.block_size - 1)] for token in last],
        )
        guesses = self._model.draft_blocks(block, self._cache.layers)
        chance = guesses.confidence[:, : self._n_drafts].cumprod(-1)
        counts = (chance >= self._min_confidence).sum(-1).tolist()
        return [ids[:n] for ids, n in zip(guesses.ids.tolist(), counts, strict=True)]


def _known(tokens: Sequence[Sampled]) -> list[int]:
    """Return what was drawn; a rank that does not draw is told by the one that does."""
    return [t.token_id for t in tokens] or [0]


def _as_first(x: torch.Tensor, shard: Shard) -> torch.Tensor:
    """Return what the rank has that draws: the first of its CP group, and of its TP group."""
    for group in (shard.tp, shard.cp):
        if group.size > 1:
            x = group.all_gather(x, [len(x)] * group.size)[0]
    return x
