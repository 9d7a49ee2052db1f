"""The tokens of one answer."""

from __future__ import annotations

from dataclasses import dataclass, field

from v4_ascend.chat import ReasoningDelta
from v4_ascend.runtime.choice import Event, Wanted


@dataclass
class Usage:
    """Counts tokens; those of a choice in front of its first other word are reasoning."""

    n_prompt: int
    n_completion: int = 0
    n_reasoning: int = 0
    thinking: set[int] = field(default_factory=set)  # the choices that still are

    @classmethod
    def of(cls, wanted: Wanted, n: int = 1) -> Usage:
        """Begin to count the tokens of `n` choices."""
        return cls(len(wanted.prompt_ids), thinking=set(range(n)) if wanted.thinking else set())

    def count(self, event: Event) -> None:
        """Count a token."""
        self.n_completion += 1
        if event.choice not in self.thinking:
            return
        if all(isinstance(d, ReasoningDelta) for d in event.deltas):
            self.n_reasoning += 1
        else:
            self.thinking.discard(event.choice)
