from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from v4_ascend.chat import encode_messages, encoder_release
from v4_ascend.chat.strings import EFFORT_PREFIXES
from v4_ascend.errors import RequestError

DATA = Path(__file__).parents[1] / "data" / "chat"

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
APRIL_MAX = "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
LATER_MAX = "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"

TOOL = {"type": "function", "function": {"name": "né", "parameters": {"type": "object"}}}
TOOL_LINE = '{"name": "né", "parameters": {"type": "object"}}'
INVOKE = '<｜DSML｜invoke name="né">\n{}\n</｜DSML｜invoke>'


def system(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "system", "content": text, **more}


def user(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def assistant(text: str | None = None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def tool(call_id: str, content: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def call(arguments: str, call_id: str = "c1") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "né", "arguments": arguments}}


def reminder(text: str) -> dict[str, Any]:
    return {"role": "latest_reminder", "content": text}


def prompt(*messages: dict[str, Any], thinking: bool = False, **options: Any) -> str:
    return encode_messages(messages, thinking=thinking, **options).text


def calls_block(*invocations: str) -> str:
    return "\n\n" + "\n".join(["<｜DSML｜tool_calls>", *invocations, "</｜DSML｜tool_calls>"])


def test_official_pair_1_with_tools_is_byte_exact():
    case = json.loads((DATA / "test_input_1.json").read_text("utf-8"))
    encoded = encode_messages(case["messages"], thinking=True, tools=case["tools"])
    assert encoded.text == (DATA / "test_output_1.txt").read_text("utf-8")


def test_official_pair_2_without_tools_is_byte_exact():
    messages = json.loads((DATA / "test_input_2.json").read_text("utf-8"))
    expected = (DATA / "test_output_2.txt").read_text("utf-8")
    assert encode_messages(messages, thinking=True).text == expected


def test_tools_of_a_system_message_read_as_tools_of_the_request():
    case = json.loads((DATA / "test_input_1.json").read_text("utf-8"))
    first, *others = case["messages"]
    encoded = encode_messages([{**first, "tools": case["tools"]}, *others], thinking=True)
    assert encoded.text == (DATA / "test_output_1.txt").read_text("utf-8")


@pytest.mark.parametrize(
    ("messages", "thinking", "expected"),
    [
        pytest.param([user("a")], False, f"{BOS}{USER}a{ASSISTANT}</think>", id="chat-mode"),
        pytest.param([user("a")], True, f"{BOS}{USER}a{ASSISTANT}<think>", id="thinking-mode"),
        pytest.param(
            [user("a"), user("b")],
            False,
            f"{BOS}{USER}a\n\nb{ASSISTANT}</think>",
            id="user-messages-in-a-row-are-one-turn",
        ),
        pytest.param(
            [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])],
            False,
            f"{BOS}{USER}a\n\nb{ASSISTANT}</think>",
            id="text-parts-stand-a-blank-line-apart",
        ),
        pytest.param(
            [user("a"), assistant("b", reasoning_content="r"), user("c")],
            True,
            f"{BOS}{USER}a{ASSISTANT}</think>b{EOS}{USER}c{ASSISTANT}<think>",
            id="earlier-reasoning-is-dropped",
        ),
        pytest.param(
            [user("a"), assistant("b", reasoning_content="r")],
            False,
            f"{BOS}{USER}a{ASSISTANT}</think>b{EOS}",
            id="chat-mode-writes-no-reasoning",
        ),
        pytest.param(
            [user("a"), assistant("b", wo_eos=True)],
            False,
            f"{BOS}{USER}a{ASSISTANT}</think>b",
            id="an-open-assistant-message-has-no-end",
        ),
        pytest.param(
            [{"role": "developer", "content": "d"}, user("a")],
            True,
            f"{BOS}{USER}a{ASSISTANT}<think>",
            id="an-earlier-developer-message-is-dropped-in-thinking-mode",
        ),
        pytest.param(
            [{"role": "developer", "content": "d", "tools": []}],
            False,
            f"{BOS}{USER}d{ASSISTANT}</think>",
            id="a-developer-message-is-a-user-turn",
        ),
        pytest.param(
            [system("s"), reminder("now"), user("a")],
            False,
            f"{BOS}s<｜latest_reminder｜>now{USER}a{ASSISTANT}</think>",
            id="a-reminder-before-the-user",
        ),
        pytest.param(
            [user("a"), reminder("now"), assistant("b")],
            False,
            f"{BOS}{USER}a{ASSISTANT}</think><｜latest_reminder｜>nowb{EOS}",
            id="the-hand-over-comes-before-a-reminder",
        ),
        pytest.param([user("a", task="title")], False, f"{BOS}{USER}a<｜title｜>", id="a-task"),
        pytest.param(
            [user("a", task="title"), assistant("T", reasoning_content="r")],
            True,
            f"{BOS}{USER}a<｜title｜>T{EOS}",
            id="the-answer-to-a-task-has-no-reasoning",
        ),
        pytest.param(
            [user("a", task="action"), assistant("Search")],
            False,
            f"{BOS}{USER}a{ASSISTANT}</think><｜action｜>Search{EOS}",
            id="the-action-task-in-chat-mode",
        ),
        pytest.param(
            [user("a", task="action")],
            True,
            f"{BOS}{USER}a{ASSISTANT}<think><｜action｜>",
            id="the-action-task-in-thinking-mode",
        ),
        pytest.param(
            [user("a", task="query"), user("b")],
            False,
            f"{BOS}{USER}a{USER}b{ASSISTANT}</think>",
            id="a-task-closes-its-user-turn",
        ),
        pytest.param(
            [tool("c1", [{"type": "text", "text": "x"}, {"type": "image_url"}])],
            False,
            f"{BOS}{USER}<tool_result>x\n\n[Unsupported image_url]</tool_result>"
            f"{ASSISTANT}</think>",
            id="parts-of-a-tool-result",
        ),
    ],
)
def test_a_conversation_becomes_this_prompt(
    messages: list[dict[str, Any]], thinking: bool, expected: str
):
    assert prompt(*messages, thinking=thinking) == expected


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [
        pytest.param("{}", "", id="none"),
        pytest.param(
            '{"é": "a\\nb"}',
            '<｜DSML｜parameter name="é" string="true">a\nb</｜DSML｜parameter>',
            id="text-is-raw",
        ),
        pytest.param(
            '{"x":[1,{"y":null}],"z":"é"}',
            '<｜DSML｜parameter name="x" string="false">[1, {"y": null}]</｜DSML｜parameter>\n'
            '<｜DSML｜parameter name="z" string="true">é</｜DSML｜parameter>',
            id="the-rest-is-json",
        ),
        pytest.param(
            "{nope",
            '<｜DSML｜parameter name="arguments" string="true">{nope</｜DSML｜parameter>',
            id="no-json",
        ),
        pytest.param(
            "[1]",
            '<｜DSML｜parameter name="arguments" string="true">[1]</｜DSML｜parameter>',
            id="no-object",
        ),
    ],
)
def test_a_tool_call_is_written_as_dsml(arguments: str, parameters: str):
    written = prompt(user("a"), assistant("b", tool_calls=[call(arguments)]))
    block = calls_block(INVOKE.format(parameters))
    assert written == f"{BOS}{USER}a{ASSISTANT}</think>b{block}{EOS}"


def test_tools_and_response_format_go_to_the_first_system_message():
    written = prompt(user("a"), system("s"), tools=[TOOL], response_format={"type": "json_object"})
    assert written.startswith(f"{BOS}{USER}as\n\n## Tools\n\n")
    assert f"\n\n### Available Tool Schemas\n\n{TOOL_LINE}\n\nYou MUST" in written
    assert written.endswith(
        "invoke tool calls.\n\n\n## Response Format:\n\nYou MUST strictly adhere to the "
        'following schema to reply:\n{"type": "json_object"}'
    )


def test_tools_without_a_system_message_get_an_empty_one():
    assert prompt(user("a"), tools=[TOOL]).startswith(f"{BOS}\n\n## Tools\n\n")


def test_an_encoded_context_is_continued_not_repeated():
    messages = [
        system("s"),
        user("a"),
        assistant("", tool_calls=[call("{}"), call("{}", "c2")]),
        tool("c2", "two"),
        tool("c1", "one"),
        assistant("b", reasoning_content="r"),
        user("c"),
    ]
    whole = prompt(*messages, thinking=True, tools=[TOOL], reasoning_effort="max")
    options: dict[str, Any] = {"tools": [TOOL], "reasoning_effort": "max"}
    earlier = prompt(*messages[:3], thinking=True, **options)
    later = prompt(*messages[3:], thinking=True, context=messages[:3], **options)
    assert earlier + later == whole


def test_a_user_turn_of_the_context_is_not_continued():
    later = prompt(user("b"), context=[user("a")])
    assert later == f"{USER}b{ASSISTANT}</think>"


def test_a_context_of_which_nothing_is_kept_is_still_a_context():
    later = prompt(user("a"), thinking=True, context=[{"role": "developer", "content": "d"}])
    assert later == f"{USER}a{ASSISTANT}<think>"


def test_a_context_without_system_message_still_turns_dropping_off_when_there_are_tools():
    context = [user("a")]
    later = prompt(
        assistant("b", reasoning_content="r"),
        user("c"),
        thinking=True,
        context=context,
        tools=[TOOL],
    )
    assert later == f"r</think>b{EOS}{USER}c{ASSISTANT}<think>"


def test_trap_t38_chat_mode_closes_thinking_without_opening_it():
    written = prompt(system("s"), user("a"))
    assert written.endswith(f"{ASSISTANT}</think>")
    assert "<think>" not in written


def test_trap_t39_with_tools_earlier_reasoning_stays():
    messages = [user("a"), assistant("b", reasoning_content="r"), user("c")]
    written = prompt(*messages, thinking=True, tools=[TOOL])
    assert f"{ASSISTANT}<think>r</think>b{EOS}{USER}c{ASSISTANT}<think>" in written


def test_trap_t39_tool_results_stand_in_the_order_of_their_calls():
    written = prompt(
        user("a"),
        assistant(tool_calls=[call("{}", "c1"), call("{}", "c2"), call("{}", "c3")]),
        tool("c3", "three"),
        tool("c1", "one"),
        user("and"),
        tool("c2", "two"),
    )
    expected = (
        "<tool_result>one</tool_result>\n\n<tool_result>two</tool_result>\n\nand\n\n"
        "<tool_result>three</tool_result>"
    )
    assert written.endswith(f"{EOS}{USER}{expected}{ASSISTANT}</think>")


def test_trap_t40_json_keeps_its_letters_and_python_s_separators():
    written = prompt(user("a"), assistant(tool_calls=[call('{"k":{"ü":[1,2]}}')]), tools=[TOOL])
    assert f"\n{TOOL_LINE}\n" in written
    assert '>{"ü": [1, 2]}</｜DSML｜parameter>' in written


@pytest.mark.parametrize("release", ["april", "0731"])
def test_trap_t52_thinking_without_an_effort_adds_no_prefix(release: Any):
    written = prompt(system("s"), user("a"), thinking=True, release=release)
    assert written == f"{BOS}s{USER}a{ASSISTANT}<think>"


@pytest.mark.parametrize(
    ("release", "effort", "beginning"),
    [
        ("april", "low", "s"),
        ("april", "high", "s"),
        ("april", "max", APRIL_MAX),
        ("0731", "low", "s"),
        ("0731", "high", APRIL_MAX),
        ("0731", "max", LATER_MAX),
    ],
)
def test_the_effort_stands_before_everything(release: Any, effort: Any, beginning: str):
    options: dict[str, Any] = {"release": release, "reasoning_effort": effort}
    written = prompt(system("s"), user("a"), thinking=True, **options)
    prefix = EFFORT_PREFIXES[release][effort]
    assert written == f"{BOS}{prefix}s{USER}a{ASSISTANT}<think>"
    assert written.startswith(f"{BOS}{beginning}")
    assert prompt(user("a"), **options) == prompt(user("a")), "chat mode has no effort"


@pytest.mark.parametrize(
    ("config", "release"),
    [
        ({"model_type": "deepseek_v4"}, "april"),
        ({"model_type": "deepseek_v4", "dspark_block_size": 5}, "0731"),
    ],
)
def test_dspark_keys_choose_the_later_encoder(config: dict[str, Any], release: str):
    assert encoder_release(config) == release


@pytest.mark.parametrize(
    ("messages", "param", "problem"),
    [
        pytest.param([], "messages", "is empty", id="no-messages"),
        pytest.param("hi", "messages", "must be a list of messages, not a string", id="a-string"),
        pytest.param(["hi"], "messages[0]", "must be an object, not a string", id="no-object"),
        pytest.param(
            [user("a"), {"role": "robot", "content": "b"}],
            "messages[1].role",
            "'robot' is not a role; use one of system",
            id="unknown-role",
        ),
        pytest.param([{"content": "b"}], "messages[0].role", "None is not a role", id="no-role"),
        pytest.param(
            [{"role": [], "content": "b"}], "messages[0].role", "[] is not a role", id="list-role"
        ),
        pytest.param([{"role": "user"}], "messages[0].content", "is missing", id="no-content"),
        pytest.param([user(3)], "messages[0].content", "not a number", id="number"),
        pytest.param([user(True)], "messages[0].content", "not a boolean", id="boolean"),
        pytest.param(
            [{"role": "user", "content": ["a"]}],
            "messages[0].content[0]",
            "must be an object, not a string",
            id="part-no-object",
        ),
        pytest.param(
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "messages[0].content[0].type",
            "'image_url' is not supported",
            id="image",
        ),
        pytest.param(
            [{"role": "user", "content": [{"type": "text"}]}],
            "messages[0].content[0].text",
            "must be a string, not null",
            id="part-no-text",
        ),
        pytest.param(
            [user("ab\ud83d")], "messages[0].content", "character 2 is U+D83D", id="half-a-pair"
        ),
        pytest.param(
            [{"role": "developer", "content": ""}],
            "messages[0].content",
            "is empty",
            id="empty-developer",
        ),
        pytest.param(
            [{"role": "tool", "content": "x"}],
            "messages[0].tool_call_id",
            "is missing",
            id="tool-without-id",
        ),
        pytest.param(
            [{"role": "tool", "tool_call_id": "c"}],
            "messages[0].content",
            "is missing",
            id="tool-without-content",
        ),
        pytest.param([assistant()], "messages[0].content", "is missing", id="empty-assistant"),
        pytest.param(
            [assistant("a", tool_calls={})],
            "messages[0].tool_calls",
            "must be a list of tool calls",
            id="calls-no-list",
        ),
        pytest.param(
            [assistant("a", tool_calls=[{"id": "c"}])],
            "messages[0].tool_calls[0].function",
            "must be an object, not null",
            id="no-function",
        ),
        pytest.param(
            [assistant("a", tool_calls=[{"function": {"name": "f", "arguments": "{}"}}])],
            "messages[0].tool_calls[0].id",
            "must be a string, not null",
            id="call-without-id",
        ),
        pytest.param(
            [assistant("a", tool_calls=[{"id": "c", "function": {"name": "f", "arguments": {}}}])],
            "messages[0].tool_calls[0].function.arguments",
            "not an object",
            id="object-arguments",
        ),
        pytest.param(
            [user("a", task="sing")], "messages[0].task", "'sing' is not a task", id="unknown-task"
        ),
        pytest.param([user("a", task=["query"])], "messages[0].task", "not a task", id="task-list"),
        pytest.param(
            [assistant("a", task="query")],
            "messages[0].task",
            "not assistant",
            id="task-elsewhere",
        ),
        pytest.param(
            [user("a", tools=[TOOL])],
            "messages[0].tools",
            "not user",
            id="tools-elsewhere",
        ),
        pytest.param(
            [system("a", tools=[{"type": "retrieval"}])],
            "messages[0].tools[0].type",
            "'retrieval' is not supported",
            id="no-function-tool",
        ),
        pytest.param(
            [system("a", tools=[{"type": "function", "function": {}}])],
            "messages[0].tools[0].function.name",
            "must be a string, not null",
            id="unnamed-tool",
        ),
        pytest.param(
            [system("a", response_format="json")],
            "messages[0].response_format",
            "must be an object",
            id="format-no-object",
        ),
    ],
)
def test_a_wrong_message_is_refused_where_it_is_wrong(messages: Any, param: str, problem: str):
    with pytest.raises(RequestError) as refusal:
        encode_messages(messages, thinking=False)
    assert refusal.value.param == param
    assert str(refusal.value).startswith(f"{param}: ")
    assert problem in str(refusal.value)


def test_a_wrong_tool_of_the_request_is_refused_where_it_is_wrong():
    with pytest.raises(RequestError, match=r"^tools\[1\].function.name: must be a string"):
        prompt(user("a"), tools=[TOOL, {"type": "function", "function": {"name": 1}}])
