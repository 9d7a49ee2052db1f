"""One plan in the place of another, with stand-in processes: no gap, and no kill that hurts."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import httpx
import pytest
from replacement_drill import STEPS, plan_of

from v4_ascend.deploy.replacement import change_settings, find_running
from v4_ascend.deploy.state import OTHER, find, folders, generations, lost
from v4_ascend.errors import DeployError

DRILL = Path(__file__).with_name("replacement_drill.py")


def wait_for(is_so, seconds=60):
    deadline = time.monotonic() + seconds
    while not (value := is_so()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


class Bench:
    """A state folder, a port, and what was started with them."""

    def __init__(self, folder):
        self.folder, self.started = folder, []
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self, how, concurrency, checkpoint="whole", kill=None):
        log = self.folder / f"{len(self.started)}.log"
        words = ["here", how, self.port, checkpoint, concurrency, *([kill] if kill else [])]
        with log.open("w") as out:
            process = subprocess.Popen([sys.executable, DRILL, *map(str, words)], stderr=out)
        process.log = log
        self.started.append(process)
        return process

    def serve(self, how, concurrency, **more):
        process = self.start(how, concurrency, **more)
        wait_for(lambda: ": ready: " in process.log.read_text() or process.poll() is not None)
        assert process.poll() is None, process.log.read_text()
        return process

    def concurrency(self):
        """Which plan answers."""
        return httpx.get(self.url, timeout=20).json()["concurrency"]

    def left(self):
        """What still runs of all that was started here."""
        found = []
        for p in Path("/proc").glob("[0-9]*/environ"):
            try:
                if (
                    str(self.folder).encode() in p.read_bytes()
                    and int(p.parent.name) != os.getpid()
                ):
                    found.append((p.parent / "cmdline").read_bytes())
            except OSError:
                continue
        return found

    def down(self):
        done = subprocess.run(
            [sys.executable, "-m", "v4_ascend", "down", "here"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def end(self):
        for process in self.started:
            process.kill()
            process.wait()
        wait_for(lambda: not self.left())


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / ("deep" * 20) / "state"))
    bench = Bench(tmp_path)
    yield bench
    bench.end()


class LongAnswer:
    """An answer that comes line by line until it is let end."""

    def __init__(self, bench):
        self.plans, self._enough = [], bench.folder / "enough"
        self._thread = Thread(target=self._read, args=(f"{bench.url}/until?{self._enough}",))
        self._thread.start()
        wait_for(lambda: self.plans)

    def _read(self, url):
        with httpx.stream("GET", url, timeout=60) as answer:
            for line in answer.iter_lines():
                self.plans.append(json.loads(line)["concurrency"])
            self.plans.append("whole")

    def end(self):
        self._enough.touch()
        self._thread.join()


class Clients:
    """Clients on connections of their own and on kept ones, all the time; every answer counts."""

    def __init__(self, url):
        self.url, self.answers, self.failures, self._on = url, [], [], True
        self._threads = [Thread(target=self._ask, args=(n,)) for n in (0, 0, 1, 1)]
        for thread in self._threads:
            thread.start()

    def _ask(self, n_kept):
        limits = httpx.Limits(max_keepalive_connections=n_kept)
        with httpx.Client(timeout=20, limits=limits) as client:
            while self._on:
                time.sleep(0.005)
                try:
                    answer = client.get(self.url)
                except httpx.HTTPError as e:
                    self.failures.append(repr(e))
                    continue
                if answer.status_code == 200:
                    self.answers.append(answer.json()["concurrency"])
                else:
                    self.failures.append(answer.status_code)

    def end(self):
        self._on = False
        for thread in self._threads:
            thread.join()


def test_a_shadow_takes_the_address_without_a_gap_and_the_old_one_finishes(bench):
    old = bench.serve("start", 4)
    long = LongAnswer(bench)
    clients = Clients(bench.url)
    time.sleep(0.3)
    new = bench.serve("shadow", 2)
    n = len(clients.answers)
    time.sleep(0.5)
    clients.end()
    assert clients.failures == []
    assert clients.answers[0] == 4
    assert set(clients.answers[n:]) == {2}  # in force for all, on kept connections too
    long.end()
    assert set(long.plans) == {4, "whole"}
    assert old.wait(timeout=30) == 0
    assert [s.pid for s in generations("here")] == [new.pid]
    assert find("here").folder.endswith(OTHER)
    assert bench.down() == "here: stopped\n"
    assert bench.left() == []


@pytest.mark.slow
def test_the_next_one_waits_for_the_one_that_finishes(bench):
    old = bench.serve("start", 4)
    long = LongAnswer(bench)
    bench.serve("shadow", 2)
    third = bench.start("shadow", 3)
    wait_for(lambda: f"waiting for pid {old.pid}, which was replaced" in third.log.read_text())
    long.end()
    wait_for(lambda: ": ready: " in third.log.read_text())
    assert set(long.plans) == {4, "whole"}
    assert bench.concurrency() == 3
    assert find("here").folder == str(folders("here")[0])


def test_a_shadow_whose_canary_fails_leaves_the_old_one_serving(bench):
    old = bench.serve("start", 4)
    new = bench.start("shadow", 2, checkpoint="broken")
    assert new.wait(timeout=60) != 0
    assert "DeployError: here: canary: prefill and decode differ; log: " in new.log.read_text()
    assert bench.concurrency() == 4
    assert [(s.pid, s.phase) for s in generations("here")] == [(old.pid, "serving")]
    assert lost("here") == []


def test_settings_of_the_front_are_changed_where_they_are(bench):
    bench.serve("start", 4)
    before = find("here")
    plan = plan_of("here", bench.port, "whole", 4).model_copy(update={"api_keys": ("k",)})
    running = find_running(plan)
    assert running.scope.name == "FRONT"
    change_settings(running, plan)
    assert httpx.get(bench.url).json()["keys"] == ["k"]
    assert find("here").digest == plan.digest
    assert (find("here").pid, find("here").inside) == (before.pid, before.inside)
    assert find_running(plan).scope.name == "NOTHING"
    with pytest.raises(DeployError, match="more has changed than settings of the front"):
        change_settings(running, plan_of("here", bench.port, "whole", 5))
    assert httpx.get(bench.url).json()["concurrency"] == 4


@pytest.mark.slow
def test_downtime_is_refused_to_nobody_who_waits_and_is_told(bench):
    old = bench.serve("start", 4)
    new = bench.serve("downtime", 2)
    assert old.wait(timeout=10) == 0
    assert bench.concurrency() == 2
    assert "here: was down for " in new.log.read_text()


def test_after_a_stop_that_led_nowhere_the_plan_before_serves_again(bench):
    bench.serve("start", 4)
    new = bench.start("downtime", 2, checkpoint="broken")
    wait_for(lambda: ": gone back: ready: " in new.log.read_text())
    said = new.log.read_text()
    assert "here: failed: here: canary: prefill and decode differ" in said
    assert "here: gone back: was down for " in said
    assert bench.concurrency() == 4
    assert [s.pid for s in generations("here")] == [new.pid]
    assert bench.down() == "here: stopped\n"
    assert new.wait(timeout=10) != 0
    assert "DeployError: here went back to the plan before: here: canary" in new.log.read_text()


@pytest.mark.slow
def test_who_starts_or_replaces_is_not_disturbed(bench):
    old = bench.serve("start", 4)
    os.kill(old.pid, signal.SIGSTOP)  # it answers nobody, and holds its folder
    shadow = bench.start("shadow", 2)
    time.sleep(1)
    wanted = plan_of("here", bench.port, "whole", 3)
    beside = wait_for(lambda: [s for s in generations("here") if s.pid == shadow.pid])
    assert beside[0].phase == "starting"
    with pytest.raises(DeployError, match=f"pid {shadow.pid} is starting beside pid {old.pid}"):
        find_running(wanted)
    os.kill(old.pid, signal.SIGCONT)
    wait_for(lambda: ": ready: " in shadow.log.read_text())


POINTS = [(h, f"{w}:{s}") for h, steps in STEPS.items() for s in steps for w in ("before", "after")]
SAMPLE = [("shadow", "before:_send_away"), ("downtime", "after:_stop_other")]
SLOW = [("shadow", "after:_start_front"), ("shadow", "after:_take_over"),
        ("downtime", "after:_take_address"), ("downtime", "before:_take_over")]  # fmt: skip


@pytest.mark.parametrize(
    ("how", "point"), [*SAMPLE, *(pytest.param(*p, marks=pytest.mark.slow) for p in SLOW)]
)
def test_a_kill_at_any_step_leaves_what_status_down_and_the_next_deploy_understand(
    bench, how, point
):
    killed_at(bench, how, point)  # all of them: all_kills.py


def killed_at(bench, how, point):
    old = bench.serve("start", 4)
    new = bench.start(how, 2, kill=point)
    assert new.wait(timeout=60) == -signal.SIGKILL, new.log.read_text()
    found = generations("here")
    assert [s.pid for s in found] in ([old.pid], [])
    if found and found[0].phase == "serving":
        # The killed one's front may take a client more before it sees that it is alone.
        wait_for(lambda: bench.concurrency() == 4)
        assert bench.serve("shadow", 3)
    else:  # the old one was sent away before
        wait_for(lambda: not bench.left())
        rows = json.loads(
            subprocess.run(
                [sys.executable, "-m", "v4_ascend", "status", "--json"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )["data"]
        assert [r["state"] for r in rows] in (["lost"], [])
        assert bench.serve("start", 3)
    assert bench.concurrency() == 3
    assert "here: stopped" in bench.down()
    assert lost("here") == []
