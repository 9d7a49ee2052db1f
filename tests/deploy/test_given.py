"""Deployments given to docker and Kubernetes, with stand-ins: see stand_in_orchestrators.py."""

import json
import stat
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from v4_ascend.cli.app import app
from v4_ascend.deploy.containers import bringing_up

STAND_IN = Path(__file__).with_name("stand_in_orchestrators.py")
HOSTS = ("127.0.0.1", "host-b.example")  # this machine, and one that `ssh` is asked for


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A PATH with the stand-ins and an `ssh` that stays here; a state folder; an empty cluster."""
    bin_, cluster = tmp_path / "bin", tmp_path / "cluster"
    for folder in (bin_, cluster):
        folder.mkdir()
    lines = {x: f'exec {sys.executable} {STAND_IN} {x} "$@"' for x in ("kubectl", "docker")}
    # ssh OPTIONS -- HOST COMMAND: files of the other host come to a folder of their own.
    lines["ssh"] = (
        'while [ "$1" != -- ]; do shift; done; case "$3" in *tar*) '
        f'cat > {cluster}/sent.tar;; *) exec sh -c "$3";; esac'
    )
    for name, line in lines.items():
        (bin_ / name).write_text(f"#!/bin/sh\n{line}\n")
        (bin_ / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("STAND_IN_CLUSTER", str(cluster))
    monkeypatch.setattr(bringing_up, "POLL_SECONDS", 0.05)
    return tmp_path


def topology(folder, launcher, **changes):
    wanted = {
        "name": "it",
        "cluster": {
            "device": "cpu",
            "supernodes": [{"name": "s", "hosts": list(HOSTS), "devices_per_host": 1}],
        },
        "model": {"checkpoint": "/models/it", "name": "v4-tiny"},
        "serve": {"max_model_len": 1024, "concurrency": 4, "host": "0.0.0.0", "api_keys": ["mine"]},
        "layout": {"pp_size": 2},
        "launcher": launcher,
        "container": {"image": "registry/v4:1"},
    } | changes
    file = folder / "it.yaml"
    file.write_text(yaml.safe_dump(wanted))
    return str(file)


def run(*words):
    return CliRunner().invoke(app, list(words))


def deploy(file, *words):
    return run("deploy", "--topology", file, *words)


def objects(place):
    return sorted(f.stem for f in (place / "cluster").glob("*.json"))


def told(place, verb):
    lines = (place / "cluster/told").read_text().splitlines()
    return [words for line in lines if verb in (words := json.loads(line))]


def test_kubernetes_is_given_asked_changed_and_taken_back(place):
    file = topology(place, "kubernetes")
    (place / "cluster/Service-other.json").write_text("{}")
    done = deploy(file)
    assert done.exit_code == 0, done.output
    assert "it: ready: http://it-api.default:8000/v1, model v4-tiny" in done.stderr
    assert objects(place) == ["LeaderWorkerSet-it", "Secret-it-secret", "Service-it-api",
                              "Service-other"]  # fmt: skip
    secret = json.loads((place / "cluster/Secret-it-secret.json").read_text())["stringData"]
    assert json.loads(secret["plan.json"])["api_keys"] == ["mine"]
    assert len(secret["secret"]) == 64
    assert "mine" not in (place / "cluster/told").read_text()
    (row,) = json.loads(run("status", "it", "--json").stdout)["data"]
    assert (row["state"], [c["host"] for c in row["containers"]]) == ("ready", ["n0", "n1"])
    assert "given to kubernetes" in run("status").stdout
    logs = run("logs", "it")
    assert "kubectl --namespace default logs --follow --selector" in str(logs.exception)

    n_applied = len(told(place, "apply"))
    assert deploy(file).stdout == "it runs already: http://it-api.default:8000/v1\n"
    assert "nothing would be done" in deploy(file, "--dry-run").stdout
    more = ("--set", "container.image=registry/v4:2")
    shown = deploy(file, "--dry-run", *more).stdout
    assert "-          image: registry/v4:1\n+          image: registry/v4:2" in shown
    refused = deploy(file, *more)
    assert (refused.exception.exit_code, len(told(place, "apply"))) == (6, n_applied)
    assert "--replace downtime takes it back first" in str(refused.exception)
    done = deploy(file, "--replace", "downtime", *more)
    assert done.exit_code == 0, done.output
    assert "registry/v4:2" in (place / "cluster/LeaderWorkerSet-it.json").read_text()

    assert "it: taken back" in run("down", "it").stdout
    assert objects(place) == ["Service-other"]
    assert not list((place / "state/v4-ascend/it").glob("containers*"))
    assert run("down", "it").stdout == "it does not run\n"


@pytest.mark.parametrize(
    ("fault", "says", "code"),
    [
        ("no image", "it-0-1 on n1: ImagePullBackOff: Back-off pulling image", 6),
        ("no node", "not ready after 0.2 s: it-0 on n0: Pending, not scheduled: 0/4 nodes", 7),
        ("no cluster", "exit code 1, saying: The connection to the server", 6),
    ],
)
def test_what_kubernetes_does_not_start_is_said(place, monkeypatch, fault, says, code):
    file = topology(place, "kubernetes")
    monkeypatch.setenv("STAND_IN_FAULT", fault)
    failed = deploy(file, "--timeout", "0.2")
    assert (failed.exception.exit_code, says in str(failed.exception)) == (code, True), failed
    assert run("status", "it").stdout.startswith("it: ")
    monkeypatch.setenv("STAND_IN_FAULT", "")
    assert "taken back" in run("down", "it").stdout
    assert objects(place) == []


def test_docker_is_given_on_this_host_and_another(place, monkeypatch):
    file = topology(place, "docker")
    done = deploy(file)
    assert done.exit_code == 0, done.output
    assert [w[3].split("/")[-2] for w in told(place, "up")] == list(reversed(HOSTS))
    assert (place / "cluster/sent.tar").stat().st_size > 0
    folder = place / "state/v4-ascend/it/containers"
    assert all(not stat.S_IMODE(f.stat().st_mode) & 0o077 for f in folder.rglob("*"))
    (row,) = json.loads(run("status", "it", "--json").stdout)["data"]
    assert (row["state"], row["url"]) == ("ready", "http://127.0.0.1:8000")
    assert "runs already" in deploy(file).stdout
    monkeypatch.setenv("STAND_IN_FAULT", "exited")
    assert "exit code 6" in run("status", "it").stdout
    monkeypatch.setenv("STAND_IN_FAULT", "")
    assert "taken back" in run("down", "it").stdout
    assert objects(place) == []


def test_what_is_not_here_is_said_before_anything_is_started(place, monkeypatch):
    file = topology(place, "docker")
    monkeypatch.setenv("STAND_IN_FAULT", "no compose")
    failed = deploy(file)
    assert "docker: unknown command: docker compose" in str(failed.exception)
    assert failed.exception.exit_code == 4
    assert told(place, "up") == []
    monkeypatch.setenv("PATH", "/nowhere")
    failed = deploy(topology(place, "kubernetes", name="other"))
    assert failed.exception.exit_code == 4
    assert "kubectl: no such command on PATH" in str(failed.exception)


def test_vllms_files_are_answered_for_each_host(place, monkeypatch):
    monkeypatch.setattr(
        "socket.gethostbyname", lambda name: name.replace("host-b.example", "9.9.9.9")
    )
    hosts = {"name": "s", "hosts": list(HOSTS), "devices_per_host": 16}
    wanted = {
        "engine": "vllm", "cluster": {"device": "ascend-a3-64", "supernodes": [hosts]},
        "model": {"checkpoint": "/models/it", "name": "v4-flash"}, "runtime": {"max_chunk": 512},
        "layout": {"dp_size": 8, "tp_size": 4, "ep_size": 32},
    }  # fmt: skip
    file = topology(place, "docker", **wanted)
    failed = deploy(file)
    assert "V4_ASCEND_NIC: not set; host-b.example is another host" in str(failed.exception)
    monkeypatch.setenv("V4_ASCEND_NIC", "eth7")
    done = deploy(file)
    assert done.exit_code == 0, done.output
    folder = place / "state/v4-ascend/it/containers"
    answers = (folder / HOSTS[1] / ".env").read_text()
    assert answers == "V4_ASCEND_ADDRESS=9.9.9.9\nV4_ASCEND_NIC=eth7\n"
    assert "runs already" in deploy(file).stdout
