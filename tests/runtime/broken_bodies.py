"""Request bodies with one thing wrong; `broken_bodies.py URL N [KEY]` sends N of them."""

import copy
import json
import random
import sys

import httpx

CALL = {"name": "f", "arguments": "{}"}
OBJECT = {"type": "object"}
TEXT = [{"type": "text", "text": "x"}]
GOOD = {
    "/v1/chat/completions": {
        "model": "v4-tiny",
        "max_tokens": 1,
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": TEXT},
            {
                "role": "assistant",
                "tool_calls": [{"id": "c", "type": "function", "function": CALL}],
            },
            {"role": "tool", "tool_call_id": "c", "content": "x"},
        ],
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "f",
                    "parameters": {"properties": {"a": {"enum": ["b"]}}, "required": ["a"]},
                },
            }
        ],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "response_format": {"type": "json_schema", "json_schema": {"schema": OBJECT}},
        "logit_bias": {"5": 1},
        "stop": ["a"],
        "stream_options": {"include_usage": True},
        "chat_template_kwargs": {"thinking": True},
    },
    "/v1/responses": {
        "model": "v4-tiny",
        "max_output_tokens": 1,
        "instructions": "i",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "r"}]},
            {"type": "function_call", "call_id": "c", **CALL},
            {"type": "function_call_output", "call_id": "c", "output": "o"},
        ],
        "tools": [{"type": "function", "name": "f", "parameters": OBJECT}],
        "tool_choice": {"type": "function", "name": "f"},
        "reasoning": {"effort": "low"},
        "text": {"format": {"type": "json_schema", "schema": OBJECT}},
        "metadata": {"a": "b"},
    },
    "/v1/messages": {
        "model": "v4-tiny",
        "max_tokens": 1,
        "system": TEXT,
        "messages": [
            {"role": "user", "content": TEXT},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "t", "signature": "s"},
                    {"type": "tool_use", "id": "c", "name": "f", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "c", "content": TEXT}],
            },
        ],
        "tools": [{"name": "f", "input_schema": OBJECT}],
        "tool_choice": {"type": "tool", "name": "f"},
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": OBJECT}},
        "stop_sequences": ["a"],
    },
    "/v1/completions": {"model": "v4-tiny", "prompt": [5, 6], "max_tokens": 1, "guided_regex": "a"},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [5]},
}
GONE = object()
WRONG = [
    None, 0, -1, 1.5, "", "x", [], {}, [1], [None], {"a": 1}, True, "\ud800", 1e400, float("nan"),
    [[]], [{}], 10**30, {"type": "x"}, GONE,
]  # fmt: skip


def places(value, at=()):
    """Every place in a body."""
    yield at
    inside = value.items() if isinstance(value, dict) else ()
    for key, inner in enumerate(value) if isinstance(value, list) else inside:
        yield from places(inner, (*at, key))


def put(body, at, value):
    """A body with something else at a place."""
    if not at:
        return value
    body = copy.deepcopy(body)
    around = body
    for key in at[:-1]:
        around = around[key]
    if value is GONE:
        del around[at[-1]]
    else:
        around[at[-1]] = value
    return body


def broken(n, seed):
    """Yield n of them: path, body as text, and what was done to it."""
    rng = random.Random(seed)
    jobs = [
        (path, at, value)
        for path, body in GOOD.items()
        for at in places(body)
        for value in WRONG
        if at or value is not GONE
    ]
    for path, at, value in rng.sample(jobs, min(n, len(jobs))):
        yield path, json.dumps(put(GOOD[path], at, value)), f"{path} {at} = {value!r}"


def main():
    """Send them; exit 1 if one is the server's fault."""
    url, n, *key = sys.argv[1:]
    headers = {"Authorization": f"Bearer {key[0]}"} if key else {}
    faults = 0
    for path, body, what in broken(int(n), seed=0):
        answer = httpx.post(f"{url}{path}", content=body, headers=headers, timeout=60)
        if answer.status_code >= 500:
            faults += 1
            sys.stdout.write(f"{what} {answer.text}\n")
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
