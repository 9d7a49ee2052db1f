"""Simulate a plan: its stages, its exchanges on each fabric level, its micro-batches."""

from __future__ import annotations

from v4_ascend.supernode.cost import Load
from v4_ascend.supernode.planning import PoolPlan
from v4_ascend.supernode.search import Choice
from v4_ascend.supernode.simulation import Pipeline
from v4_ascend.supernode.timing import LayerWork, TimeModel


def decode_pipeline(pool: PoolPlan, choice: Choice) -> Pipeline:
    """Cut a decode step of the chosen batch into one micro-batch a stage."""
    model = pool.search.time_model(choice.parallel)
    n = len(choice.layers)
    load = pool.search.decode_load(choice.parallel, -(-choice.batch // n))
    return _pipeline(model, choice, load, n, is_decode=True)


def prefill_pipeline(pool: PoolPlan, choice: Choice) -> Pipeline:
    """Cut one typical prompt into chunks, which follow each other through the stages."""
    model = pool.search.time_model(choice.parallel)
    load, n_chunks = pool.search.prefill_load(choice.parallel)
    return _pipeline(model, choice, load, n_chunks, is_decode=False)


def _pipeline(
    model: TimeModel, choice: Choice, load: Load, n_micro_batches: int, *, is_decode: bool
) -> Pipeline:
    works: dict[tuple[int, bool], LayerWork] = {}
    c = model.memory.config

    def work(layer: int) -> LayerWork:
        kind = (c.compress_ratios[layer], layer < c.n_hash_layers)
        if kind not in works:
            works[kind] = model.layer_work(layer, load)
        return works[kind]

    p, tail, n_drafts = choice.parallel, model.head_s(load), model.memory.serving.n_draft_tokens
    if is_decode and n_drafts:
        tail += model.drafter_s(load, n_drafts)
    return Pipeline(
        stages=tuple(tuple(work(i) for i in range(*layers)) for layers in choice.layers),
        stage_size=p.stage_size,
        ep_size=p.ep_size,
        n_micro_batches=n_micro_batches,
        boundary_s=model.boundary_s(load.n_tokens, choice.layers),
        tail_s=tail,
        is_decode=is_decode,
    )
