"""A sample of the soak; the whole of it: python tests/runtime/soak.py."""

import asyncio
import json

import httpx
import pytest
import soak


@pytest.mark.slow
def test_nothing_is_lost_or_wrong_and_the_end_is_clean(tmp_path):
    result = soak.run(tmp_path, n=40, concurrency=16, seed=1)
    assert soak.faults_of(result) == []
    assert result["preempted"] > 0
    assert result["prefix_hits"] > 0
    assert set(result["kinds"]) == set(soak.KINDS)


def test_a_near_tie_may_be_decided_otherwise_and_nothing_else():
    first = [("a", 2.0), ("b", 1e-4), ("c", 1.0)]
    assert not soak.compare(first, first)
    assert soak.compare(first, [("a", 2.0), ("x", 1e-4), ("y", 1.0)])
    with pytest.raises(soak.WrongError, match="token 2 is d, and was c by 1.0000"):
        soak.compare(first, [*first[:2], ("d", 1.0)])


TOPS = [{"logprob": -0.5}, {"logprob": -2.5}]
TOKEN = {"bytes": [97], "top_logprobs": TOPS}
CHUNK = "data: " + json.dumps({"choices": [{"logprobs": {"content": [TOKEN]}}]}) + "\n\n"


@pytest.mark.parametrize(
    ("status", "text", "says"),
    [
        (200, CHUNK * 2 + "data: [DONE]\n\n", None),
        (200, CHUNK * 2, "the stream ends with"),
        (200, CHUNK + "data: [DONE]\n\n", "1 tokens of 2"),
        (429, "busy", "429 busy"),
    ],
)
def test_half_an_answer_is_wrong(status, text, says):
    async def ask():
        transport = httpx.MockTransport(lambda _: httpx.Response(status, text=text))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await soak.answer(client, {"stream": True, "max_tokens": 2})

    if says is None:
        assert asyncio.run(ask()) == [([97], 2.0)] * 2
    else:
        with pytest.raises(soak.WrongError, match=says):
            asyncio.run(ask())


def test_what_must_not_be_is_a_fault():
    good = {
        "requests": 500,
        "kinds": {"greedy": {"statuses": {"200": 500}}},
        "lost": [],
        "wrong": [],
        "drain_faults": [],
        "taken_at_the_end": [0, 0, 0],
        "memory": {"front": {"warm_mib": 100, "end_mib": 104}},
    }
    assert soak.faults_of(good) == []
    for change in (
        {"lost": ["x"]},
        {"wrong": ["x"]},
        {"drain_faults": ["x"]},
        {"taken_at_the_end": [0, 0, 0.1]},
        {"requests": 501},
        {"memory": {"front": {"warm_mib": 100, "end_mib": 106}}},
    ):
        assert len(soak.faults_of(good | change)) == 1
