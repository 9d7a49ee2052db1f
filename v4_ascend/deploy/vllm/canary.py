"""Whether an OpenAI endpoint serves the model it should: its prompt logprobs beside a record's.

vLLM tells, for each token of a prompt, the logprobs of the likeliest ones (`prompt_logprobs`).
That is less than the logits the native engine's canary compares, and enough to see wrong weights,
a wrong tokenizer, garbled experts or a broken cache: at positions where the reference is sure, the
same token must lead, and the logprobs of what leads must be near.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from safetensors import SafetensorError, safe_open

from v4_ascend.errors import ConfigError, ParityError

N_TOKENS = 512  # of the record's first sequence, at most
N_TOP = 5
SURE = 1.0  # nats the first token leads by where it must lead in both
# Weights rounded otherwise (INT8, INT4, FP8) move logprobs; wrong ones move all of them by nats.
MIN_AGREE = 0.9
MAX_MEDIAN = 0.5


@dataclass(frozen=True)
class Agreement:
    """How an endpoint and a record agree. Logprobs in nats."""

    n_positions: int
    n_sure: int
    agree: float
    median_error: float

    def __str__(self) -> str:
        """Say it in a line."""
        return (
            f"reference: {self.agree:.1%} of {self.n_sure} sure tokens the same, logprobs "
            f"{self.median_error:.2g} apart (median)"
        )


def canary(url: str, model: str, reference: Path, headers: dict[str, str]) -> Agreement:
    """Compare prompt logprobs with a `parity record`.

    Raises:
        ConfigError: the reference is no such record.
        ParityError: the endpoint shows no prompt logprobs, or not the reference's.
    """
    ids, logits = _read(reference)
    body = {
        "model": model,
        "prompt": ids,
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": N_TOP,
    }
    answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=300)
    if answer.status_code != 200:
        raise ParityError(f"canary: {url}: status {answer.status_code}: {answer.text[:200]}")
    shown = answer.json()["choices"][0].get("prompt_logprobs")
    if not isinstance(shown, list) or len(shown) != len(ids):
        raise ParityError(f"canary: {url} shows no prompt_logprobs; nothing can be compared")
    found = agreement(logits, shown)
    if found.agree < MIN_AGREE or found.median_error > MAX_MEDIAN:
        raise ParityError(
            f"canary: {found}; must be {MIN_AGREE:.0%} and at most {MAX_MEDIAN:g}: {url} does not "
            f"serve what {reference} records"
        )
    return found


def agreement(logits: np.ndarray[Any, Any], shown: list[dict[str, Any] | None]) -> Agreement:
    """Compare logits [s, vocab_size] with what follows each of s tokens, the first entry None."""
    of = logits.astype(np.float64)
    logprobs = of - np.log(np.exp(of - of.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logprobs -= of.max(-1, keepdims=True)
    n_sure = n_same = 0
    errors: list[float] = []
    for want, entry in zip(logprobs[:-1], shown[1:], strict=True):
        theirs = {int(k): float(v["logprob"]) for k, v in (entry or {}).items()}
        if not theirs:
            continue
        errors += [abs(want[token] - p) for token, p in theirs.items()]
        second, first = np.partition(want, -2)[-2:]
        if first - second >= SURE:
            n_sure += 1
            n_same += int(max(theirs, key=lambda k: theirs[k]) == int(want.argmax()))
    if not errors:
        raise ParityError("canary: the prompt logprobs are empty; nothing can be compared")
    agree = n_same / n_sure if n_sure else 1.0
    return Agreement(len(shown) - 1, n_sure, agree, float(np.median(errors)))


def _read(reference: Path) -> tuple[list[int], np.ndarray[Any, Any]]:
    try:
        with safe_open(str(reference), framework="numpy") as file:
            if missing := {"logits", "input_ids"} - set(file.keys()):
                raise ConfigError(str(reference), f"is no parity record: no {sorted(missing)[0]}")
            given = file.get_slice("logits")
            n = min(N_TOKENS, given.get_shape()[1])
            ids, logits = file.get_slice("input_ids")[0, :n], given[0, :n]
    except (OSError, SafetensorError) as e:
        raise ConfigError(str(reference), f"cannot be read as safetensors: {e}") from e
    return [int(i) for i in ids], logits
