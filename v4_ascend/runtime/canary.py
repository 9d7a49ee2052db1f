"""What a model must show before it is called ready: every rank takes part."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from v4_ascend.errors import ConfigError, ParityError
from v4_ascend.runtime.compare import EXACT, ROUNDED, Bounds, Record, relative_error
from v4_ascend.runtime.engine import Engine
from v4_ascend.supernode.plan import Plan

N_TOKENS = 140  # of the self-check: they cross the window and both compress ratios
N_DECODED = 16  # of them one by one, the window's last and what lies behind it
REFERENCE_TOKENS = 512  # of each sequence of a reference, at most
# Two paths through the same weights differ by summation order alone; a rounding to FP8 or
# bf16 may fall the other way, and is seen as a small relative difference of the logits.
TOLERANCE = {True: 0.25, False: 2e-3}  # quantised or bf16; fp32


@dataclass(frozen=True)
class CanaryReport:
    """How the model was checked before it was called ready."""

    kind: Literal["reference", "unreferenced"]
    median_relative_error: float


@torch.inference_mode()
def canary(engine: Engine, plan: Plan) -> CanaryReport:
    """Compare with the recorded reference; without one, prefill with decode.

    Raises:
        ParityError: they are not the same; the message has position and figures, and with a
            traced reference the first layer that is not.
        ConfigError: the reference is no record of a run of such a model.
    """
    if plan.reference is None:
        return _prefill_is_decode(engine)
    return _is_reference(engine, plan, Record(Path(plan.reference)))


def _prefill_is_decode(engine: Engine) -> CanaryReport:
    n = min(N_TOKENS, engine.max_model_len)
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, engine.config.vocab_size, (n,), generator=g).tolist()
    split = max(n - N_DECODED, n // 2)
    whole = engine.sequence(ids, prefill=n, chunk=engine.max_chunk)
    stepped = engine.sequence(ids, prefill=split, chunk=engine.max_chunk)
    if whole is None or stepped is None:
        return CanaryReport("unreferenced", 0.0)
    error = relative_error(whole, stepped)[split:]
    # The median: one rounding that falls the other way can reroute a token to other
    # experts; a broken cache is wrong at every later position. Prefilled tokens do not count:
    # they are right whatever decode does.
    worst = float(error.median())
    bound = TOLERANCE[not engine.is_exact]
    if not worst <= bound:
        raise ParityError(
            f"canary: prefill and decode differ by {worst:.3g} of the logits' norm (median of "
            f"{len(error)} decoded tokens, worst at token {split + int(error.argmax())}), "
            f"must be at most {bound:g}"
        )
    return CanaryReport("unreferenced", worst)


def _is_reference(engine: Engine, plan: Plan, record: Record) -> CanaryReport:
    """Run the reference's tokens; stages report in their order, the first that is wrong alone."""
    ids, logits = _tokens(record, engine), record.tensor("logits")
    bounds = EXACT if engine.is_exact and record.is_exact else ROUNDED
    streams: dict[int, list[torch.Tensor]] = {}
    errors, problem = [], None
    for i, sequence in enumerate(ids):
        n = min(len(sequence), engine.max_model_len, REFERENCE_TOKENS)
        seen = streams if i == 0 and engine.groups.cp.size == 1 else None
        got = engine.sequence(sequence[:n], prefill=n, chunk=engine.max_chunk, streams=seen)
        if got is not None:
            errors.append(relative_error(logits[i, :n], got))
    wrong = _first_wrong_layer(record, streams, bounds)
    error = torch.cat(errors) if errors else torch.zeros(1)
    median, worst = float(error.median()), float(error.max())
    if not (median <= bounds.median and worst <= bounds.worst):
        at = (
            int((~(error <= bounds.worst)).nonzero()[0])
            if worst > bounds.worst
            else int(error.argmax())
        )
        problem = (
            f"the logits differ by {median:.3g} of their norm (median of {len(error)} tokens), "
            f"must be at most {bounds.median:g}; worst {worst:.3g}, at most {bounds.worst:g}, "
            f"first at token {at}"
        )
    if wrong is not None:
        problem = f"{wrong}; {problem or 'the logits are of another stage'}"
    for stage in range(plan.parallel.pp_size):
        if problem and engine.groups.rank // plan.parallel.stage_size == stage:
            raise ParityError(f"canary: not as {record.path}: {problem}")
        engine.groups.barrier()
    return CanaryReport("reference", median)


def _tokens(record: Record, engine: Engine) -> list[list[int]]:
    if "input_ids" not in record.names:
        raise ConfigError(
            str(record.path), "has no input_ids: record it anew with v4-ascend parity record"
        )
    ids = record.tensor("input_ids")
    vocab = record.tensor("logits").shape[-1]
    if vocab != engine.config.vocab_size:
        raise ConfigError(
            str(record.path), f"has {vocab} logits, the model {engine.config.vocab_size}"
        )
    out: list[list[int]] = ids.tolist()
    return out


def _first_wrong_layer(
    record: Record, streams: dict[int, list[torch.Tensor]], bounds: Bounds
) -> str | None:
    """Compare what left each layer here with a traced reference."""
    recorded = record.streams
    for layer in sorted(set(recorded) & set(streams)):
        got = torch.cat(streams[layer])
        want = torch.cat([record.tensor(n) for n in recorded[layer]])[: len(got)]
        error = float(relative_error(want, got).median())
        if not error <= bounds.op:
            return f"layer {layer} is the first whose streams differ ({error:.3g} of their norm)"
    return None
