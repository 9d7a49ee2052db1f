"""One rank's model: runs steps of ragged batches and samples from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from v4_ascend.backends import find_backend
from v4_ascend.checkpoint.reader import Checkpoint
from v4_ascend.config.model import ModelConfig
from v4_ascend.errors import ParityError
from v4_ascend.model.numerics import Numerics
from v4_ascend.model.transformer import Transformer
from v4_ascend.ops import sample
from v4_ascend.runtime.kv_cache import Chunk, KVCache
from v4_ascend.runtime.load import load_model, resolve_checkpoint
from v4_ascend.runtime.messages import Sampled, SequenceStep, Step, StepResult
from v4_ascend.runtime.parity import cache_records, sequence_logits
from v4_ascend.supernode.plan import Plan

CANARY_TOKENS = 140  # crosses the window and both compress ratios
# Two paths through the same weights differ by summation order alone; a rounding to FP8 or
# bf16 may fall the other way, and is seen as a small relative difference of the logits.
CANARY_TOLERANCE = {True: 0.25, False: 2e-3}  # quantised or bf16; fp32


@dataclass(frozen=True)
class CanaryReport:
    """How the model was checked before it was called ready."""

    kind: Literal["reference", "unreferenced"]
    median_relative_error: float


class Engine:
    """Owns the model and its caches; one step at a time."""

    def __init__(
        self,
        model: Transformer,
        *,
        max_batch_size: int,
        max_model_len: int,
        max_chunk: int,
        records: tuple[str, str],
        device: str = "cpu",
        min_page_rows: int = 1,
    ) -> None:
        self.model = model
        self.max_batch_size = max_batch_size
        self.max_model_len = max_model_len
        self.max_chunk = max_chunk
        self.cache = KVCache(
            model.config,
            n_slots=max_batch_size,
            max_model_len=max_model_len,
            max_chunk=max_chunk,
            kv_record=records[0],
            index_record=records[1],
            device=device,
            min_page_rows=min_page_rows,
        )

    @classmethod
    def load(cls, plan: Plan, progress: Callable[[int, int], None]) -> Engine:
        """Load the plan's checkpoint; `progress` sees bytes read and in all.

        Raises:
            BackendUnavailableError: the plan's backend cannot run here.
        CheckpointError: it is not the checkpoint its config describes.
        """
        backend = find_backend(plan.backend, "plan.backend")
        backend.require()
        backend.use_chip(plan.chip)
        checkpoint = Checkpoint(resolve_checkpoint(plan.checkpoint))
        numerics = Numerics.of(checkpoint.config, plan.dtype, plan.quant_sim)
        model = load_model(
            checkpoint, numerics, with_mtp=False, progress=progress, device=backend.device()
        )
        return cls(
            model,
            max_batch_size=plan.max_batch_size,
            max_model_len=plan.max_model_len,
            max_chunk=plan.max_chunk,
            records=cache_records(backend, checkpoint.config, numerics, plan.kernels),
            device=backend.device(),
            min_page_rows=backend.min_page_rows,
        )

    @property
    def config(self) -> ModelConfig:
        """Return the model's configuration."""
        return self.model.config

    @torch.inference_mode()
    def step(self, step: Step) -> StepResult:
        """Run the next tokens of some sequences; sample where a sequence asks for it."""
        chunks = [Chunk(s.slot, s.token_ids, s.start) for s in step.sequences]
        batch = self.cache.batch(chunks)
        streams = self.model(batch, self.cache.layers)
        wanted = [i for i, s in enumerate(step.sequences) if s.sampling is not None]
        if not wanted:
            return StepResult(sampled=[])
        last = batch.cu_seqlens[1:].long()[wanted] - 1
        logits = self.model.head(streams[last])
        return StepResult(sampled=_sampled([step.sequences[i] for i in wanted], logits))

    @torch.inference_mode()
    def canary(self) -> CanaryReport:
        """Check that prefill and decode agree, before the first request.

        Raises:
            ParityError: they do not; the message has position and figures.
        """
        n = min(CANARY_TOKENS, self.max_model_len)
        g = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.config.vocab_size, (n,), generator=g).tolist()
        split = n // 2
        whole = sequence_logits(self.model, self.cache, ids, prefill=n, chunk=self.max_chunk)
        stepped = sequence_logits(
            self.model, self.cache, ids, prefill=split, chunk=min(split, self.max_chunk)
        )
        error = (whole - stepped).norm(dim=-1) / whole.norm(dim=-1)
        # The median: one rounding that falls the other way can reroute a token to other
        # experts; a broken cache is wrong at every later position.
        worst = float(error.median())
        numerics = self.model.numerics
        is_rounded = numerics.quant_sim or numerics.dtype != torch.float32
        bound = CANARY_TOLERANCE[is_rounded]
        if not worst <= bound:
            raise ParityError(
                f"canary: prefill and decode differ by {worst:.3g} of the logits' norm (median of "
                f"{n} tokens, worst at token {int(error.argmax())}), must be at most {bound:g}"
            )
        return CanaryReport("unreferenced", worst)


def _sampled(sequences: list[SequenceStep], logits: torch.Tensor) -> list[Sampled]:
    settings = [s.sampling for s in sequences if s.sampling is not None]
    device = logits.device
    ids = sample(
        logits,
        torch.tensor([s.temperature for s in settings], device=device),
        torch.tensor([s.top_p for s in settings], device=device),
        torch.tensor([s.seed for s in settings], dtype=torch.int64, device=device),
        torch.tensor([s.start + len(s.token_ids) for s in sequences], device=device),
    ).tolist()
    out = []
    for sequence, setting, row, token in zip(sequences, settings, logits, ids, strict=True):
        if setting.n_logprobs is None:
            out.append(Sampled(sequence.request, token, None, []))
            continue
        logprobs = row.log_softmax(-1)
        top = logprobs.topk(min(setting.n_logprobs, len(row)))
        pairs = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        out.append(Sampled(sequence.request, token, float(logprobs[token]), pairs))
    return out
