"""Requests into prompts, and tokens into events: what all APIs are written over."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from v4_ascend import __version__
from v4_ascend.chat import ChatTokenizer, encode_messages, encoder_release
from v4_ascend.chat.grammar import Calls, completion_grammar
from v4_ascend.chat.strings import CONTROL_MARKERS
from v4_ascend.checkpoint.sources import whole
from v4_ascend.config.model import ModelConfig
from v4_ascend.errors import RequestError
from v4_ascend.runtime.api.ask import Answer, Ask
from v4_ascend.runtime.api.controls import Controls
from v4_ascend.runtime.api.metrics import Metrics
from v4_ascend.runtime.choice import Event, Wanted, run_choice
from v4_ascend.runtime.dispatcher import Dispatcher
from v4_ascend.runtime.guide import GuideFactory
from v4_ascend.runtime.limits import limits_of
from v4_ascend.runtime.messages import Rules, Sampling
from v4_ascend.runtime.scheduler import Scheduler
from v4_ascend.supernode.plan import Plan


class Service:
    """One deployment, as its APIs see it."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self.read_plan_again()
        folder = whole(self.plan.checkpoint)
        self.config = ModelConfig.read(folder)
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.release = encoder_release(raw)
        self.tokenizer = ChatTokenizer.load(folder)
        self.guides = GuideFactory(self.tokenizer, self.config.vocab_size)
        self.defaults = _generation_defaults(folder)
        self._marker_ids = {m: self.tokenizer.token_id(m) for m in CONTROL_MARKERS}
        scheduler = Scheduler(
            limits_of(self.plan, self.config),
            eos_id=self.config.eos_token_id,
            n_groups=self.plan.parallel.dp_size,
            n_in_flight=self.plan.parallel.pp_size,
        )
        self.dispatcher = Dispatcher(scheduler, state, self.plan)
        self.metrics = Metrics(self.plan, self.dispatcher)

    def read_plan_again(self) -> None:
        """Take the plan as it is written now; another one differs in settings of the front."""
        self.plan = Plan.read(self._state / "plan.json")
        self.digest = self.plan.digest

    @property
    def fingerprint(self) -> str:
        """What answers come from: the software and the plan."""
        return f"v4-ascend-{__version__}-{self.digest[:8]}"

    def require_model(self, name: str) -> None:
        """Refuse another model's name."""
        if name != self.plan.model_name:
            raise RequestError(
                f"model {name!r} is not served here; {self.plan.model_name!r} is",
                param="model",
                status=404,
            )

    def prompt_ids(self, ask: Ask) -> list[int]:
        """Encode a conversation."""
        if not ask.messages or ask.messages[-1].get("role") not in ("user", "tool"):
            raise RequestError("messages: the last one must be of user or tool", param="messages")
        if any(m.get("role") == "developer" for m in ask.messages):
            raise RequestError("messages: role developer is internal; use system", param="messages")
        prompt = encode_messages(
            ask.messages,
            thinking=ask.thinking,
            reasoning_effort=ask.effort if ask.thinking else None,
            tools=ask.offered or None,
            response_format=ask.answer.shown if ask.answer is not None else None,
            release=self.release,
        )
        return self.tokenizer.encode_prompt(prompt)

    async def chat(self, ask: Ask) -> Wanted:
        """Take a conversation.

        Raises:
            RequestError: what is wrong with it, or what it asks for does not fit.
        """
        prompt_ids = self.prompt_ids(ask)
        param = ask.answer.param if ask.answer is not None else "tools"
        grammar = completion_grammar(
            self._marker_ids,
            thinking=ask.thinking,
            answer=ask.answer.piece if ask.answer is not None else None,
            calls=_calls(ask),
        )
        return Wanted(
            **await self._limits(ask.controls, prompt_ids, ask.max_tokens, grammar, param),
            sampling=self._sampling(ask.controls, ask.n_logprobs),
            thinking=ask.thinking,
            tools=bool(ask.offered),
            is_chat=True,
        )

    async def completion(
        self,
        prompt: str | list[int],
        controls: Controls,
        max_tokens: int | None,
        answer: Answer | None,
        n_logprobs: int | None,
    ) -> Wanted:
        """Take a prompt as it is."""
        if isinstance(prompt, str):
            ids = [self.config.bos_token_id, *self.tokenizer.encode_plain(prompt)]
        else:
            ids = prompt
        self.require_tokens(ids, "prompt")
        grammar = None
        if answer is not None:
            grammar = completion_grammar(
                self._marker_ids, thinking=False, answer=answer.piece, calls=None
            )
        param = answer.param if answer is not None else "prompt"
        return Wanted(
            **await self._limits(controls, ids, max_tokens, grammar, param),
            sampling=self._sampling(controls, n_logprobs),
            thinking=False,
            tools=False,
            is_chat=False,
        )

    def require_tokens(self, ids: list[int], param: str) -> None:
        """Refuse an empty list, and ids the model does not know."""
        if not ids or min(ids) < 0 or max(ids) >= self.config.vocab_size:
            known = f"0..{self.config.vocab_size - 1}"
            raise RequestError(f"{param}: token ids must be {known}, at least one", param=param)

    async def _limits(
        self,
        controls: Controls,
        prompt_ids: list[int],
        asked: int | None,
        grammar: str | None,
        param: str,
    ) -> dict[str, Any]:
        room = self.plan.max_model_len - len(prompt_ids)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(prompt_ids)} tokens, max_model_len is "
                f"{self.plan.max_model_len} and must leave room for an answer",
                param="messages",
            )
        if grammar is not None:  # a large one takes a while, without the GIL
            await asyncio.to_thread(self.guides.require_valid, grammar, param)
        max_tokens = min(asked or room, room)
        return {
            "prompt_ids": prompt_ids,
            "max_tokens": max_tokens,
            "stops": controls.stops,
            "priority": controls.priority,
            "timeout_s": controls.timeout,
            "rules": self._rules(controls, prompt_ids, max_tokens, grammar),
        }

    def _sampling(self, controls: Controls, n_logprobs: int | None) -> Sampling:
        temperature, top_p = self.defaults
        return Sampling(
            temperature if controls.temperature is None else controls.temperature,
            top_p if controls.top_p is None else controls.top_p,
            secrets.randbits(63) if controls.seed is None else controls.seed,
            n_logprobs,
            max(controls.top_k, 0),
            controls.min_p,
        )

    def _rules(
        self, c: Controls, prompt_ids: list[int], max_tokens: int, grammar: str | None
    ) -> Rules | None:
        for token in c.logit_bias:
            if not 0 <= token < self.config.vocab_size:
                raise RequestError(
                    f"logit_bias: token {token} is not in 0..{self.config.vocab_size - 1}",
                    param="logit_bias",
                )
        if c.min_tokens > max_tokens:
            raise RequestError(
                f"min_tokens: {c.min_tokens} is more than may be drawn, {max_tokens}",
                param="min_tokens",
            )
        rules = Rules(
            n_before=len(prompt_ids),
            before=prompt_ids if c.repetition_penalty != 1 else [],
            presence_penalty=c.presence_penalty,
            frequency_penalty=c.frequency_penalty,
            repetition_penalty=c.repetition_penalty,
            logit_bias=c.logit_bias,
            min_tokens=max_tokens if c.ignore_eos else c.min_tokens,
            grammar=grammar,
        )
        return rules if rules != Rules(n_before=len(prompt_ids)) else None

    async def events(self, wanted: Wanted, n: int = 1) -> AsyncIterator[Event]:
        """Run all choices at once and yield their events as they come."""
        queue: asyncio.Queue[Event | BaseException | None] = asyncio.Queue()

        async def pump(choice: int) -> None:
            timing, reason = self.metrics.begin(len(wanted.prompt_ids)), "error"
            try:
                async for event in run_choice(self.dispatcher, self.tokenizer, wanted, choice):
                    timing.token()
                    reason = event.finish or reason
                    queue.put_nowait(event)
            except asyncio.CancelledError:
                reason = "abort" if reason == "error" else reason
                raise
            finally:
                timing.end(reason)

        def ended(task: asyncio.Task[None]) -> None:
            # Every end is told, a failure of ours too: nobody may wait for a dead task.
            queue.put_nowait(None if task.cancelled() else task.exception())

        tasks = [asyncio.create_task(pump(i)) for i in range(n)]
        for task in tasks:
            task.add_done_callback(ended)
        try:
            left = n
            while left:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _calls(ask: Ask) -> Calls | None:
    """Say which calls must be held to a grammar: forced ones, strict ones, and one at most."""
    functions = [tool["function"] for tool in ask.offered]
    if ask.named_tool is not None:
        named = [f for f in functions if f["name"] == ask.named_tool]
        if not named:
            raise RequestError(
                f"tool_choice: no tool is named {ask.named_tool!r}", param="tool_choice"
            )
        return Calls(tools=named, are_required=True, at_most_one=True)
    if ask.tool_choice == "required":
        if not functions:
            raise RequestError("tool_choice: 'required' needs tools", param="tool_choice")
        return Calls(tools=functions, are_required=True, at_most_one=not ask.are_calls_parallel)
    is_held = not ask.are_calls_parallel or any(_is_strict(f) for f in functions)
    if functions and is_held:
        return Calls(tools=functions, are_required=False, at_most_one=not ask.are_calls_parallel)
    return None


def _is_strict(function: Mapping[str, object]) -> bool:
    return function.get("strict") is True


def _generation_defaults(folder: Path) -> tuple[float, float]:
    file = folder / "generation_config.json"
    raw = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return float(raw.get("temperature", 1.0)), float(raw.get("top_p", 1.0))
