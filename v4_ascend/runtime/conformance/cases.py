"""The cases. What a model of random weights cannot be relied on to do is forced by the request."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from v4_ascend.runtime.conformance.endpoint import (
    CaseSkippedError,
    Endpoint,
    Said,
    require,
)

Case = Callable[[Endpoint], None]
CASES: dict[str, Case] = {}

UNICODE = 'Grüße 你好 🚀 \u200d é \\ " \n'
NESTED = {
    "type": "object",
    "properties": {
        "items": {
            "type": "array",
            "minItems": 1,
            "maxItems": 2,
            "items": {
                "type": "object",
                "properties": {"deep": {"const": {"list": [[1, None], []], "text": UNICODE}}},
                "required": ["deep"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["items"],
    "additionalProperties": False,
}
CITY = {"type": "string", "enum": ["Köln", "北京"]}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": CITY, "when": {"enum": [{"day": 1}, {"day": [2, 3]}]}},
            "required": ["city", "when"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
PATIENCE_S = 30.0


def case(run: Case) -> Case:
    """Add a case; its name is the function's."""
    CASES[run.__name__.replace("_", " ")] = run
    return run


@case
def models_lists_the_model(e: Endpoint) -> None:
    names = [m["id"] for m in e.client.get("/models").json()["data"]]
    require(e.model in names, f"{e.model!r} is not in {names}")


@case
def an_answer_counts_its_tokens(e: Endpoint) -> None:
    for said in (e.chat(**e.body()), e.stream(**e.body())):
        u = said.usage
        require(0 < u.get("completion_tokens", 0) <= 24, f"usage is {u}, max_tokens 24")
        total = u["prompt_tokens"] + u["completion_tokens"]
        require(u["total_tokens"] == total, f"total_tokens is {u['total_tokens']}, not {total}")
        require(said.finish in ("stop", "length"), f"finish_reason is {said.finish!r}")


@case
def a_stream_says_what_a_whole_answer_says(e: Endpoint) -> None:
    whole, streamed = e.chat(**e.body()), e.stream(**e.body())
    require(whole.content == streamed.content, f"{whole.content!r} is not {streamed.content!r}")
    require(whole.usage == streamed.usage, f"usage {whole.usage} is not {streamed.usage}")


@case
def a_seed_repeats_an_answer(e: Endpoint) -> None:
    warm = e.body(temperature=1, seed=11)
    first, second = e.chat(**warm), e.chat(**warm)
    require(first.content == second.content, f"{first.content!r} is not {second.content!r}")


@case
def max_tokens_cuts(e: Endpoint) -> None:
    said = e.chat(**e.body(max_tokens=1))
    require(said.usage["completion_tokens"] == 1, f"usage is {said.usage}")
    require(said.finish in ("length", "stop"), f"finish_reason is {said.finish!r}")


@case
def a_stop_string_ends_in_front_of_itself(e: Endpoint) -> None:
    schema = {"const": {"said": "one two three"}}
    shape = {"type": "json_schema", "json_schema": {"name": "numbers", "schema": schema}}
    body = e.body(response_format=shape, stop=["two", "three"], max_tokens=100)
    for said in (e.chat(**body), e.stream(**body)):
        want = '"one '
        require(said.content.endswith(want), f"{said.content!r} does not end in {want!r}")
        require(said.finish == "stop", f"finish_reason is {said.finish!r}")


@case
def logprobs_come_with_their_tokens(e: Endpoint) -> None:
    body = e.body(logprobs=True, top_logprobs=2, max_tokens=4)
    choice = e.client.post("/chat/completions", json=body).json()["choices"][0]
    entries = (choice.get("logprobs") or {}).get("content") or []
    require(entries, "no logprobs.content")
    for entry in entries:
        require(len(entry["top_logprobs"]) == 2, f"{len(entry['top_logprobs'])} top_logprobs")
        require(entry["logprob"] <= 0, f"logprob is {entry['logprob']}")


@case
def unicode_and_nested_json_arrive_whole(e: Endpoint) -> None:
    shape = {"type": "json_schema", "json_schema": {"name": "nested", "schema": NESTED}}
    body = e.body(response_format=shape, max_tokens=600)
    for said in (e.chat(**body), e.stream(**body)):
        require(said.finish == "stop", f"finish_reason is {said.finish!r}")
        for item in json.loads(said.content)["items"]:
            require(item["deep"]["text"] == UNICODE, f"text is {item['deep']['text']!r}")
            require(item["deep"]["list"] == [[1, None], []], f"list is {item['deep']['list']}")


@case
def a_required_call_is_made(e: Endpoint) -> None:
    body = e.body(tools=[CLOCK, WEATHER], tool_choice="required", max_tokens=900)
    for said in (e.chat(**body), e.stream(**body)):
        _require_calls(said, at_most_one=False)


@case
def a_named_call_is_made(e: Endpoint) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    said = e.stream(**e.body(tools=[CLOCK, WEATHER], tool_choice=named, max_tokens=900))
    names = [c["function"]["name"] for c in said.calls]
    require(names == ["weather"], f"calls are {names}")
    _require_calls(said, at_most_one=True)


@case
def parallel_tool_calls_can_be_switched_off(e: Endpoint) -> None:
    only: dict[str, Any] = {"tool_choice": "required", "parallel_tool_calls": False}
    _require_calls(e.chat(**e.body(tools=[WEATHER], **only, max_tokens=900)), at_most_one=True)


@case
def tool_choice_none_calls_nothing(e: Endpoint) -> None:
    said = e.chat(**e.body(tools=[WEATHER], tool_choice="none"))
    require(not said.calls, f"calls are {said.calls}")


@case
def results_of_parallel_calls_come_in_any_order(e: Endpoint) -> None:
    """They are sorted by the calls: the prompt is the same, so the answer is."""
    arguments = json.dumps({"city": "Köln", "when": {"day": 1}}, ensure_ascii=False)
    calls = [_call(f"c{i}", "weather", arguments) for i in range(2)]
    results = [{"role": "tool", "tool_call_id": f"c{i}", "content": f"r{i}"} for i in range(2)]
    said = {"role": "assistant", "content": None, "tool_calls": calls}
    history = [{"role": "user", "content": "?"}, said]
    small: dict[str, Any] = {"tools": [WEATHER], "tool_choice": "none", "max_tokens": 8}
    one = e.chat(**e.body(**small) | {"messages": history + results})
    other = e.chat(**e.body(**small) | {"messages": history + results[::-1]})
    require(one.content == other.content, f"{one.content!r} is not {other.content!r}")


@case
def reasoning_is_told_apart(e: Endpoint) -> None:
    body = e.body(reasoning_effort="high", max_tokens=12)
    for said in (e.chat(**body), e.stream(**body)):
        require(said.reasoning or said.content, "12 tokens, and neither reasoning nor content")
        require(said.reasoning or said.usage["completion_tokens"] < 12, "no reasoning")


@case
def reasoning_round_trips_with_tools(e: Endpoint) -> None:
    """In a conversation with tools what was thought before stays in the prompt."""
    call = _call("c0", "clock", "{}")
    result = {"role": "tool", "tool_call_id": "c0", "content": "noon"}
    thought = "It asks for the time, so the clock must be read."
    counts = []
    for reasoning in ("", thought):
        said = {"role": "assistant", "content": "", "tool_calls": [call]}
        said["reasoning_content"] = reasoning
        history = [{"role": "user", "content": "?"}, said, result, {"role": "user", "content": "!"}]
        body = e.body(tools=[CLOCK], reasoning_effort="high", max_tokens=1)
        counts.append(e.chat(**body | {"messages": history}).usage["prompt_tokens"])
    require(counts[1] > counts[0] + 3, f"prompt tokens {counts[1]} with it, {counts[0]} without")


@case
def markers_in_a_users_text_are_text(e: Endpoint) -> None:
    plain = e.chat(**e.body("x", max_tokens=1)).usage["prompt_tokens"]
    marked = e.chat(**e.body("x<｜User｜>", max_tokens=1)).usage["prompt_tokens"]
    require(marked > plain + 1, f"<｜User｜> is {marked - plain} token: a control token")


@case
def a_client_that_leaves_is_noticed(e: Endpoint) -> None:
    for _ in range(4):
        with e.events(**e.body(max_tokens=500, temperature=1)) as events:
            next(events)
    start = time.monotonic()
    e.chat(**e.body(max_tokens=2))
    waited = time.monotonic() - start
    require(waited < PATIENCE_S, f"two tokens took {waited:.0f} s after four clients had left")


@case
def a_prompt_that_is_too_long_is_refused(e: Endpoint) -> None:
    rows = e.client.get("/models").json()["data"]
    limit = next((m.get("max_model_len") for m in rows if m["id"] == e.model), None)
    if not limit or limit > 200_000:
        raise CaseSkippedError(f"max_model_len is {limit}: not told, or too long to try")
    said = e.refuse(400, json=e.body("a b " * limit))
    require(str(limit) in said, f"the message does not say {limit}: {said!r}")


@case
def bad_requests_are_refused(e: Endpoint) -> None:
    e.refuse(400, content=b'{"model": ')
    e.refuse(404, json=e.body() | {"model": "no-such-model"})
    changes: tuple[dict[str, Any], ...] = (
        {"messages": []},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"temperature": -1},
        {"top_p": 2},
        {"max_tokens": 0},
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_schema"}},
    )
    for change in changes:
        e.refuse(400, json=e.body() | change)


@case
def a_wrong_key_is_refused(e: Endpoint) -> None:
    if "authorization" not in e.client.headers:
        raise CaseSkippedError("no --api-key was given")
    e.refuse(401, json=e.body(), headers={"Authorization": "Bearer wrong"})


def _call(id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _require_calls(said: Said, *, at_most_one: bool) -> None:
    require(said.calls, "no call")
    require(len({c["id"] for c in said.calls}) == len(said.calls), "two calls have one id")
    if said.finish == "length":
        raise CaseSkippedError(f"{len(said.calls)} calls, and cut by max_tokens")
    require(said.finish in ("tool_calls", "stop"), f"finish_reason is {said.finish!r}")
    require(not at_most_one or len(said.calls) == 1, f"{len(said.calls)} calls, one is allowed")
    for call in said.calls:
        arguments = json.loads(call["function"]["arguments"])
        require(isinstance(arguments, dict), f"arguments are {arguments!r}")
        if call["function"]["name"] == "weather":
            require(arguments["city"] in CITY["enum"], f"city is {arguments['city']!r}")
            require(arguments["when"] in ({"day": 1}, {"day": [2, 3]}), f"{arguments['when']}")
