"""A deployment that serves is changed: no request is lost, and what fails changes nothing."""

import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_deploy import ASK, Box, wait_for

pytestmark = pytest.mark.slow
N_STREAMS = 20


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    box = Box(tmp_path_factory.mktemp("upgraded"))
    done = box.run("init", "--preset", "tiny", "--format", "fp32", "--out", box.folder / "tiny")
    assert done.returncode == 0, done.stderr
    done = deploy(box)
    assert done.returncode == 0, done.stderr
    yield box
    assert box.run("down", "laptop").returncode == 0
    assert box.left() == []


def deploy(box, *settings, options=("--detach",)):
    words = [word for s in settings for word in ("--set", s)]
    command = ("deploy", "--topology", box.topology, "--drain-timeout", 300, "--timeout", 300)
    return box.run(*command, *words, *options, timeout=600)


def pids(box):
    return [row["pid"] for row in box.status()]


def stream(box, seed, n_tokens=60, **headers):
    """Return the finish reason, and how many chunks came; raise whatever went wrong."""
    body = ASK | {"stream": True, "max_tokens": n_tokens, "seed": seed, "ignore_eos": True}
    url = f"{box.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, timeout=300, headers=headers) as answer:
        assert answer.status_code == 200, answer.read()
        data = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert data[-1] == "[DONE]"
    chunks = [json.loads(text) for text in data[:-1]]
    assert not [c for c in chunks if "error" in c]
    return chunks[-1]["choices"][0]["finish_reason"]


def refused_length(box):
    body = ASK | {"messages": [{"role": "user", "content": "x" * 2000}]}
    answer = httpx.post(f"{box.url}/v1/chat/completions", json=body, timeout=60)
    return answer.json()["error"]["message"]


def test_settings_of_the_front_are_taken_while_streams_run(box):
    before = box.processes()
    with ThreadPoolExecutor(N_STREAMS) as pool:
        running = [pool.submit(stream, box, seed, 600) for seed in range(N_STREAMS)]
        done = deploy(box, "serve.api_keys=[k1]")
        assert done.returncode == 0, done.stderr
        assert not all(r.done() for r in running)
        assert {r.result() for r in running} == {"length"}
    assert "serve.api_keys" in done.stdout
    assert "nothing was restarted" in done.stdout
    assert httpx.get(f"{box.url}/v1/models").status_code == 401
    assert stream(box, 1, 3, **{"x-api-key": "k1"}) == "length"
    done = deploy(box)
    assert done.returncode == 0, done.stderr
    assert httpx.get(f"{box.url}/v1/models").status_code == 200
    assert box.processes() == before
    assert "laptop runs already" in deploy(box).stdout


def test_a_dry_run_says_what_would_be_restarted_and_starts_nothing(box):
    before = box.processes()
    done = deploy(box, "serve.max_model_len=1000", options=("--dry-run",))
    assert "serve.max_model_len  1200 -> 1000  restarts front and ranks" in done.stdout
    assert "a shadow would start" in done.stdout
    data = json.loads(deploy(box, "serve.concurrency=3", options=("--dry-run", "--json")).stdout)
    assert data["data"]["action"] == "shadow"
    assert data["data"]["changes"] == [
        {"key": "serve.concurrency", "running": "4", "wanted": "3", "restarts": "ALL"}
    ]
    assert box.processes() == before


@pytest.fixture(scope="module")
def damaged(box):
    """One tensor of the new checkpoint is damaged; the reference was recorded of the whole one."""
    ids, reference, damaged = (box.folder / n for n in ("ids", "reference", "damaged"))
    save_file({"input_ids": torch.arange(40).view(1, 40)}, ids)
    words = ("--checkpoint", box.folder / "tiny", "--input-ids", ids, "--prefill", 20)
    done = box.run("parity", "record", *words, "--out", reference)
    assert done.returncode == 0, done.stderr
    shutil.copytree(box.folder / "tiny", damaged)
    file = next(f for f in damaged.glob("*.safetensors") if "norm.weight" in load_file(f))
    tensors = load_file(file)
    save_file(tensors | {"norm.weight": 2 * tensors["norm.weight"]}, file, {"format": "pt"})
    return f"model.checkpoint={damaged}", f"model.reference={reference}"


def test_a_shadow_that_fails_its_canary_changes_nothing(box, damaged):
    before = box.processes()
    done = deploy(box, *damaged)
    assert done.returncode == 6, done.stderr
    assert f"canary: not as {box.folder / 'reference'}: " in done.stderr
    wait_for(lambda: box.processes() == before)
    assert [row["state"] for row in box.status()] == ["ready"]
    assert stream(box, 2, 5) == "length"


def test_twenty_streams_go_on_while_another_plan_takes_the_address(box):
    (old,) = pids(box)
    of_old = set(box.processes())
    with ThreadPoolExecutor(N_STREAMS) as pool:
        first = [pool.submit(stream, box, seed) for seed in range(N_STREAMS // 2)]
        upgrade = ThreadPoolExecutor(1).submit(deploy, box, "serve.max_model_len=1000")
        later = []
        while not upgrade.done():  # clients come all the time
            later += [pool.submit(stream, box, len(later), 20) for _ in range(2)]
            later[-1].result()
        later += [pool.submit(stream, box, seed, 20) for seed in range(N_STREAMS // 2)]
        assert upgrade.result().returncode == 0, upgrade.result().stderr
        assert {s.result() for s in [*first, *later]} == {"length"}
    assert len(first) + len(later) >= N_STREAMS
    assert "max_model_len is 1000" in refused_length(box)
    assert f"pid {old} finishes what it has" in upgrade.result().stderr
    wait_for(lambda: not of_old & set(box.processes()))
    assert [row["phase"] for row in box.status()] == ["serving"]
    assert pids(box) != [old]


def test_downtime_lets_running_requests_finish_and_says_how_long_it_was(box):
    (old,) = pids(box)
    with ThreadPoolExecutor(N_STREAMS) as pool:  # more than there is room for: they last a while
        running = [pool.submit(stream, box, seed, 400) for seed in range(N_STREAMS)]
        wait_for(lambda: box.status()[0]["running"])
        done = deploy(box, "serve.max_model_len=900", options=("--detach", "--replace", "downtime"))
        assert done.returncode == 0, done.stderr
        assert {r.result() for r in running} == {"length"}
    assert f"stopping pid {old}" in done.stderr
    assert "was down for " in done.stderr
    assert "max_model_len is 900" in refused_length(box)


def test_a_stop_that_led_nowhere_goes_back_to_what_served(box, damaged):
    served = refused_length(box)
    done = deploy(box, *damaged, options=("--detach", "--replace", "downtime"))
    assert done.returncode == 6, done.stderr
    assert f"canary: not as {box.folder / 'reference'}: " in done.stderr
    assert "laptop: gone back: ready: " in done.stderr
    assert [row["state"] for row in box.status()] == ["ready"]
    assert refused_length(box) == served


def test_after_a_kill_of_all_that_watches_a_deploy_starts_again(box):
    (pid,) = pids(box)
    os.kill(pid, signal.SIGKILL)
    assert box.left() == []  # front and ranks ended by themselves
    (row,) = box.status()
    assert (row["state"], row["pid"]) == ("lost", pid)
    done = deploy(box)
    assert done.returncode == 0, done.stderr
    assert [row["state"] for row in box.status()] == ["ready"]
    assert stream(box, 3, 3) == "length"
