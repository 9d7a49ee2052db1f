from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from v4_ascend.chat import (
    Completion,
    ContentDelta,
    Delta,
    ReasoningDelta,
    StreamParser,
    ToolCallDelta,
    parse_completion,
)
from v4_ascend.chat.stream import join_deltas
from v4_ascend.chat.strings import ADDED_TOKENS, EOS

MARKERS = ["\n\n<｜DSML｜", "\n<｜DSML｜", "<｜DSML｜", "</｜DSML｜"] + [
    t.content for t in ADDED_TOKENS
]

INVOKE = (
    '<｜DSML｜invoke name="get_weather">\n'
    '<｜DSML｜parameter name="city" string="true">Bei<jing</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">[1, 2]</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n"
)
BLOCK = f"<｜DSML｜tool_calls>\n{INVOKE}</｜DSML｜tool_calls>"
WEATHER = ("get_weather", '{"city": "Bei<jing", "days": [1, 2]}')

# What completions are made of, in any order: well-formed, misplaced, cut.
PIECES = [
    "text", " ", "\n", "\n\n", "a < b", "<｜", "é🙂", "</", "<th", '"', ">", "name=",
    "<think>", "</think>", EOS, "<｜User｜>", "<|EOT|>", "｜DSML｜",
    BLOCK, f"\n\n{BLOCK}", INVOKE,
    "<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>", "<｜DSML｜tool>\n",
    '<｜DSML｜invoke name="f">', "<｜DSML｜invoke>", "</｜DSML｜invoke>", "</｜DSML｜",
    '<｜DSML｜parameter name="p" string="true">', '<｜DSML｜parameter name="q">',
    "</｜DSML｜parameter>", '<｜DSML｜parameter name="a>b', "{\"k\": 1}", "\\",
]  # fmt: skip
completions = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


def stream(text: str, cuts: list[int], thinking: bool, tools: bool = True) -> list[Delta]:
    """Parse `text` in chunks that end at `cuts`."""
    parser = StreamParser(thinking, tools)
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    deltas: list[Delta] = []
    for start, end in zip([0, *ends], ends, strict=False):
        deltas += parser.feed(text[start:end])
    return deltas + parser.finish()


def calls(completion: Completion) -> list[tuple[str, str]]:
    return [(call.name, call.arguments) for call in completion.tool_calls]


def without_ids(completion: Completion) -> tuple[str, str, list[tuple[str, str]]]:
    return completion.reasoning, completion.content, calls(completion)


@settings(max_examples=1000, deadline=None)
@given(
    text=completions,
    cuts=st.lists(st.integers(0, 200)),
    length=st.integers(0, 400),
    thinking=st.booleans(),
    tools=st.booleans(),
)
def test_however_a_completion_is_cut_the_deltas_join_to_the_same(
    text: str, cuts: list[int], length: int, thinking: bool, tools: bool
):
    text = text[:length]
    whole = without_ids(parse_completion(text, thinking, tools))
    assert without_ids(join_deltas(stream(text, cuts, thinking, tools))) == whole
    every_character = list(range(len(text)))
    assert without_ids(join_deltas(stream(text, every_character, thinking, tools))) == whole


@settings(deadline=None)
@given(text=completions, cuts=st.lists(st.integers(0, 200)), thinking=st.booleans())
def test_no_text_delta_holds_a_marker(text: str, cuts: list[int], thinking: bool):
    for delta in stream(text, cuts, thinking):
        if isinstance(delta, ReasoningDelta | ContentDelta):
            assert not any(marker in delta.text for marker in MARKERS)


@settings(deadline=None)
@given(text=completions, cuts=st.lists(st.integers(0, 200)))
def test_a_finished_call_always_has_an_object_as_arguments(text: str, cuts: list[int]):
    for call in join_deltas(stream(text + BLOCK, cuts, False)).tool_calls:
        assert isinstance(json.loads(call.arguments), dict)


@settings(deadline=None)
@given(text=completions, cuts=st.lists(st.integers(0, 200)), thinking=st.booleans())
def test_without_tools_no_call_is_reported(text: str, cuts: list[int], thinking: bool):
    completion = join_deltas(stream(text, cuts, thinking, tools=False))
    assert completion.tool_calls == ()


@given(text=st.lists(st.sampled_from(PIECES[:12])).map("".join))
def test_only_what_may_begin_markup_is_held_back(text: str):
    emitted = "".join(d.text for d in StreamParser(False, True).feed(text))
    held = text.removeprefix(emitted)
    assert emitted + held == text
    assert held == "" or any(marker.startswith(held) for marker in MARKERS)
    longer = text[len(emitted) - 1 :] if emitted else ""
    assert longer == "" or not any(marker.startswith(longer) for marker in MARKERS)


def test_plain_text_passes_at_once():
    parser = StreamParser(True, True)
    assert parser.feed("I think") == [ReasoningDelta("I think")]
    assert parser.feed("</think>Hi") == [ContentDelta("Hi")]


def test_a_call_is_reported_as_it_is_written():
    parser = StreamParser(False, True)
    (start,) = parser.feed(
        '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter'
    )
    assert isinstance(start, ToolCallDelta)
    assert (start.index, start.name) == (0, "f")
    assert [d.text for d in parser.feed(' name="p" string="true">one')] == ['{"p": "', "one"]
    assert [d.text for d in parser.feed(' "two"</')] == [' \\"two\\"']


def test_trap_t36_markup_that_survives_decoding_does_not_reach_the_client(
    huggingface_official: Tokenizer,
):
    text = f"Thoughts.</think>Answer.\n\n{BLOCK}{EOS}"
    ids = huggingface_official.encode(text, add_special_tokens=False).ids
    decoded = huggingface_official.decode(ids, skip_special_tokens=True)
    assert "</think>" in decoded, "the official tokenizer does not skip chat markers"
    completion = parse_completion(decoded, True)
    assert without_ids(completion) == ("Thoughts.", "Answer.", [WEATHER])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(f"r\n\n{BLOCK}", ("r", "", [WEATHER]), id="no-think-end-before-a-call"),
        pytest.param(
            f"r{BLOCK}\nDone.", ("r", "Done.", [WEATHER]), id="text-behind-a-call-is-the-answer"
        ),
        pytest.param(f"r{EOS}", ("r", "", []), id="no-think-end-at-all"),
        pytest.param(f"<think>r</think>c{EOS}", ("r", "c", []), id="think-opened-again"),
        pytest.param(f"r</think></think>c{EOS}", ("r", "c", []), id="think-closed-twice"),
        pytest.param(
            "r</think>" + BLOCK.replace("tool_calls", "toolcalls"),
            ("r", "", [WEATHER]),
            id="toolcalls",
        ),
        pytest.param(
            "r</think>" + BLOCK.replace("tool_calls", "tool"), ("r", "", [WEATHER]), id="tool"
        ),
        pytest.param(
            "r</think>" + BLOCK.replace("｜DSML｜", "｜DSML｜ "), ("r", "", [WEATHER]), id="spaces"
        ),
        pytest.param(f"r</think>c\n\n{INVOKE}", ("r", "c", [WEATHER]), id="no-block"),
        pytest.param(
            "r</think>" + BLOCK.replace(' string="true"', "").replace(' string="false"', ""),
            ("r", "", [WEATHER]),
            id="no-string-attribute",
        ),
        pytest.param(
            "r</think>" + BLOCK.replace("</｜DSML｜invoke>", ""),
            ("r", "", [WEATHER]),
            id="invoke-left-open",
        ),
        pytest.param(
            "r</think>" + BLOCK.replace('string="true">Bei', 'string="true"\nBei'),
            ("r", "", [("get_weather", '{"city": "\\nBei<jing", "days": [1, 2]}')]),
            id="tag-left-open",
        ),
        pytest.param(
            f"r</think>{BLOCK}\nDone.{BLOCK}{EOS}",
            ("r", "Done.", [WEATHER, WEATHER]),
            id="text-between-two-blocks",
        ),
        pytest.param(
            f'r</think><｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n{EOS}',
            ("r", "", [("f", "{}")]),
            id="ended-inside-a-call",
        ),
        pytest.param(
            f'r</think><｜DSML｜invoke name="f">\n<｜DSML｜parameter name="p" string="true">v{EOS}',
            ("r", "", [("f", '{"p": "v"}')]),
            id="ended-inside-a-value",
        ),
        pytest.param(
            "r</think>" + BLOCK.replace('name="days"', 'name="city"'),
            ("r", "", [("get_weather", '{"city": "Bei<jing"}')]),
            id="a-parameter-twice",
        ),
        pytest.param(
            "r</think>" + BLOCK.replace(' name="get_weather"', ""), ("r", "", []), id="no-name"
        ),
    ],
)
def test_trap_t37_departures_from_the_format_are_understood(
    text: str, expected: tuple[str, str, list[tuple[str, str]]]
):
    assert without_ids(parse_completion(text, thinking=True)) == expected


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('<｜DSML｜parameter name="p" string="true">rm -rf /t', '{"p": "rm -rf /t'),
        ('<｜DSML｜parameter name="p" string="true">v</｜DS', '{"p": "v'),
        ('<｜DSML｜parameter name="p" string="false">[1, ', '{"p": [1, '),
        ('<｜DSML｜parameter name="p" string="true">v</｜DSML｜parameter>\n', '{"p": "v"'),
    ],
    ids=["in-text", "in-the-end-tag", "in-json", "between-parameters"],
)
def test_a_call_that_was_cut_off_never_looks_complete(text: str, arguments: str):
    completion = parse_completion(f'<｜DSML｜invoke name="f">\n{text}', False)
    assert calls(completion) == [("f", arguments)]
    with pytest.raises(json.JSONDecodeError):
        json.loads(arguments)


@pytest.mark.parametrize("cut", ["<｜", "\n\n<｜DSML", "</｜DSML｜inv", "<｜end▁of"])
def test_markup_that_was_cut_off_is_not_shown(cut: str):
    assert parse_completion(f"a{cut}", False).content == "a"


@pytest.mark.parametrize("end", ["<", "</", "\n", "\n\n", "1 <", "</t"])
def test_a_text_may_end_in_what_could_have_become_markup(end: str):
    assert parse_completion(f"a{end}", False).content == f"a{end}"


def test_a_value_may_contain_markers():
    value = f"</think><｜User｜>{EOS}<｜DSML｜tool_calls> "
    parameter = f'<｜DSML｜parameter name="p" string="true">{value}</｜DSML｜parameter>\n'
    text = f'<｜DSML｜invoke name="f">\n{parameter}</｜DSML｜invoke>'
    completion = parse_completion(text, False)
    assert calls(completion) == [("f", json.dumps({"p": value}, ensure_ascii=False))]


def test_a_block_name_mentioned_in_reasoning_does_not_end_it():
    completion = parse_completion("a <｜DSML｜tool_calls> block</think>c", True)
    assert without_ids(completion) == ("a block", "c", [])


def test_in_chat_mode_reasoning_the_model_opens_itself_is_reasoning():
    assert without_ids(parse_completion(f"<think>r</think>c{EOS}", False)) == ("r", "c", [])
    assert without_ids(parse_completion(f"\n<think>r</think>c{EOS}", False)) == ("r", "\nc", [])


def test_an_answer_that_mentions_think_tags_stays_an_answer():
    assert parse_completion("Use <think> and </think>.", False).content == "Use  and ."


def test_nothing_follows_the_end_token():
    assert parse_completion(f"a{EOS}b{BLOCK}", False) == Completion("", "a", ())
