"""Who runs a deployment, told from processes: whoever is gone does not count."""

import os
import subprocess
import time

import pytest

from v4_ascend.deploy.state import (
    FILE,
    LOCK,
    Supervisor,
    find,
    folders,
    generations,
    latest,
    lost,
    names,
    running,
    start_time,
    vacant,
)


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


@pytest.fixture
def sleeper():
    with subprocess.Popen(["sleep", "100"]) as process:
        yield process
        process.kill()


def announce(folder, pid, phase="serving", name="one"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOCK).touch()
    url = "http://127.0.0.1:1"
    Supervisor(name, pid, start_time(pid) or 0, url, "d", "m", phase=phase).write(folder)


def test_who_serves_is_asked_first_whichever_folder_it_has(sleeper):
    first, second = folders("one")
    announce(first, sleeper.pid, "ending")
    announce(second, os.getpid(), "serving")
    assert [s.phase for s in generations("one")] == ["serving", "ending"]
    assert (find("one").folder, names()) == (str(second), ["one"])
    assert [s.pid for s in running()] == [os.getpid()]
    announce(second, os.getpid(), "starting")
    announce(first, sleeper.pid, "serving")
    assert find("one").pid == sleeper.pid


def test_of_two_that_serve_the_newer_one_is_asked(sleeper):
    first, second = folders("one")
    announce(first, os.getpid())
    announce(second, sleeper.pid)  # it was started later
    assert find("one").pid == sleeper.pid
    assert latest("one") == second


def test_who_is_gone_is_lost_until_forgotten(sleeper):
    first, second = folders("one")
    announce(first, sleeper.pid)
    announce(second, os.getpid())
    sleeper.kill()
    sleeper.wait()
    assert [s.pid for s in generations("one")] == [os.getpid()]
    (gone,) = lost("one")
    assert gone.pid == sleeper.pid
    gone.forget()
    assert not (first / FILE).exists()
    assert lost("one") == []


def test_a_start_takes_the_folder_that_nobody_runs_in():
    first, second = folders("one")
    assert vacant("one") == first
    announce(first, os.getpid())
    assert vacant("one") == second
    announce(second, os.getpid())
    (first / FILE).unlink()
    assert vacant("one") == first


def test_a_start_keeps_away_from_what_a_lost_one_may_be_ending(sleeper):
    first, second = folders("one")
    announce(first, sleeper.pid)
    sleeper.kill()
    sleeper.wait()
    assert vacant("one") == second
    announce(second, os.getpid())
    assert vacant("one") == first


def test_logs_of_what_has_ended_are_those_of_the_last_start():
    first, second = folders("one")
    assert latest("one") == first
    for folder in (first, second):
        folder.mkdir(parents=True)
        (folder / LOCK).touch()
    os.utime(first / LOCK, (time.time() - 60,) * 2)
    assert latest("one") == second


def test_a_file_of_an_earlier_version_is_read():
    first, _ = folders("one")
    announce(first, os.getpid())
    text = (first / FILE).read_text()
    for field in ("phase", "inside", "version", "folder"):
        assert f'"{field}"' in text
    old = text[: text.index(', "phase"')] + "}"
    (first / FILE).write_text(old)
    assert (find("one").phase, find("one").version) == ("serving", "")
