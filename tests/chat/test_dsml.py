from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from v4_ascend.chat import Prompt, ToolCall, parse_completion
from v4_ascend.chat.dsml import tool_calls_to_dsml
from v4_ascend.chat.strict import parse_strict
from v4_ascend.chat.strings import ADDED_TOKENS, EOS, to_json
from v4_ascend.errors import RequestError

MARKERS = [token.content for token in ADDED_TOKENS]

CALL = (
    "\n\n<｜DSML｜tool_calls>\n"
    '<｜DSML｜invoke name="f">\n'
    '<｜DSML｜parameter name="p" string="true">v</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n"
    "</｜DSML｜tool_calls>"
)


def has_no_marker(text: str) -> bool:
    return not any(marker in text for marker in MARKERS)


# Fragments of markup that together are none, which a careless parser takes for some.
FRAGMENTS = [
    "<",
    "</",
    "<｜",
    "｜",
    "｜DSML",
    "DSML｜",
    "think>",
    "\n",
    "\n\n",
    ">",
    '"',
    " ",
    "a",
    "é🙂",
]
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.lists(st.sampled_from(FRAGMENTS)).map("".join),
).filter(has_no_marker)
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
# The format writes names as they are: a quote, a line end or a tag in one could not be read back.
names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters='"<\n'), min_size=1)
calls = st.builds(
    ToolCall,
    id=st.just(""),
    name=names.filter(has_no_marker),
    arguments=st.dictionaries(names.filter(has_no_marker), values, max_size=3).map(to_json),
)


def dsml(tool_calls: list[ToolCall]) -> str:
    return "\n\n" + Prompt.join(tool_calls_to_dsml(tool_calls)).text


def said(tool_calls: tuple[ToolCall, ...] | list[ToolCall]) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in tool_calls]


@given(
    reasoning=texts, content=texts, tool_calls=st.lists(calls, max_size=3), thinking=st.booleans()
)
def test_what_the_encoder_writes_both_parsers_read_back(
    reasoning: str, content: str, tool_calls: list[ToolCall], thinking: bool
):
    text = f"{reasoning}</think>{content}" if thinking else content
    text += dsml(tool_calls) if tool_calls else ""
    for completion in (
        parse_strict(text + EOS, thinking=thinking),
        parse_completion(text + EOS, thinking),
    ):
        assert completion.reasoning == (reasoning if thinking else "")
        assert completion.content == content
        assert said(completion.tool_calls) == said(tool_calls)


@given(arguments=st.dictionaries(names, values, min_size=1))
def test_arguments_come_back_letter_by_letter(arguments: dict[str, Any]):
    text = dsml([ToolCall("", "f", to_json(arguments))])
    (call,) = parse_completion(text, False).tool_calls
    assert call.arguments == to_json(arguments)


@given(text=texts)
def test_arguments_that_are_no_object_come_back_as_one_parameter(text: str):
    arguments = "\0" + text  # never JSON
    (call,) = parse_completion(dsml([ToolCall("", "f", arguments)]), False).tool_calls
    assert json.loads(call.arguments) == {"arguments": arguments}


@pytest.mark.parametrize(
    ("value", "arguments"),
    [
        pytest.param("12", '{"p": 12}', id="number"),
        pytest.param(' [1,  {"a":2}] ', '{"p":  [1,  {"a":2}] }', id="json-is-kept-as-written"),
        pytest.param("[1, 2", '{"p": "[1, 2"}', id="invalid-json-is-text"),
        pytest.param("Paris", '{"p": "Paris"}', id="bare-word-is-text"),
        pytest.param("NaN", '{"p": "NaN"}', id="python-only-json-is-text"),
        pytest.param("", '{"p": ""}', id="nothing-is-text"),
        pytest.param("[" * 100_000, f'{{"p": "{"[" * 100_000}"}}', id="too-deep-json-is-text"),
        pytest.param("9" * 5_000, f'{{"p": "{"9" * 5_000}"}}', id="too-long-integer-is-text"),
    ],
)
def test_a_json_parameter_is_valid_json_whatever_the_model_wrote(value: str, arguments: str):
    text = CALL.replace('string="true">v<', f'string="false">{value}<') + EOS
    assert [call.arguments for call in parse_completion(text, False).tool_calls] == [arguments]
    assert [call.arguments for call in parse_strict(text, thinking=False).tool_calls] == [arguments]
    json.loads(arguments)


def test_every_call_has_an_id_of_its_own():
    text = dsml([ToolCall("", "f", "{}")] * 3)
    ids = [call.id for _ in range(2) for call in parse_completion(text, False).tool_calls]
    assert len(set(ids)) == 6


@pytest.mark.parametrize(
    ("text", "thinking", "problem"),
    [
        pytest.param("a", False, "does not end in", id="no-eos"),
        pytest.param(f"a{EOS}", True, "no </think> ends the reasoning", id="no-think-end"),
        pytest.param(f"a</think>b{EOS}", False, "</think> inside", id="think-end-in-content"),
        pytest.param(
            f"a{EOS}b{EOS}", False, "inside the reasoning or content", id="text-after-eos"
        ),
        pytest.param(
            f"{CALL}b{EOS}", False, "not a complete tool_calls block", id="text-after-calls"
        ),
        pytest.param(CALL.replace("tool_calls", "toolcalls"), False, "does not end in", id="name"),
        pytest.param(
            CALL.replace("calls>\n", "calls>", 1), False, "not a complete", id="no-newline"
        ),
        pytest.param(
            CALL.replace("invoke name", "invoke n"), False, "not a complete invoke", id="invoke"
        ),
        pytest.param(
            CALL.replace(' string="true"', ""), False, "not a complete parameter", id="no-string"
        ),
        pytest.param(
            CALL.replace(
                "</｜DSML｜invoke>",
                '<｜DSML｜parameter name="p" string="true">w'
                "</｜DSML｜parameter>\n</｜DSML｜invoke>",
            ),
            False,
            "parameter 'p' occurs twice",
            id="parameter-twice",
        ),
    ],
)
def test_the_strict_parser_refuses_what_departs_from_the_format(
    text: str, thinking: bool, problem: str
):
    with pytest.raises(RequestError, match=problem):
        parse_strict(text, thinking=thinking)


def test_the_strict_parser_takes_tool_calls_without_end_token():
    assert said(parse_strict(CALL, thinking=False).tool_calls) == [("f", {"p": "v"})]
