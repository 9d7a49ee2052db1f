"""`bench serve`: load on a completions endpoint, and when each piece of each answer came."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from v4_ascend.errors import ConfigError

# Ordinary tokens of V4's vocabulary and of synthetic ones, so that a prompt has its exact length.
FIRST_TOKEN, LAST_TOKEN = 10, 249
TIMEOUT_S = 3600


@dataclass(frozen=True)
class Prompt:
    """What one request asks: text, or tokens; and how much it wants."""

    prompt: str | list[int]
    output_len: int


@dataclass(frozen=True, kw_only=True)
class Load:
    """How requests come: `rate` a second on average, whatever is answered (open loop), or all at
    once; never more than `concurrency` at a time (closed loop), if it is given.
    """

    rate: float | None
    concurrency: int | None
    seed: int


@dataclass
class Measured:
    """One request; times are seconds since the load began."""

    sent: float
    pieces: list[float] = field(default_factory=list)  # when text came
    end: float = 0.0
    n_input: int = 0
    n_output: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Seconds to the first piece."""
        return (self.pieces[0] if self.pieces else self.end) - self.sent

    @property
    def latency(self) -> float:
        """Seconds to the last piece."""
        return (self.pieces[-1] if self.pieces else self.end) - self.sent

    @property
    def tpot(self) -> float:
        """Mean seconds of each token after the first."""
        return (self.latency - self.ttft) / max(1, self.n_output - 1)

    @property
    def itls(self) -> list[float]:
        """Seconds between pieces."""
        return [b - a for a, b in zip(self.pieces, self.pieces[1:], strict=False)]


def random_prompts(n: int, input_len: int, output_len: int, seed: int) -> list[Prompt]:
    """Make prompts of so many tokens each, no two alike from their first tokens on."""
    rng = random.Random(seed)
    return [
        Prompt([rng.randint(FIRST_TOKEN, LAST_TOKEN) for _ in range(input_len)], output_len)
        for _ in range(n)
    ]


def prompts_of_file(file: Path, n: int, output_len: int) -> list[Prompt]:
    """Read JSON lines with `prompt` and maybe `output_len`; over again if there are fewer than n.

    Raises:
        ConfigError: the file, and the line that is wrong.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as e:
        raise ConfigError(str(file), f"cannot be read: {e.strerror}") from e
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found.append(Prompt(str(row["prompt"]), int(row.get("output_len", output_len))))
        except (ValueError, KeyError, TypeError) as e:
            raise ConfigError(f"{file}:{number}", f"must be an object with a prompt: {e}") from e
    if not found:
        raise ConfigError(str(file), "has no prompts")
    return [found[i % len(found)] for i in range(n)]


async def run_load(
    client: httpx.AsyncClient,
    model: str,
    prompts: Sequence[Prompt],
    load: Load,
    report: Callable[[int, int], None],
) -> tuple[list[Measured], float]:
    """Send all prompts; return what was measured of each, and the seconds it took in all."""
    rng = random.Random(load.seed)
    room = asyncio.Semaphore(load.concurrency or len(prompts))
    begin = time.perf_counter()
    n_done = 0

    async def one(prompt: Prompt) -> Measured:
        nonlocal n_done
        async with room:
            measured = await _measure(client, model, prompt, begin)
        n_done += 1
        report(n_done, len(prompts))
        return measured

    tasks = []
    due = begin
    for prompt in prompts:
        tasks.append(asyncio.create_task(one(prompt)))
        if load.rate is not None:
            due += rng.expovariate(load.rate)  # arrivals do not wait for answers
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
    return list(await asyncio.gather(*tasks)), time.perf_counter() - begin


async def _measure(client: httpx.AsyncClient, model: str, prompt: Prompt, begin: float) -> Measured:
    measured = Measured(time.perf_counter() - begin)
    body = {
        "model": model,
        "prompt": prompt.prompt,
        "max_tokens": prompt.output_len,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    try:
        async with client.stream("POST", "/completions", json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                measured.error = f"status {answer.status_code}: {answer.text[:200]}"
                return measured
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    _take(measured, json.loads(line.removeprefix("data: ")), begin)
    except (httpx.HTTPError, ValueError) as e:
        measured.error = f"{type(e).__name__}: {e}"
    measured.end = time.perf_counter() - begin
    if measured.error is None and not measured.n_output:
        measured.error = "the stream ended without usage"
    return measured


def _take(measured: Measured, event: dict[str, object], begin: float) -> None:
    if "error" in event:
        measured.error = json.dumps(event["error"])
    if isinstance(usage := event.get("usage"), dict):
        measured.n_input = usage["prompt_tokens"]
        measured.n_output = usage["completion_tokens"]
    if event.get("choices"):
        measured.pieces.append(time.perf_counter() - begin)
