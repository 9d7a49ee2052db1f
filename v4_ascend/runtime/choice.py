"""One choice of a response: tokens to text to deltas, until a stop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import msgspec

from v4_ascend.chat import (
    ChatTokenizer,
    ContentDelta,
    Delta,
    StopMatcher,
    StreamParser,
    TokenStream,
)
from v4_ascend.runtime.dispatcher import Dispatcher
from v4_ascend.runtime.messages import Rules, Sampled, Sampling
from v4_ascend.runtime.scheduler import FinishReason


class PlainText:
    """Text as it is, for completions."""

    def feed(self, text: str) -> list[Delta]:
        """Pass text on."""
        return [ContentDelta(text)] if text else []

    def finish(self) -> list[Delta]:
        """Hold nothing back."""
        return []


@dataclass(frozen=True)
class Event:
    """What one token added to a choice."""

    choice: int
    deltas: Sequence[Delta]
    sampled: Sampled
    finish: FinishReason | None
    stop: str | None = None  # the stop string that ended it, if one did


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What every choice of a request has in common."""

    prompt_ids: Sequence[int]
    max_tokens: int
    sampling: Sampling
    rules: Rules | None
    stops: Sequence[str]
    priority: int
    timeout_s: float | None
    thinking: bool
    tools: bool
    is_chat: bool


async def run_choice(
    dispatcher: Dispatcher, tokenizer: ChatTokenizer, wanted: Wanted, choice: int
) -> AsyncIterator[Event]:
    """Yield an event per token; choice i draws with a seed of its own."""
    text, matcher = TokenStream(tokenizer), StopMatcher(wanted.stops)
    parser = StreamParser(wanted.thinking, wanted.tools) if wanted.is_chat else PlainText()
    s = wanted.sampling
    seed = (s.seed + choice * 0x9E3779B97F4A7C15 + 2**63) % 2**64 - 2**63
    sampling = msgspec.structs.replace(s, seed=seed)
    generated = dispatcher.generate(
        wanted.prompt_ids,
        wanted.max_tokens,
        sampling,
        wanted.rules,
        priority=wanted.priority,
        timeout_s=wanted.timeout_s,
    )
    async with aclosing(generated) as tokens:  # type: ignore[type-var]  # it is a generator
        async for token in tokens:
            is_eos = token.sampled.token_id == tokenizer.eos_id
            # The chat parser wants to see the end: it tells a finished call from a cut one.
            raw = "" if is_eos and not wanted.is_chat else text.feed(token.sampled.token_id)
            piece, stopped = matcher.feed(raw)
            if token.finish and not stopped:
                tail, stopped = matcher.feed(text.finish())
                piece += tail if stopped else tail + matcher.finish()
            finish: FinishReason | None = "stop" if stopped else token.finish
            deltas = [*parser.feed(piece), *(parser.finish() if finish else [])]
            yield Event(choice, deltas, token.sampled, finish, matcher.matched)
            if finish:
                return
