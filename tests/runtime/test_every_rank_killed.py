"""Each rank in turn is killed under many streams: answers or errors, ready again, nothing left."""

import asyncio
import json
import os
import signal
import time
from pathlib import Path

import httpx
import pytest
from test_deploy import ASK, Box, _of, wait_for

N_STREAMS = 50
LAYOUT = [
    *("--set", "layout={pp_size: 2, dp_size: 2, ep_size: 2}", "--set", "serve.concurrency=8"),
    *("--set", "cluster.supernodes=[{name: h, hosts: [localhost], devices_per_host: 4}]"),
]


async def stream(client, seed):
    """One stream's end: its finish reason, or the error a client sees."""
    body = ASK | {"seed": seed, "max_tokens": 40, "stream": True}
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            return f"{answer.status_code}: {(await answer.aread()).decode()}"
        async for line in answer.aiter_lines():
            event = json.loads(line[6:]) if line.startswith("data: {") else {}
            if "error" in event:
                return f"error: {event['error']['message']}"
            for choice in event.get("choices", ()):
                if choice["finish_reason"]:
                    return choice["finish_reason"]
    return "cut off without a word"


async def killed_under_load(url, pid):
    limits = httpx.Limits(max_connections=N_STREAMS)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
        streams = [asyncio.create_task(stream(client, seed)) for seed in range(N_STREAMS)]
        await asyncio.wait(streams, return_when=asyncio.FIRST_COMPLETED)
        os.kill(pid, signal.SIGKILL)
        return await asyncio.gather(*streams)


@pytest.mark.slow
def test_every_stream_gets_an_answer_or_an_error_whichever_rank_is_killed(tmp_path):
    box = Box(tmp_path)
    done = box.run("init", "--preset", "tiny", "--format", "fp32", "--out", tmp_path / "tiny")
    assert done.returncode == 0, done.stderr
    shared_memory = set(Path("/dev/shm").iterdir())
    done = box.run("deploy", "--topology", box.topology, *LAYOUT, "--detach")
    assert done.returncode == 0, done.stderr
    try:
        for rank in range(3):  # torchrun starts them again three times
            pid = box.status("laptop")[0]["ranks"][rank]["pid"]
            ends = asyncio.run(killed_under_load(box.url, pid))
            killed = time.monotonic()
            assert_ends(ends, f"rank {rank} (stage {rank // 2}, ")
            wait_for(lambda: httpx.get(f"{box.url}/ready").status_code == 200, seconds=60)
            assert time.monotonic() - killed < 30
        assert asyncio.run(one(box.url)) in ("stop", "length")
        pid = box.status("laptop")[0]["ranks"][3]["pid"]
        assert_ends(asyncio.run(killed_under_load(box.url, pid)), "rank 3 (stage 1, ")
        wait_for(lambda: not box.status("laptop"), seconds=60)
        log = (box.folder / "state/v4-ascend/laptop/supervisor.log").read_text()
        assert "error: laptop: ranks ended with exit code 1" in log
    finally:
        box.run("down", "laptop")
    assert box.left() == []
    assert _of(box) == []
    assert set(Path("/dev/shm").iterdir()) <= shared_memory


async def one(url):
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        return await stream(client, 1)


def assert_ends(ends, name):
    answered = [e for e in ends if e in ("stop", "length")]
    refused = [e for e in ends if e not in answered]
    assert len(answered) + len(refused) == N_STREAMS
    assert answered
    assert refused
    assert all(e.startswith(("error: ", "503", "500", "429")) for e in refused), refused
    named = [e for e in refused if name in e and "ended (pid" in e]
    assert named, refused
