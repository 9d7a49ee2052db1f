"""A real deployment of a tiny model: the API through the openai client, faults, and its end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest

from v4_ascend.runtime.orders import ORDERS

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Box:
    """One folder with a checkpoint, a topology file and a state of its own."""

    def __init__(self, folder):
        self.folder, self.port = folder, free_port()
        self.env = os.environ | {"XDG_STATE_HOME": str(folder / "state"), "OMP_NUM_THREADS": "1"}
        self.env["OPENBLAS_NUM_THREADS"] = "2"  # so that importing numpy starts a thread
        self.topology = folder / "t.yaml"
        text = (ROOT / "configs/topology/laptop.yaml").read_text()
        text = text.replace(".demo/tiny", str(folder / "tiny")).replace("8000", str(self.port))
        self.topology.write_text(text.replace("max_model_len: 2048", "max_model_len: 1200"))

    def run(self, *args, timeout=120):
        command = [sys.executable, "-m", "v4_ascend", *map(str, args)]
        return subprocess.run(
            command, capture_output=True, text=True, env=self.env, timeout=timeout, check=False
        )

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def status(self, *name):
        return json.loads(self.run("status", *name, "--json").stdout)["data"]

    def left(self):
        """Command lines of what still runs, once what is ending has had its time to end."""
        deadline = time.monotonic() + 10
        while (pids := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [cmdline(pid).replace(b"\0", b" ").decode() for pid in pids]

    def processes(self):
        """Pids of everything that mentions our state folder."""
        found = []
        for p in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if str(self.folder).encode() in p.read_bytes():
                    found.append(int(p.parent.name))
            except OSError:
                continue
        return found


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    box = Box(tmp_path_factory.mktemp("box"))
    done = box.run("init", "--preset", "tiny", "--format", "fp32", "--out", box.folder / "tiny")
    assert done.returncode == 0, done.stderr
    return box


@pytest.fixture(scope="module")
def served(box):
    done = box.run("deploy", "--topology", box.topology, "--detach")
    assert done.returncode == 0, done.stderr
    assert "ready" in done.stderr
    yield box
    assert box.run("down", "laptop").returncode == 0
    assert box.left() == []


def test_no_thread_of_the_front_is_ended_by_an_order(served):
    """Libraries start threads at import, and a signal goes to any that has not blocked it."""
    (front,) = [p for p in served.processes() if b"runtime.front" in cmdline(p)]
    orders = sum(1 << (order - 1) for order in ORDERS)
    tasks = list(Path(f"/proc/{front}/task").iterdir())
    assert len(tasks) > 1
    for task in tasks:
        blocked = re.search(r"^SigBlk:\s*(\w+)", (task / "status").read_text(), re.M)[1]
        assert int(blocked, 16) & orders == orders, task.name


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


ASK = {"model": "v4-tiny", "messages": [{"role": "user", "content": "hi"}], "seed": 3}


def text_of(stream):
    parts = [c.choices[0].delta.content or "" for c in stream if c.choices]
    return "".join(parts)


def test_ready_says_how_it_was_checked(served):
    ready = httpx.get(f"{served.url}/ready").json()
    assert (ready["state"], ready["canary"]) == ("ready", "unreferenced")
    assert httpx.get(f"{served.url}/health").status_code == 200
    assert [row["name"] for row in served.status()] == ["laptop"]


def test_models(client):
    assert [m.id for m in client.models.list()] == ["v4-tiny"]


def test_a_seed_gives_the_same_answer_streamed_or_not_alone_or_not(client):
    whole = client.chat.completions.create(**ASK, max_tokens=20)
    streamed = text_of(client.chat.completions.create(**ASK, max_tokens=20, stream=True))
    several = client.chat.completions.create(**ASK, max_tokens=20, n=3)
    assert whole.choices[0].message.content == streamed
    assert several.choices[0].message.content == streamed
    assert len({c.message.content for c in several.choices}) > 1
    assert whole.usage.completion_tokens <= 20
    assert whole.choices[0].finish_reason in ("stop", "length")


def test_logprobs(client):
    answer = client.chat.completions.create(
        **ASK, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    for entry in answer.choices[0].logprobs.content:
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob)
        assert len(entry.top_logprobs) == 2


def test_tools_and_thinking_are_accepted(client):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    plain = client.chat.completions.create(**ASK, max_tokens=2)
    asked = client.chat.completions.create(**ASK, max_tokens=2, tools=[tool])
    thinking = client.chat.completions.create(**ASK, max_tokens=2, reasoning_effort="high")
    assert asked.usage.prompt_tokens > plain.usage.prompt_tokens
    assert thinking.usage.prompt_tokens == plain.usage.prompt_tokens


def test_sampling_rules_hold_streamed_in_a_batch_and_alone(client):
    rules = {"top_k": 8, "min_p": 0.01, "repetition_penalty": 1.2, "min_tokens": 5}
    ask = ASK | {"presence_penalty": 0.5, "frequency_penalty": 0.5, "extra_body": rules}
    alone = client.chat.completions.create(**ask, max_tokens=12)
    several = client.chat.completions.create(**ask, max_tokens=12, n=4)
    assert alone.choices[0].message.content == several.choices[0].message.content


def test_a_bias_decides_and_ignore_eos_goes_on(client):
    ask = ASK | {"max_tokens": 6, "temperature": 1}
    one = client.chat.completions.create(**ask, logit_bias={"90": 100})
    assert len(set(one.choices[0].message.content)) == 1
    end = client.chat.completions.create(**ask, logit_bias={"1": 100})
    assert (end.usage.completion_tokens, end.choices[0].finish_reason) == (1, "stop")
    on = client.chat.completions.create(
        **ask, logit_bias={"1": 100}, extra_body={"ignore_eos": True}
    )
    assert (on.usage.completion_tokens, on.choices[0].finish_reason) == (6, "length")


def test_completions(client):
    done = client.completions.create(model="v4-tiny", prompt="abc", max_tokens=4, logprobs=1)
    assert done.usage.prompt_tokens == 4
    assert len(done.choices[0].logprobs.tokens) == done.usage.completion_tokens


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"model": "gpt"}, 404, "model 'gpt' is not served here; 'v4-tiny' is"),
        ({"temperature": 3}, 400, "temperature: .* 2, got 3"),
        ({"messages": []}, 400, "messages: "),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages"),
        (
            {"messages": [{"role": "user", "content": "x" * 1300}]},
            400,
            "13.. tokens, max_model_len is 1200",
        ),
        ({"tool_choice": "required"}, 400, "tool_choice: 'required' needs tools"),
        ({"frequency_penalty": 2.5}, 400, "frequency_penalty: .* 2, got 2.5"),
        ({"min_p": -0.1}, 400, "min_p: .* 0, got -0.1"),
        ({"top_k": -2}, 400, "top_k: .* -1, got -2"),
        ({"repetition_penalty": 0}, 400, "repetition_penalty: .* 0, got 0"),
        ({"logit_bias": {"9999999": 1}}, 400, "logit_bias: token 9999999 is not in 0..[0-9]+"),
        ({"logit_bias": {"5": 101}}, 400, "logit_bias.5: .* 100, got 101"),
        ({"min_tokens": 3, "max_tokens": 2}, 400, "min_tokens: 3 is more .* 2"),
        ({"stop": ["a"] * 5}, 400, "at most 4"),
        ({"n": 0}, 400, "n: "),
        ({"no_such_thing": 1}, 400, "no_such_thing"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_bad_requests_get_an_openai_error(served, change, status, says):
    import re

    answer = httpx.post(f"{served.url}/v1/chat/completions", json=ASK | change)
    assert answer.status_code == status
    assert re.search(says, answer.json()["error"]["message"])


def test_an_unknown_path_is_an_openai_error_too(served):
    answer = httpx.get(f"{served.url}/v1/nothing")
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "not_found_error"


def test_malformed_json_is_a_400(served):
    answer = httpx.post(f"{served.url}/v1/chat/completions", content=b"{")
    assert answer.status_code == 400
    assert "not JSON" in answer.json()["error"]["message"]


def test_deploying_the_same_plan_again_changes_nothing(served):
    before = served.processes()
    done = served.run("deploy", "--topology", served.topology, "--detach")
    assert (done.returncode, served.processes()) == (0, before)
    assert "runs already" in done.stdout


def test_a_port_in_use_is_refused_before_anything_starts(served):
    done = served.run("deploy", "--topology", served.topology, "--set", "name=other")
    assert done.returncode == 4
    assert f"port {served.port}" in done.stderr
    assert "held by pid" in done.stderr


def test_a_rank_that_dies_is_named_and_started_again(box, tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "v4_ascend", "deploy", "--topology", str(box.topology)]
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(
            [*command, "--set", "name=mortal", "--port", str(port)], env=box.env, stderr=out
        )
    try:
        wait_for(lambda: "ready: " in (tmp_path / "out").read_text())
        (rank,) = _workers(box, b"mortal")
        os.kill(rank, signal.SIGKILL)
        url = f"http://127.0.0.1:{port}/ready"
        lost = wait_for(lambda: (a := httpx.get(url)).status_code == 503 and a.json())
        assert lost["reason"].startswith("rank 0 (stage 0, layers 0 to 5, experts 0 to 7, ")
        assert lost["reason"].endswith(f"ended (pid {rank})")
        wait_for(lambda: httpx.get(url).status_code == 200, seconds=60)
        for pid in _of(box, b"torch.distributed.run", b"mortal"):
            os.kill(pid, signal.SIGKILL)
        assert process.wait(timeout=60) == 6
        assert "mortal" in (tmp_path / "out").read_text()
    finally:
        process.kill()
        process.wait()


def test_ctrl_c_lets_a_running_answer_finish(box, tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "v4_ascend", "deploy", "--topology", str(box.topology)]
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(
            [*command, "--set", "name=drained", "--port", str(port)], env=box.env, stderr=out
        )
    try:
        wait_for(lambda: "ready: " in (tmp_path / "out").read_text())
        body = ASK | {"stream": True, "max_tokens": 300, "seed": 1}
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            refused = wait_for(lambda: _refusal(url))
            rest = list(lines)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert "draining" in refused.json()["error"]["message"]
        assert rest[-2:] == ["data: [DONE]", ""] or "data: [DONE]" in rest
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()


def test_what_does_not_end_in_the_drain_timeout_is_told_so(box, tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "v4_ascend", "deploy", "--topology", str(box.topology)]
    command += ["--set", "name=hasty", "--port", str(port), "--drain-timeout", "0.3"]
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(command, env=box.env, stderr=out)
    try:
        wait_for(lambda: "ready: " in (tmp_path / "out").read_text())
        body = ASK | {"stream": True, "max_tokens": 1000, "seed": 1}
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            (last,) = [line for line in lines if "error" in line]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["message"] == "stopped; 0.3 s for the rest are over"
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()


def _refusal(url):
    answer = httpx.post(url, json=ASK | {"max_tokens": 1}, timeout=60)
    return answer if answer.status_code != 200 else None


def test_a_client_that_leaves_frees_its_slot(served):
    """As many as there are slots ask for a long answer and leave; the next is served at once."""
    body = ASK | {"max_tokens": 1000, "seed": 1}
    url = f"{served.url}/v1/chat/completions"
    for _ in range(16):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body, timeout=httpx.Timeout(5, read=0.3))
    start = time.monotonic()
    assert httpx.post(url, json=ASK | {"max_tokens": 2}, timeout=60).status_code == 200
    assert time.monotonic() - start < 5


def test_a_rank_does_not_outlive_torchrun(box, tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "v4_ascend", "deploy", "--topology", str(box.topology)]
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(
            [*command, "--set", "name=orphan", "--port", str(port)], env=box.env, stderr=out
        )
    try:
        wait_for(lambda: _of(box, b"runtime.worker", b"orphan"))
        # torchrun's own command line names the worker too; the child is the one that has not.
        for pid in _of(box, b"torch.distributed.run", b"orphan"):
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not _of(box, b"runtime.worker", b"orphan"), seconds=10)
        assert process.wait(timeout=60) == 6
    finally:
        process.kill()
        process.wait()


def _workers(box, *parts):
    """The ranks; torchrun's own command line names the worker too."""
    return [p for p in _of(box, b"runtime.worker", *parts) if b"distributed.run" not in cmdline(p)]


def _of(box, *parts):
    return [p for p in box.processes() if all(part in cmdline(p) for part in parts)]


def cmdline(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def wait_for(is_so, seconds=60):
    deadline = time.monotonic() + seconds
    while not (value := is_so()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return value
