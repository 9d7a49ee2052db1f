from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from v4_ascend.chat import StopMatcher

letters = st.text("ab\n")


def run(stops: list[str], chunks: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stops)
    sent = ""
    for chunk in chunks:
        emit, stopped = matcher.feed(chunk)
        sent += emit
        if stopped:
            return sent, True
    return sent + matcher.finish(), False


@pytest.mark.parametrize(
    ("stops", "text", "sent", "stopped"),
    [
        pytest.param([], "abc", "abc", False, id="no-stops"),
        pytest.param(["x"], "abc", "abc", False, id="no-match"),
        pytest.param(["b"], "abc", "a", True, id="cut-before-the-match"),
        pytest.param(["abc"], "abab", "abab", False, id="half-a-match-is-sent-in-the-end"),
        pytest.param(["c", "bcd"], "abcd", "ab", True, id="the-match-complete-first-wins"),
        pytest.param(["c", "bc"], "abcd", "a", True, id="of-two-complete-together-the-longer"),
        pytest.param(["aab"], "aaab", "a", True, id="overlapping-itself"),
        pytest.param(["。\n"], "你好。\n再见", "你好", True, id="any-language"),
    ],
)
@pytest.mark.parametrize("by_character", [False, True], ids=["whole", "by-character"])
def test_a_stream_is_cut_before_the_first_stop_string(
    stops: list[str], text: str, sent: str, stopped: bool, by_character: bool
):
    assert run(stops, list(text) if by_character else [text]) == (sent, stopped)


@given(stops=st.lists(letters.filter(bool), max_size=4), chunks=st.lists(letters, max_size=8))
def test_chunking_changes_nothing(stops: list[str], chunks: list[str]):
    text = "".join(chunks)
    assert run(stops, chunks) == run(stops, [text]) == run(stops, list(text))


@given(stop=letters.filter(bool), text=letters)
def test_only_the_beginning_of_a_stop_string_is_held_back(stop: str, text: str):
    emit, stopped = StopMatcher([stop]).feed(text)
    held = text.removeprefix(emit)
    assert stopped == (stop in text)
    assert held.startswith(stop) if stopped else stop.startswith(held)


def test_after_the_stop_nothing_is_sent():
    matcher = StopMatcher(["b"])
    assert matcher.feed("abc") == ("a", True)
    assert matcher.feed("d") == ("", True)
    assert matcher.finish() == ""


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="must not be empty"):
        StopMatcher(["a", ""])
