"""Tokens from logits: each request's rules applied, then one drawn."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch

from v4_ascend.ops import sample
from v4_ascend.runtime.guide import Guide, GuideFactory
from v4_ascend.runtime.messages import Rules, Sampled, SequenceStep


class Shaper:
    """Changes one request's logits by its rules, and by what was drawn so far.

    The tokens come with the steps, as they do for the caches: nothing is sent twice. Of the
    penalties: presence and frequency count drawn tokens, repetition those of the prompt too, as
    vLLM and transformers have it.
    """

    def __init__(
        self,
        request: int,
        rules: Rules,
        guides: GuideFactory | None,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.request, self._rules = request, rules
        self._guide: Guide | None = None
        if rules.grammar is not None:
            if guides is None:
                raise ValueError("a grammar, and no tokenizer to follow it with")
            self._guide = guides.guide(rules.grammar)
        self._n_known = rules.n_before
        self._guesses: list[int] = []  # of the last step: the next one starts behind right ones
        self._n_drawn = 0
        self._counts = torch.zeros(vocab_size, device=device)
        n_prompt = len(rules.before) - rules.n_drawn
        self._is_seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        prompt = torch.tensor(rules.before[:n_prompt], dtype=torch.int64, device=device)
        self._is_seen[prompt] = True
        self._count(rules.before[n_prompt:])
        biased = rules.logit_bias
        self._biased = torch.tensor(list(biased), dtype=torch.int64, device=device)
        self._bias = torch.tensor(list(biased.values()), device=device)

    @property
    def error(self) -> str | None:
        """Why nothing can be drawn."""
        return self._guide.error if self._guide is not None else None

    def take(self, step: SequenceStep) -> None:
        """Take in the tokens of a step that were drawn, each once; of its guesses none yet."""
        n = len(step.token_ids) - step.n_drafts
        n_known = self._n_known
        right = self._guesses[: max(0, step.start - n_known)]
        new = right + step.token_ids[max(0, n_known - step.start) : n]
        self._n_known += len(new)
        self._guesses = step.token_ids[n:]
        self._count(new)

    def behind(self, guesses: Sequence[int]) -> Shaper:
        """Return a shaper that has taken in guesses too; this one stays as it is."""
        if not guesses:
            return self
        other = copy(self)
        other._counts = self._counts.clone()
        if self._guide is not None:
            other._guide = self._guide.copy()
        other._count(guesses)
        return other

    def shape(self, row: torch.Tensor, eos_id: int) -> None:
        """Change logits in place, ``[vocab_size]``, fp32."""
        r = self._rules
        row.index_add_(0, self._biased, self._bias)
        if r.repetition_penalty != 1:
            repeated = torch.where(row > 0, row / r.repetition_penalty, row * r.repetition_penalty)
            row.copy_(torch.where(self._is_seen | (self._counts > 0), repeated, row))
        row -= r.frequency_penalty * self._counts
        row -= r.presence_penalty * (self._counts > 0)
        guide = self._guide
        if self._n_drawn < r.min_tokens and not (guide is not None and guide.is_complete):
            row[eos_id] = -torch.inf
        if guide is not None:
            allowed = torch.from_numpy(guide.allowed()).to(row.device)
            row.masked_fill_(~allowed, -torch.inf)

    def _count(self, drawn: Sequence[int]) -> None:
        self._n_drawn += len(drawn)
        if drawn:
            ids = torch.tensor(drawn, dtype=torch.int64, device=self._counts.device)
            self._counts.index_add_(0, ids, torch.ones_like(ids, dtype=self._counts.dtype))
            if self._guide is not None:
                self._guide.take(drawn)


class Sampler:
    """Draws the tokens of a rank's sequences; slots have a shaper each, where there are rules."""

    def __init__(
        self,
        vocab_size: int,
        eos_id: int,
        device: torch.device,
        guides: GuideFactory | None = None,
    ) -> None:
        self._vocab_size, self._eos_id, self._device = vocab_size, eos_id, device
        self._guides = guides
        self._shapers: dict[int, Shaper] = {}

    def take(self, sequences: Sequence[SequenceStep]) -> None:
        """Take in a step's tokens: of every sequence whose tokens this rank may draw."""
        for s in sequences:
            if s.rules is not None:
                shaper = Shaper(s.request, s.rules, self._guides, self._vocab_size, self._device)
                self._shapers[s.slot] = shaper
            elif s.slot not in self._shapers:
                continue
            if self._shapers[s.slot].request == s.request:
                self._shapers[s.slot].take(s)
            else:
                del self._shapers[s.slot]  # of the request that had the slot before

    def draw(self, sequences: Sequence[SequenceStep], logits: torch.Tensor) -> list[Sampled]:
        """Draw a token for each sequence from its row of logits, ``[n, vocab_size]``, fp32.

        A sequence's guesses are taken for drawn. Log probabilities are the model's own: those
        before any rule.
        """
        shaped = logits
        shapers: list[Shaper | None] = [None] * len(sequences)
        if any(s.slot in self._shapers for s in sequences):
            shaped = logits.clone()
            for i, (s, row) in enumerate(zip(sequences, shaped, strict=True)):
                if s.slot not in self._shapers:
                    continue
                guesses = s.token_ids[len(s.token_ids) - s.n_drafts :]
                shapers[i] = behind = self._shapers[s.slot].behind(guesses)
                if behind.error is None:
                    behind.shape(row, self._eos_id)
        settings = [s.sampling for s in sequences if s.sampling is not None]
        device = logits.device
        ids = sample(
            shaped,
            torch.tensor([s.temperature for s in settings], device=device),
            torch.tensor([s.top_p for s in settings], device=device),
            torch.tensor([s.seed for s in settings], dtype=torch.int64, device=device),
            torch.tensor([s.start + len(s.token_ids) for s in sequences], device=device),
            torch.tensor([s.top_k for s in settings], dtype=torch.int64, device=device),
            torch.tensor([s.min_p for s in settings], device=device),
        ).tolist()
        out = []
        for sequence, setting, row, token, shaper in zip(
            sequences, settings, logits, ids, shapers, strict=True
        ):
            if shaper is not None and shaper.error is not None:
                out.append(Sampled(sequence.request, self._eos_id, None, [], shaper.error))
                continue
            if setting.n_logprobs is None:
                out.append(Sampled(sequence.request, token, None, []))
                continue
            logprobs = row.log_softmax(-1)
            top = logprobs.topk(min(setting.n_logprobs, len(row)))
            pairs = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            out.append(Sampled(sequence.request, token, float(logprobs[token]), pairs))
        return out
