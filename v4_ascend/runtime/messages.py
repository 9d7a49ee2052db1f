"""What the front and the ranks say to each other."""

from __future__ import annotations

from typing import Literal

import msgspec


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How to draw a token; `n_logprobs` None asks for no log probabilities."""

    temperature: float
    top_p: float
    seed: int
    n_logprobs: int | None = None
    top_k: int = 0
    min_p: float = 0.0


class Rules(msgspec.Struct, frozen=True, omit_defaults=True):
    """What changes a request's logits before one is drawn, by what was drawn before.

    They go to the ranks once, with the first step of a request in a slot. From then on a rank
    counts the tokens it is given at positions from `n_before` on, which are the drawn ones.
    `before` has the tokens in front of them that count too: of the prompt, for the repetition
    penalty, and drawn ones, of a request that starts anew; `n_drawn` says how many, at its end.
    """

    n_before: int
    before: list[int] = []
    n_drawn: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    min_tokens: int = 0  # drawn before the end token may be
    grammar: str | None = None  # of llguidance: what may be drawn at all


class SequenceStep(msgspec.Struct, frozen=True, omit_defaults=True):
    """The next tokens of one request: `start` of its tokens are in the slot's caches.

    Without `sampling` more of the prompt follows, `next_id` first, and nothing is drawn. `rules`
    come with the first step of a request in a slot, if it has any.

    `pages` are the slot's from its page number `first_page` on. Before the step the slot's other
    caches are restored from a snapshot, after it they are saved to one, where such are named.
    The last `n_drafts` tokens are guesses: of what is drawn behind each token, only what follows
    right ones counts.
    """

    request: int
    slot: int
    token_ids: list[int]
    start: int
    sampling: Sampling | None
    rules: Rules | None = None
    pages: list[int] = []
    first_page: int = 0
    restore: int | None = None
    save: int | None = None
    n_drafts: int = 0
    next_id: int | None = None


class Sampled(msgspec.Struct, frozen=True, omit_defaults=True):
    """A drawn token, its log probability, and those of the most likely ones.

    With an `error` the token means nothing: the request's grammar could not be followed. `drafts`
    are guesses of the tokens behind it.
    """

    request: int
    token_id: int
    logprob: float | None
    top_logprobs: list[tuple[int, float]]
    error: str | None = None
    drafts: list[int] = []


class Hello(msgspec.Struct, frozen=True, tag=True):
    """Rank to front: it is there, and knows the deployment's secret."""

    secret: str
    pid: int


class Beat(msgspec.Struct, frozen=True, tag=True):
    """Rank to front, once a second from a thread: it lives, and where it is.

    `waiting` is the exchange it is in, if it is in one. What it has sent and waited for is by
    group, since it met the others. `operator` is the one it called last, `dispatch` the rows and
    choices its last dispatch was given. `n_compiled` kernels were compiled since it was ready.
    """

    step: int
    n_exchanges: int
    waiting: str | None
    bytes_sent: dict[str, int] = {}
    waited_s: dict[str, float] = {}
    operator: str | None = None
    dispatch: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    n_compiled: int = 0


class Step(msgspec.Struct, frozen=True, tag=True):
    """Front to ranks: one step, the same for all of them, in the order of their numbers.

    With `drafts` the drafter runs too, and the last token drawn of a sequence comes with guesses.
    """

    number: int
    sequences: list[SequenceStep]
    drafts: bool = False


class Start(msgspec.Struct, frozen=True, tag=True):
    """Front to ranks: all are there; they meet under the number of this attempt."""

    attempt: int


class End(msgspec.Struct, frozen=True, tag=True):
    """Front to a rank's heartbeat: a rank is lost, leave at once and be started again."""

    reason: str


class ExpertCounts(msgspec.Struct, frozen=True, tag=True):
    """Rank to front, at times: rows each slot of each of its layers got since it was loaded."""

    counts: list[list[int]]


class OperatorTimes(msgspec.Struct, frozen=True, tag=True):
    """Rank to front, at times: seconds of each operator in one step.

    Of its `kind`: every sequence decodes, or some prefill.
    """

    kind: Literal["decode", "prefill"]
    seconds: dict[str, float]


class Loading(msgspec.Struct, frozen=True, tag=True):
    """Rank to front: bytes read and in all."""

    done: int
    total: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Rank to front: loaded and checked, with so many bytes of weights and so many graphs."""

    canary: str
    median_relative_error: float
    resident_bytes: int
    n_graphs: int = 0


class StepResult(msgspec.Struct, frozen=True, tag=True):
    """Rank to front: what a step drew."""

    number: int
    sampled: list[Sampled]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Rank to front: it cannot go on, and why."""

    reason: str


FromRank = Hello | Beat | ExpertCounts | OperatorTimes | Loading | Ready | StepResult | Failed
ToRank = Step | Start | End
