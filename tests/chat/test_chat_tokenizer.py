from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from v4_ascend.chat import ChatTokenizer, Prompt, TokenStream, encode_messages
from v4_ascend.chat.byte_tokenizer import MIN_VOCAB_SIZE
from v4_ascend.chat.strings import ADDED_TOKENS, CONTROL_MARKERS, DSML, THINK_END, USER
from v4_ascend.chat.tokenizer import write_byte_tokenizer
from v4_ascend.errors import CheckpointError, ConfigError

DATA = Path(__file__).parents[1] / "data" / "chat"
GOLDEN = json.loads((DATA / "golden_tokens.json").read_text("utf-8"))
PAIR_1 = json.loads((DATA / "test_input_1.json").read_text("utf-8"))
PAIR_2 = json.loads((DATA / "test_input_2.json").read_text("utf-8"))

# Without these no marker can come about, not even together with the text around it.
FORBIDDEN = ("｜", "|", "think>", "dsml:")
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(
    lambda text: not any(part in text for part in FORBIDDEN)
)
LITERALS = f"a{USER}b{THINK_END}c<{DSML}tool_calls>\n<｜end▁of▁sentence｜><｜image｜>"


def pair_prompt(number: int) -> Prompt:
    if number == 1:
        return encode_messages(PAIR_1["messages"], thinking=True, tools=PAIR_1["tools"])
    return encode_messages(PAIR_2, thinking=True)


@pytest.mark.parametrize("sample", GOLDEN["samples"], ids=lambda sample: repr(sample["text"][:20]))
def test_golden_samples_encode_to_their_ids_and_back(
    official_tokenizer: ChatTokenizer, sample: dict[str, Any]
):
    assert official_tokenizer.encode(sample["text"]) == sample["ids"]
    assert official_tokenizer.decode(sample["ids"]) == sample["text"]


@pytest.mark.parametrize("number", [1, 2])
def test_the_official_prompts_encode_to_their_golden_ids(
    official_tokenizer: ChatTokenizer, number: int
):
    golden = GOLDEN["encoding_tests"][number - 1]["ids"]
    assert official_tokenizer.encode_prompt(pair_prompt(number)) == golden
    assert official_tokenizer.encode(pair_prompt(number).text) == golden


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(TEXT, min_size=7, max_size=7), thinking=st.booleans())
def test_without_literals_a_prompt_encodes_as_its_whole_text(
    official_tokenizer: ChatTokenizer, texts: list[str], thinking: bool
):
    instructions, question, reasoning, answer, name, key, value = texts
    arguments = json.dumps({key: value, "n": [key, 1.5]})
    call = {"id": "c", "function": {"name": name, "arguments": arguments}}
    messages = [
        {"role": "system", "content": instructions},
        {"role": "user", "content": question},
        {
            "role": "assistant",
            "reasoning_content": reasoning,
            "content": answer,
            "tool_calls": [call],
        },
        {"role": "tool", "tool_call_id": "c", "content": value},
    ]
    tools = [{"type": "function", "function": {"name": name, "description": answer}}]
    prompt = encode_messages(messages, thinking=thinking, tools=tools, reasoning_effort="max")
    assert official_tokenizer.encode_prompt(prompt) == official_tokenizer.encode(prompt.text)


def conversation(place: str, text: str) -> Prompt:
    """Put `text` in one place of a conversation that uses every place."""
    texts = {name: text if name == place else "x" for name in PLACES}
    arguments = json.dumps({texts["argument name"]: texts["argument"], "n": [texts["argument"]]})
    function = {"name": texts["function name"], "arguments": arguments}
    messages = [
        {"role": "system", "content": texts["system"]},
        {"role": "latest_reminder", "content": texts["reminder"]},
        {"role": "user", "content": texts["user"]},
        {
            "role": "assistant",
            "reasoning_content": texts["reasoning"],
            "content": texts["answer"],
            "tool_calls": [{"id": "c", "function": function}],
        },
        {"role": "tool", "tool_call_id": "c", "content": texts["tool result"]},
    ]
    tools = [{"type": "function", "function": {"name": "f", "description": texts["tool"]}}]
    return encode_messages(
        messages, thinking=True, tools=tools, response_format={"schema": texts["format"]}
    )


PLACES = [
    "system", "reminder", "user", "reasoning", "answer", "function name", "argument name",
    "argument", "tool result", "tool", "format",
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_trap_t60_literals_a_client_writes_are_text(official_tokenizer: ChatTokenizer, place: str):
    added = {official_tokenizer.token_id(token.content) for token in ADDED_TOKENS}

    def markers(prompt: Prompt) -> list[int]:
        return [id_ for id_ in official_tokenizer.encode_prompt(prompt) if id_ in added]

    prompt = conversation(place, LITERALS)
    assert markers(prompt) == markers(conversation(place, "x"))
    assert official_tokenizer.decode(official_tokenizer.encode_prompt(prompt)) == prompt.text


def test_a_prompt_s_control_segments_are_single_markers_and_text_is_never_split():
    segments = pair_prompt(1).segments
    assert all(s.text in CONTROL_MARKERS for s in segments if s.is_control)
    assert all(s.text for s in segments)
    assert not any(
        not a.is_control and not b.is_control for a, b in zip(segments, segments[1:], strict=False)
    )


def test_bos_and_eos_have_their_official_ids(official_tokenizer: ChatTokenizer):
    assert (official_tokenizer.bos_id, official_tokenizer.eos_id) == (0, 1)
    assert official_tokenizer.token_id("<｜User｜>") == 128803
    assert official_tokenizer.vocab_size == 129280


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 129279), max_size=40))
def test_a_token_stream_joins_to_what_the_tokenizer_decodes(
    official_tokenizer: ChatTokenizer, huggingface_official: Tokenizer, ids: list[int]
):
    stream = TokenStream(official_tokenizer)
    streamed = "".join([*map(stream.feed, ids), stream.finish()])
    assert streamed == official_tokenizer.decode(ids)
    assert streamed == huggingface_official.decode(ids, skip_special_tokens=False)


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 511), max_size=40))
def test_a_token_stream_of_random_bytes_joins_to_what_the_tokenizer_decodes(
    byte_tokenizer: ChatTokenizer, huggingface_byte: Tokenizer, ids: list[int]
):
    stream = TokenStream(byte_tokenizer)
    streamed = "".join([*map(stream.feed, ids), stream.finish()])
    assert streamed == huggingface_byte.decode(ids, skip_special_tokens=False)


def test_a_token_stream_gives_each_character_with_its_last_byte(byte_tokenizer: ChatTokenizer):
    stream = TokenStream(byte_tokenizer)
    chunks = [stream.feed(id_) for id_ in byte_tokenizer.encode("aé🙂")]
    assert chunks == ["a", "", "é", "", "", "", "🙂"]
    assert stream.finish() == ""


def test_a_token_stream_cut_inside_a_character_ends_in_a_replacement(
    byte_tokenizer: ChatTokenizer,
):
    stream = TokenStream(byte_tokenizer)
    assert [stream.feed(id_) for id_ in byte_tokenizer.encode("é")[:1]] == [""]
    assert stream.finish() == "\ufffd"


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_the_byte_tokenizer_encodes_any_text_as_its_bytes(byte_tokenizer: ChatTokenizer, text: str):
    ids = byte_tokenizer.encode_plain(text)
    assert ids == [3 + byte for byte in text.encode()]
    assert byte_tokenizer.decode(ids) == text


def test_the_byte_tokenizer_has_every_marker_and_the_official_ids_of_the_first_three(
    byte_tokenizer: ChatTokenizer,
):
    ids = [byte_tokenizer.token_id(token.content) for token in ADDED_TOKENS]
    assert ids[:3] == [0, 1, 2]
    assert ids[3:] == list(range(3 + 256, MIN_VOCAB_SIZE))
    assert byte_tokenizer.vocab_size == MIN_VOCAB_SIZE <= 512


def test_the_byte_tokenizer_s_tokens_have_the_official_flags(
    huggingface_byte: Tokenizer, huggingface_official: Tokenizer
):
    def flags(tokenizer: Tokenizer) -> dict[str, tuple[bool, ...]]:
        tokens = tokenizer.get_added_tokens_decoder().values()
        return {
            t.content: (t.special, t.normalized, t.lstrip, t.rstrip, t.single_word) for t in tokens
        }

    official, own = flags(huggingface_official), flags(huggingface_byte)
    assert own == {content: official[content] for content in own}


@pytest.mark.parametrize("number", [1, 2])
def test_the_byte_tokenizer_encodes_prompts(byte_tokenizer: ChatTokenizer, number: int):
    prompt = pair_prompt(number)
    ids = byte_tokenizer.encode_prompt(prompt)
    assert ids == byte_tokenizer.encode(prompt.text)
    assert byte_tokenizer.decode(ids) == prompt.text


def test_a_vocabulary_too_small_for_the_byte_tokenizer_is_refused_with_the_numbers(tmp_path: Path):
    with pytest.raises(ConfigError, match="^vocab_size: 321 is too small .* at least 322$"):
        write_byte_tokenizer(tmp_path, 321)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_without_tokenizer_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="tokenizer.json: no such file"):
        ChatTokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"version": "1.0"}'])
def test_a_damaged_tokenizer_is_refused(tmp_path: Path, content: str):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="tokenizer.json: not a tokenizer"):
        ChatTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"), [("{", "not JSON"), ("[]", "must be a JSON object")]
)
def test_a_damaged_tokenizer_config_is_refused(tmp_path: Path, content: str, problem: str):
    write_byte_tokenizer(tmp_path, 512)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=f"tokenizer_config.json: {problem}"):
        ChatTokenizer.load(tmp_path)


def test_a_tokenizer_without_a_marker_of_v4_is_refused(tmp_path: Path):
    write_byte_tokenizer(tmp_path, 512)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text("utf-8").replace("<｜User｜>", "<｜Client｜>"), "utf-8")
    with pytest.raises(CheckpointError, match="tokenizer.json: '<｜User｜>' is not a token"):
        ChatTokenizer.load(tmp_path)


def test_the_end_token_is_the_one_tokenizer_config_names(tmp_path: Path):
    write_byte_tokenizer(tmp_path, 512)
    config = {"eos_token": {"__type": "AddedToken", "content": "<|EOT|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = ChatTokenizer.load(tmp_path)
    assert tokenizer.eos_id == tokenizer.token_id("<|EOT|>")
