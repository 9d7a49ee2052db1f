"""One request on its way: its tokens, its place in the caches, and what is in flight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from v4_ascend.runtime.messages import Rules, Sampling, SequenceStep
from v4_ascend.runtime.pages import PagePool, extend_digests


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a client asked for, in tokens. Of lower `priority` numbers it is the earlier turn."""

    id: int
    prompt_ids: Sequence[int]
    max_tokens: int
    sampling: Sampling
    rules: Rules | None = None
    priority: int = 0


@dataclass
class Flying:
    """A sequence's part of a step that has been sent."""

    sequence: Progress
    end: int  # tokens in the caches once the step is done, drafts among them
    n_drafts: int
    snapshot: int | None


@dataclass(eq=False)
class Progress:
    """A request, from waiting to its last token.

    `tokens` are the prompt's and those drawn. `n_sent` of them have been given to steps: earlier
    steps end before later ones.
    """

    request: Request
    tokens: list[int]
    digests: list[bytes] = field(default_factory=list)
    slot: int | None = None
    pages: list[int] = field(default_factory=list)
    n_sent: int = 0
    n_placed: int = 0  # pages the ranks know of
    n_published: int = 0  # pages others may find
    cuts: list[int] = field(default_factory=list)  # where a chunk ends, for a snapshot
    restore: int | None = None
    drafts: list[int] = field(default_factory=list)
    decoded_snapshot: bytes | None = None
    n_in_flight: int = 0
    is_drawing: bool = False  # a step in flight draws its next token
    is_cancelled: bool = False
    last_step: int = 0

    @property
    def turn(self) -> tuple[int, int]:
        """Whose turn is earlier goes first, and is the last to be sent back."""
        return self.request.priority, self.request.id

    @property
    def n_left(self) -> int:
        """Tokens to compute before the next one can be drawn; 1 while it decodes."""
        return len(self.tokens) - self.n_sent

    @property
    def n_drawn(self) -> int:
        """Tokens drawn."""
        return len(self.tokens) - len(self.request.prompt_ids)

    def begin(self, slot: int, pool: PagePool) -> int:
        """Take a slot and pages for all its tokens; return how many are in the caches already.

        Raises:
            ValueError: the pool has too few pages; nothing is taken.
        """
        size = pool.page_tokens
        # The last token's logits are wanted: it is computed, whatever is cached.
        prefix = pool.match(self.digests[: (len(self.tokens) - 1) // size])
        try:
            fresh = pool.take(-(-len(self.tokens) // size) - len(prefix.pages))
        except ValueError:
            pool.release(prefix.pages)
            raise
        self.slot, self.pages, self.restore = slot, prefix.pages + fresh, prefix.snapshot
        self.n_sent = len(prefix.pages) * size
        self.n_published, self.n_placed = len(prefix.pages), 0
        self.drafts, self.decoded_snapshot = [], None
        # A snapshot where others left the same way before, and one at the end.
        ends = {prefix.n_known, (len(self.tokens) - 1) // size} if pool.n_snapshots else set()
        self.cuts = sorted(n * size for n in ends if n * size > self.n_sent)
        return self.n_sent

    def step(self, n: int, number: int, pool: PagePool) -> tuple[SequenceStep, Flying]:
        """Lay out the next `n` tokens, and the drafts behind them."""
        r, start, end = self.request, self.n_sent, self.n_sent + n
        is_last = end == len(self.tokens)
        ids = self.tokens[start:end] + self.drafts
        step = SequenceStep(
            r.id,
            self.slot if self.slot is not None else -1,
            ids,
            start,
            r.sampling if is_last else None,
            rules=self._rules(start) if not self.n_placed else None,
            pages=self.pages[self.n_placed :],
            first_page=self.n_placed,
            restore=self.restore,
            save=self._save(end, pool),
            n_drafts=len(self.drafts),
            next_id=None if is_last else self.tokens[end],
        )
        self.n_placed, self.restore, self.drafts = len(self.pages), None, []
        self.n_sent += len(ids)
        self.n_in_flight += 1
        self.is_drawing, self.last_step = is_last, number
        return step, Flying(self, self.n_sent, step.n_drafts, step.save)

    def _save(self, end: int, pool: PagePool) -> int | None:
        """Reserve a snapshot at the end of a page where one is wanted."""
        is_decoded = self.n_drawn > 0 and end == len(self.tokens)
        if not pool.n_snapshots or end % pool.page_tokens or not (is_decoded or end in self.cuts):
            return None
        extend_digests(self.digests, self.tokens, pool.page_tokens, end)
        return pool.reserve_snapshot(self.digests[end // pool.page_tokens - 1])

    def _rules(self, start: int) -> Rules | None:
        """Tell the rules, of drawn tokens in front of `start` too if it starts anew there."""
        rules, n_prompt = self.request.rules, len(self.request.prompt_ids)
        if rules is None or start <= n_prompt:
            return rules
        drawn = self.tokens[n_prompt:start]
        before = [*rules.before, *drawn]
        return replace(rules, n_before=start, before=before, n_drawn=len(drawn))

    def landed(self, flying: Flying, n_accepted: int, pool: PagePool) -> None:
        """Take in that a step is done; what it filled may be found by others."""
        self.n_in_flight -= 1
        self.is_drawing = self.is_drawing and self.n_in_flight > 0
        done = flying.end - flying.n_drafts + n_accepted
        if flying.n_drafts:
            self.n_sent = done
        if not pool.n_snapshots:
            return
        size = pool.page_tokens
        extend_digests(self.digests, self.tokens, size, done)
        for i in range(self.n_published, done // size):
            pool.publish(self.digests[i], self.pages[i])
            self.n_published = i + 1
        if flying.snapshot is not None:
            digest = self.digests[done // size - 1]
            pool.publish_snapshot(digest, flying.snapshot)
            if done > len(self.request.prompt_ids):
                if self.decoded_snapshot is not None:
                    pool.drop_snapshot(self.decoded_snapshot)
                self.decoded_snapshot = digest
