"""Hosts that find each other without ssh: who takes part, who does not, and who is lost."""

import os
import re
import socket
import time

import pytest

from v4_ascend.cli.host import host_command
from v4_ascend.config.model import ModelConfig
from v4_ascend.config.presets import preset_path
from v4_ascend.config.topology import load_topology
from v4_ascend.deploy import pod, rollcall
from v4_ascend.deploy.rollcall import Call, Go, Over, RollCall, Wait, read_secret
from v4_ascend.errors import ConfigError, DeadlineError, DeployError, PortInUseError
from v4_ascend.supernode.planning import deploy_plan

SECRET = "0123456789abcdef" * 2
LINK = {"url": "tcp://10.0.0.1:1", "public_key": "k", "secret": "s"}
TOPOLOGY = """\
name: two
cluster:
  device: cpu
  supernodes: [{name: s, hosts: [host-a, host-b]}]
model: {checkpoint: /models/tiny, name: v4-tiny}
serve: {max_model_len: 1200, concurrency: 4, port: 8000}
layout: {pp_size: 2}
launcher: docker
"""


def free_port():
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


@pytest.fixture
def plan(tmp_path):
    file = tmp_path / "t.yaml"
    file.write_text(TOPOLOGY)
    return deploy_plan(load_topology(str(file)), ModelConfig.read(preset_path("tiny")))


@pytest.fixture
def first(plan):
    call = RollCall(plan, free_port(), SECRET)
    yield call
    call._here.clear()  # nobody is left to be told
    call.close()


@pytest.fixture
def make(plan, first):
    """Make callers of the first host."""
    made = []

    def caller(plan=plan, host="host-b", secret=SECRET):
        made.append(Call(plan, host, "127.0.0.1", first._port, secret))
        return made[-1]

    yield caller
    for call in made:
        call.close()


def answer(call, **words):
    """Say and hear until there is an answer to just that."""
    call._said = 0.0
    call.say(**words)
    return call.hear(5)


def test_all_are_waited_for_then_told_what_their_ranks_need(first, make):
    assert first.missing() == ["host-b"]
    b = make()
    assert answer(b) == Wait()
    assert (first.missing(), first.problem()) == ([], None)
    assert first.machines() == [f"host-b is {socket.gethostname()}"]
    first.go(LINK, "10.0.0.1:2")
    assert answer(b) == Go(LINK, "10.0.0.1:2")
    first.over("host-a: out of memory")
    assert answer(b) == Over("host-a: out of memory")


def test_who_has_another_secret_is_not_heard_and_told_why(first, make):
    stranger = make(secret="f" * 32)
    stranger.say()
    assert stranger.hear(0.5) is None
    assert stranger.why_silent() == "it takes connections: its secret is another"
    assert first.missing() == ["host-b"]


def test_a_port_where_nobody_listens_is_told_from_that(plan):
    call = Call(plan, "host-b", "127.0.0.1", free_port(), SECRET)
    assert call.why_silent() == "Connection refused"
    call.close()


def test_another_plan_another_version_and_another_host_are_refused(first, make, plan, monkeypatch):
    other = plan.model_copy(update={"port": 1})
    want = f"plan {other.digest[:12]} at host-b, {plan.digest[:12]} at host-a"
    assert answer(make(plan=other)) == Over(want)
    assert answer(make(host="host-x")) == Over("host-x: the other hosts of the plan are host-b")
    monkeypatch.setattr(rollcall, "__version__", "9.9")
    newer = make()
    monkeypatch.undo()
    assert answer(newer).failure.startswith("v4-ascend 9.9 at host-b, ")
    assert first.missing() == ["host-b"]


def test_who_starts_again_while_others_are_waited_for_is_welcome_and_later_it_is_not(first, make):
    answer(make())
    again = make()
    assert answer(again) == Wait()
    first.go(LINK, "e")
    third = make()
    assert answer(third) == Over("host-a is still of an earlier start; it ends")
    assert first.problem().endswith("was started again")


def test_who_leaves_or_ends_is_named_once_it_matters(first, make):
    b = make()
    assert answer(b, ended="was stopped") == Wait()
    assert (first.missing(), first.problem()) == (["host-b"], None)
    answer(b)
    first.go(LINK, "e")
    answer(b, leaving="is being stopped")
    machine = socket.gethostname()
    assert first.problem() == f"host-b ({machine}) is being stopped"
    answer(b, ended="ended: ranks ended with exit code 1")
    assert first.problem() == f"host-b ({machine}) is being stopped"


def test_who_is_silent_is_lost(first, make, monkeypatch):
    answer(make())
    monkeypatch.setattr(rollcall, "GIVE_UP_SECONDS", 0.2)
    first.go(LINK, "e")
    time.sleep(0.3)
    assert first.missing() == ["host-b"]
    assert first.problem() == f"host-b ({socket.gethostname()}) is lost: no word for 0.2 s"


def test_a_taken_port_is_said_before_anything_starts(first, plan):
    with pytest.raises(PortInUseError, match=f"port {first._port} "):
        RollCall(plan, first._port, SECRET)


def test_a_name_that_does_not_resolve_is_waited_for_and_named(plan):
    said = []
    host = pod.OtherHost(plan, 1, "no-such-host.invalid", 1, SECRET, said.append, 0)
    with pytest.raises(DeadlineError, match=r"no-such-host\.invalid did not resolve within 0 s"):
        host.run(0)


def other_host(plan, first, said):
    return pod.OtherHost(plan, 1, "127.0.0.1", first._port, SECRET, said.append, 0)


def test_ranks_end_with_a_reason_when_the_first_host_is_lost(plan, first, monkeypatch):
    """The first host goes silent once the ranks run: they end, and the process with a reason."""
    monkeypatch.setattr(pod, "GIVE_UP_SECONDS", 0.5)
    monkeypatch.setattr(pod, "ranks_of", lambda *a: (["sleep", "1000"], dict(os.environ)))
    first.go(LINK, "e")
    host = other_host(plan, first, said := [])
    follow = host._follow
    ran = []

    def silent(call, go, ranks):
        ran.append(ranks)
        first._closing.set()
        follow(call, go, ranks)

    host._follow = silent
    with pytest.raises(DeployError, match=r"host-b: 127\.0\.0\.1 is lost: no word for 0.5 s"):
        host.run(10)
    assert said[-1] == "host-b: starting ranks"
    assert ran[0].poll() is not None


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (lambda c: c.over("host-a: out of memory"), "told to end: host-a: out of memory"),
        (lambda c: c.go(LINK, "another"), "127.0.0.1 was started again"),
    ],
)
def test_ranks_end_as_the_first_host_says(plan, first, monkeypatch, changed, says):
    monkeypatch.setattr(pod, "ranks_of", lambda *a: (["sleep", "1000"], dict(os.environ)))
    first.go(LINK, "e")
    host = other_host(plan, first, [])
    follow = host._follow
    host._follow = lambda call, go, ranks: (changed(first), follow(call, go, ranks))
    with pytest.raises(DeployError, match=says):
        host.run(10)


def test_ranks_that_end_are_told_to_the_first_host(plan, first, monkeypatch):
    monkeypatch.setattr(pod, "ranks_of", lambda *a: (["sh", "-c", "exit 3"], dict(os.environ)))
    first.go(LINK, "e")
    with pytest.raises(DeployError, match="host-b: ranks ended with exit code 3"):
        other_host(plan, first, []).run(10)
    deadline = time.monotonic() + 5
    while first.problem() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert first.problem().endswith(" ended: host-b: ranks ended with exit code 3")


def test_a_secret_is_for_its_owner_and_long_enough(tmp_path):
    file = tmp_path / "secret"
    with pytest.raises(ConfigError, match="cannot be read"):
        read_secret(file)
    file.write_text(SECRET + "\n")
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="mode 644: a secret is its owner's; chmod 600"):
        read_secret(file)
    file.chmod(0o640)  # as Kubernetes mounts it for a group
    assert read_secret(file) == SECRET
    file.write_text("short")
    with pytest.raises(ConfigError, match="a secret of 5 bytes; 16 at least"):
        read_secret(file)


def test_what_a_host_is_not_told_is_asked_for(plan, tmp_path):
    file, secret = tmp_path / "plan.json", tmp_path / "secret"
    plan.write(file)
    secret.touch(0o600)
    secret.write_text(SECRET)
    for options, says in (
        ({"index": 2}, f"--index: 2; {file} has hosts 0 to 1"),
        ({"index": 1}, f"--secret: missing; the 2 hosts of {file} share one"),
        ({"index": 1, "secret": secret}, "--first: missing; host 1 looks for the first one"),
    ):
        with pytest.raises(ConfigError, match=f"^{re.escape(says)}$"):
            host_command(file, **options)
