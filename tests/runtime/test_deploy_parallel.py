"""Four ranks behind one front: the answers of one process, faults named, nothing left behind."""

import fcntl
import json
import os
import re
import signal
import time

import httpx
import pytest
from test_deploy import ASK, Box, _of, _workers, free_port, wait_for

from v4_ascend.config.model import ModelConfig
from v4_ascend.config.presets import preset_path
from v4_ascend.deploy.logs import Logs
from v4_ascend.supernode.experts import ExpertLoad

TINY = ModelConfig.read(preset_path("tiny"))
LAYOUT = "layout={pp_size: 2, dp_size: 2, ep_size: 2}"
DEVICES = "cluster.supernodes=[{name: here, hosts: [localhost], devices_per_host: 4}]"


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    box = Box(tmp_path_factory.mktemp("four"))
    done = box.run("init", "--preset", "tiny", "--format", "fp32", "--out", box.folder / "tiny")
    assert done.returncode == 0, done.stderr
    return box


def ask(box, seed, **changes):
    body = ASK | {"seed": seed, "max_tokens": 12, **changes}
    return httpx.post(f"{box.url}/v1/chat/completions", json=body, timeout=120)


def text(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


LONG = {"max_tokens": 40, "temperature": 0.7}


@pytest.fixture(scope="module")
def of_one(box):
    """What one rank answers: short texts by seed, and long ones."""
    one = box.run("deploy", "--topology", box.topology, "--detach")
    assert one.returncode == 0, one.stderr
    short = [text(ask(box, seed)) for seed in range(6)]
    long = [text(ask(box, seed, **LONG)) for seed in range(3)]
    assert box.run("down", "laptop").returncode == 0
    return short, long


def test_four_ranks_answer_as_one_does_and_survive_each_others_deaths(box, of_one):
    want, _ = of_one
    options = ("--set", LAYOUT, "--set", DEVICES, "--set", "serve.concurrency=6")
    four = box.run("deploy", "--topology", box.topology, *options, "--detach")
    assert four.returncode == 0, four.stderr
    try:
        assert [text(ask(box, seed)) for seed in range(6)] == want
        (row,) = box.status("laptop")
        assert [
            r["what"].partition(", here")[0].partition(", localhost")[0] for r in row["ranks"]
        ] == [
            "rank 0 (stage 0, layers 0 to 2, experts 0 to 3",
            "rank 1 (stage 0, layers 0 to 2, experts 4 to 7",
            "rank 2 (stage 1, layers 3 to 5, experts 0 to 3",
            "rank 3 (stage 1, layers 3 to 5, experts 4 to 7",
        ]
        ranks = [r["pid"] for r in row["ranks"]]
        assert ranks == sorted(_workers(box))
        assert_expert_load(box)
        os.kill(ranks[3], signal.SIGKILL)
        lost = wait_for(lambda: (a := ready(box)).status_code == 503 and a.json())
        assert lost["reason"].startswith("rank 3 (stage 1, ")
        assert f"ended (pid {ranks[3]})" in lost["reason"]
        wait_for(lambda: ready(box).status_code == 200, seconds=60)
        flight = [
            line for line in box.run("logs", "laptop").stdout.splitlines() if "flight: " in line
        ]
        assert lost["reason"] in flight[0]
        assert [line.split(":")[1].split()[:2] for line in flight[1:]] == [
            ["rank", str(rank)] for rank in range(4)
        ]
        last = r"last operator \w+, last dispatch of rows \[\d+, 128\] with choices \[\d+, 2\]"
        assert all(re.search(last, line) for line in flight[1:]), flight
        assert [text(ask(box, seed)) for seed in range(6)] == want
        stopped = box.status("laptop")[0]["ranks"][1]["pid"]
        os.kill(stopped, signal.SIGSTOP)
        began = time.monotonic()
        named = wait_for(lambda: (r := ready(box).json()["reason"]) and r, seconds=20)
        assert f"(pid {stopped})" in named
        assert "has not answered" in named
        assert time.monotonic() - began < 10
        os.kill(stopped, signal.SIGCONT)
        assert [text(ask(box, seed)) for seed in range(2)] == want[:2]
    finally:
        assert box.run("down", "laptop").returncode == 0
    assert box.left() == []
    assert _of(box) == []


def test_ranks_that_draft_answer_as_one_does_that_does_not(box, of_one):
    _, want = of_one
    layout = "layout={cp_size: 2, tp_size: 2, ep_size: 4}"  # CP runs where it is asked for
    options = ("--set", layout, "--set", DEVICES, "--set", "serve.n_draft_tokens=2")
    four = box.run("deploy", "--topology", box.topology, *options, "--detach")
    assert four.returncode == 0, four.stderr
    try:
        assert [text(ask(box, seed, **LONG)) for seed in range(3)] == want
        assert counter(box, "vllm:spec_decode_num_draft_tokens_total") > 60
        assert text(ask(box, 2, **LONG)) == want[2]
        for group in ("cp", "tp", "ep"):
            assert exchanged(box, "sent_bytes", group) > 0
            assert exchanged(box, "waited_seconds", group) > 0
    finally:
        assert box.run("down", "laptop").returncode == 0


def exchanged(box, what, group):
    labels = f'group="{group}",model_name="v4-tiny",stage="0"'
    name = f"v4_ascend_{what}_total{{{labels}}}"
    found = [n for n in httpx.get(f"{box.url}/metrics").text.splitlines() if n.startswith(name)]
    return float(found[0].split()[-1])


def counter(box, name):
    (line,) = [
        line
        for line in httpx.get(f"{box.url}/metrics").text.splitlines()
        if line.startswith(name + "{")
    ]
    return float(line.split()[-1])


def assert_expert_load(box):
    """Counters of all ranks together are what `plan --expert-load` reads."""

    def counted():
        text(ask(box, 1))
        load = httpx.get(f"{box.url}/experts").text
        return load if all(map(any, json.loads(load)["counts"])) else None

    file = box.folder / "load.json"
    file.write_text(wait_for(counted))
    ExpertLoad.read(file, TINY)


def ready(box):
    return httpx.get(f"{box.url}/ready", timeout=10)


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ((), 2, "launcher: 2 hosts need ssh; local is for one"),
        (("launcher=ssh",), 2, "model.checkpoint: tiny is relative; several hosts need a path"),
        (("launcher=kubernetes",), 2, "tiny is relative; containers need a path from /"),
        (("launcher=ssh", "model.checkpoint=/"), 6, "198.51.100.1) is no address of this machine"),
    ],
)
def test_hosts_that_cannot_be_are_refused_before_anything_starts(box, changes, code, says):
    two = "cluster.supernodes=[{name: a, hosts: [198.51.100.1, 198.51.100.2]}]"
    checkpoint = f"model.checkpoint={box.folder / 'tiny' if code == 6 else 'tiny'}"
    options = [o for c in (two, *changes, checkpoint) for o in ("--set", c)]
    done = box.run("deploy", "--topology", box.topology, *options, "--port", free_port())
    assert (done.returncode, says in done.stderr) == (code, True), done.stderr
    assert box.left() == []


def test_a_deployment_that_another_process_is_starting_is_left_alone(box):
    folder = box.folder / "state/v4-ascend/laptop"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = box.run("deploy", "--topology", box.topology, "--port", free_port())
    assert (done.returncode, done.stdout) == (6, "")
    assert "laptop: another process is deploying it" in done.stderr


def test_logs_of_one_rank_and_as_they_are_written(box, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(box.folder / "state"))
    options = ("--set", LAYOUT, "--set", DEVICES, "--dry-run")
    plan = box.run("deploy", "--topology", box.topology, *options, "--set", "name=logged").stdout
    folder = box.folder / "state/v4-ascend/logged"
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(plan)
    (folder / "ranks.log").write_text("[0]: from rank 0\n[3]: from rank 3\ntorchrun's own\n[3]: ha")
    assert box.run("logs", "logged", "--rank", 3).stdout == "rank 3: from rank 3\n"
    logs = Logs("logged")
    assert list(logs.lines()) == [
        "rank 0: from rank 0",
        "rank 3: from rank 3",
        "ranks: torchrun's own",
    ]
    with (folder / "ranks.log").open("a") as f:
        f.write("lf a line\n")
    assert list(logs.follow()) == ["rank 3: half a line"]
    refused = box.folder / "state/v4-ascend/refused"  # before there was a plan
    refused.mkdir()
    (refused / "supervisor.log").write_text("error: port 80\n")
    assert list(Logs("refused").lines()) == ["supervisor: error: port 80"]
    wrong = box.run("logs", "logged", "--rank", 4)
    assert (wrong.returncode, "--rank: 4; logged has ranks 0 to 3" in wrong.stderr) == (2, True)


@pytest.mark.slow
def test_the_shipped_supernode_is_emulated_and_answers(tmp_path):
    box = Box(tmp_path)
    options = ("--emulate", "16", "--set", f"serve.port={box.port}", "--detach")
    done = box.run("deploy", "--topology", "supernode", *options, timeout=400)
    assert done.returncode == 0, done.stderr
    try:
        lines = [line for line in done.stderr.splitlines() if " stands for rank " in line]
        assert len(lines) == 16
        assert "rank 1 stands for rank 4 on sp0-host0: stage 0, layers 0 to 60" in lines[1]
        assert "of 96 GB before any context (modelled)" in lines[1]
        assert text(ask(box, 1, model="v4-pro-emulated"))
    finally:
        assert box.run("down", "supernode").returncode == 0
    assert box.left() == []
