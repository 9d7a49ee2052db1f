"""Tokens per second of many prompts at once, beside `generate` of Hugging Face transformers.

Ours is the serving engine without its HTTP front: the scheduler, the paged caches, the sampler.
Theirs is asked prompt by prompt, and with all prompts in one batch, short ones padded on the left
as it asks for: a padded V4 sequence is compressed in other groups, so its answers are others, and
how many are the same is part of the result. All run in one process, in turns; the best round of
each counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from v4_ascend.checkpoint.reader import Checkpoint
from v4_ascend.config.topology import ParallelConfig
from v4_ascend.errors import ConfigError
from v4_ascend.ops import use_policy
from v4_ascend.runtime.bench import load_transformers
from v4_ascend.runtime.bench_ranks import plan_here
from v4_ascend.runtime.engine import Engine
from v4_ascend.runtime.limits import limits_of
from v4_ascend.runtime.messages import Sampling
from v4_ascend.runtime.scheduler import Scheduler
from v4_ascend.runtime.sequence import Request

OURS = "v4-ascend, cpu"
GREEDY = Sampling(0.0, 1.0, 0)

Tokens = list[list[int]]  # of each prompt, those drawn


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What is timed: prompts from `shortest` to `prompt` tokens, and tokens drawn behind each."""

    n_prompts: int
    shortest: int
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
    if work.shortest > work.prompt:
        raise ConfigError("--shortest", f"is {work.shortest}, longer than --prompt {work.prompt}")
    g = torch.Generator().manual_seed(0)
    lengths = torch.linspace(work.shortest, work.prompt, work.n_prompts).round().int().tolist()
    prompts = [torch.randint(0, config.vocab_size, (n,), generator=g).tolist() for n in lengths]
    with torch.inference_mode(), use_policy(backend="cpu"):
        sides: dict[str, Callable[[], Tokens]] = {OURS: _ours(checkpoint, work, prompts)}
        if against_transformers:
            model = load_transformers(checkpoint)
            sides["transformers, prompt by prompt"] = _theirs(
                model, work, [[prompt] for prompt in prompts]
            )
            sides["transformers, one batch"] = _theirs(model, work, [prompts])
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
    plan = plan_here(
        checkpoint.path,
        checkpoint.config,
        ParallelConfig(),
        length=work.prompt + work.tokens,
        n_sequences=work.n_prompts,
        max_chunk=min(2048, work.n_prompts * work.prompt),
    )
    # No prefix is kept: a later round would find the caches of the one before.
    plan = plan.model_copy(update={"prefix_snapshots": 0})
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


def _theirs(model: Any, work: Generation, batches: Sequence[Tokens]) -> Callable[[], Tokens]:
    def run() -> Tokens:
        answers: Tokens = []
        for batch in batches:
            longest = max(map(len, batch))
            padding = [[0] * (longest - len(prompt)) for prompt in batch]
            drawn = model.generate(
                torch.tensor([p + prompt for p, prompt in zip(padding, batch, strict=True)]),
                attention_mask=torch.tensor([p + [1] * (longest - len(p)) for p in padding]),
                do_sample=False,
                min_new_tokens=work.tokens,
                max_new_tokens=work.tokens,
                pad_token_id=0,
            )
            answers += drawn[:, longest:].tolist()
        return answers

    return run
