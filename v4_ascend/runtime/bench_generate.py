"""Tokens per second of many prompts at once, beside `generate` of Hugging Face transformers.

Ours is the serving engine without its HTTP front: the scheduler, the paged caches, the sampler.
Theirs is asked prompt by prompt, and with all prompts in one batch, which needs prompts of one
length: padding would enter the compressed entries. All run in one process, in turns; the best
round of each counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from v4_ascend.checkpoint.reader import Checkpoint
from v4_ascend.config.topology import (
    Cluster,
    Model,
    ParallelConfig,
    Runtime,
    Serve,
    Supernode,
    Topology,
)
from v4_ascend.errors import ConfigError
from v4_ascend.ops import use_policy
from v4_ascend.runtime.bench import load_transformers
from v4_ascend.runtime.engine import Engine
from v4_ascend.runtime.limits import limits_of
from v4_ascend.runtime.messages import Sampling
from v4_ascend.runtime.scheduler import Scheduler
from v4_ascend.runtime.sequence import Request
from v4_ascend.supernode.planning import deploy_plan

OURS = "v4-ascend, cpu"
GREEDY = Sampling(0.0, 1.0, 0)

Tokens = list[list[int]]  # of each prompt, those drawn


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What is timed: prompts of one length, and tokens drawn greedily behind each."""

    n_prompts: int
    prompt: int
    tokens: int
    rounds: int


@dataclass(frozen=True, slots=True)
class Generated:
    """The best round of one side; `same` of its answers are ours, token for token."""

    who: str
    tokens_per_s: float
    same: int


def bench_generate(
    checkpoint: Checkpoint,
    work: Generation,
    *,
    against_transformers: bool,
    progress: Callable[[int, int], None],
) -> list[Generated]:
    """Time all sides, prefill included; the first is ours.

    Raises:
        BackendUnavailableError: transformers is not installed.
        ConfigError: the prompts and answers are longer than the model takes, or transformers
            cannot read a quantised checkpoint of ours.
    """
    config = checkpoint.config
    if work.prompt + work.tokens > config.max_seq_len:
        raise ConfigError("--prompt", f"is longer than {config.max_seq_len} tokens with its answer")
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (work.n_prompts, work.prompt), generator=g)
    with torch.inference_mode(), use_policy(backend="cpu"):
        sides: dict[str, Callable[[], Tokens]] = {OURS: _ours(checkpoint, work, ids.tolist())}
        if against_transformers:
            model = load_transformers(checkpoint)
            sides["transformers, prompt by prompt"] = _theirs(model, work, ids.split(1))
            sides["transformers, one batch"] = _theirs(model, work, [ids])
        best, answers = dict.fromkeys(sides, float("inf")), {}
        for number in range(work.rounds + 1):
            for who, run in sides.items():
                start = time.perf_counter()
                answers[who] = run()
                if number:  # the first warms up
                    best[who] = min(best[who], time.perf_counter() - start)
            progress(number + 1, work.rounds + 1)
    n = work.n_prompts * work.tokens
    return [
        Generated(who, n / s, sum(map(list.__eq__, answers[who], answers[OURS])))
        for who, s in best.items()
    ]


def _ours(checkpoint: Checkpoint, work: Generation, prompts: Tokens) -> Callable[[], Tokens]:
    here = Supernode(name="here", hosts=("localhost",), devices_per_host=1)
    topology = Topology(
        name="bench",
        cluster=Cluster(device="cpu", supernodes=(here,)),
        model=Model(checkpoint=str(checkpoint.path.absolute()), name="bench"),
        serve=Serve(max_model_len=max(work.prompt + work.tokens, 128), concurrency=work.n_prompts),
        layout=ParallelConfig(),
        runtime=Runtime(max_chunk=min(2048, work.n_prompts * work.prompt)),
    )
    # No prefix is kept: a later round would find the caches of the one before.
    plan = deploy_plan(topology, checkpoint.config).model_copy(update={"prefix_snapshots": 0})
    engine = Engine.load(plan, lambda done, total: None)
    limits = limits_of(plan, checkpoint.config)

    def run() -> Tokens:
        scheduler = Scheduler(limits, eos_id=-1)  # answers have the length asked for
        answers: Tokens = [[] for _ in prompts]
        for i, prompt in enumerate(prompts):
            scheduler.add(Request(id=i, prompt_ids=prompt, max_tokens=work.tokens, sampling=GREEDY))
        while (step := scheduler.next_step()) is not None:
            for token in scheduler.apply(engine.step(step)):
                answers[token.request].append(token.sampled.token_id)
        return answers

    return run


def _theirs(model: Any, work: Generation, batches: Sequence[torch.Tensor]) -> Callable[[], Tokens]:
    def run() -> Tokens:
        answers: Tokens = []
        for batch in batches:
            drawn = model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                do_sample=False,
                min_new_tokens=work.tokens,
                max_new_tokens=work.tokens,
                pad_token_id=0,
            )
            answers += drawn[:, work.prompt :].tolist()
        return answers

    return run
