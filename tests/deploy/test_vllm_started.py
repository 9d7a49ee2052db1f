"""Starting, watching and ending vLLM's processes, with a stand-in: see stand_in_vllm.py."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

STAND_IN = Path(__file__).with_name("stand_in_vllm.py")


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Place:
    """A folder with `vllm` and `ssh` on its PATH and a topology of two hosts, both this one."""

    def __init__(self, folder):
        self.folder, self.port = folder, _free_port()
        (folder / "bin").mkdir()
        self._script("vllm", f'exec {sys.executable} {STAND_IN} "$@"')
        # ssh OPTIONS -- HOST COMMAND: the "other host" is this one.
        self._script("ssh", 'while [ "$1" != -- ]; do shift; done; exec sh -c "$3"')
        self.env = os.environ | {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "XDG_STATE_HOME": str(folder / "state"),
            "STAND_IN_MARK": str(folder),
            "STAND_IN_LOGITS": str(self.record()),
            "V4_ASCEND_ADDRESS": "127.0.0.1",
            "V4_ASCEND_NIC": "lo",
        }
        self.topology = folder / "t.yaml"
        self.write()

    def _script(self, name, line):
        file = self.folder / "bin" / name
        file.write_text(f"#!/bin/sh\n{line}\n")
        file.chmod(0o755)

    def write(self, **serve):
        topology = {
            "name": "standing-in",
            "cluster": {
                "device": "ascend-a3-64",
                "supernodes": [
                    {"name": "s", "hosts": ["127.0.0.1", "127.0.0.2"], "devices_per_host": 16}
                ],
            },
            "model": {"checkpoint": "/models/flash", "name": "v4-flash"},
            "serve": {"max_model_len": 65536, "concurrency": 32, "port": self.port} | serve,
            "layout": {"dp_size": 8, "tp_size": 4, "ep_size": 32},
            "runtime": {"max_chunk": 4096},
            "engine": "vllm",
            "launcher": "ssh",
        }
        self.topology.write_text(yaml.safe_dump(topology))

    def record(self):
        rng = np.random.default_rng(0)
        logits = (rng.standard_normal((1, 40, 64)) * 3).astype(np.float32)
        ids = rng.integers(0, 64, (1, 40))
        file = self.folder / "record.safetensors"
        save_file({"logits": logits, "input_ids": ids}, file)
        return file

    def run(self, *args, **env):
        return subprocess.run(
            [sys.executable, "-m", "v4_ascend", *map(str, args)],
            capture_output=True, text=True, env=self.env | env, timeout=60, check=False,
        )  # fmt: skip

    def deploy(self, *args, **env):
        # This machine is none of the topology's: the preflight would say so.
        return self.run("deploy", "--topology", self.topology, "--drain-timeout", "0",
                        "--timeout", "20", "--skip-preflight", *args, **env)  # fmt: skip

    def left(self):
        """What mentions our folder and still runs, after a moment to end."""
        deadline = time.monotonic() + 5
        while (found := self._processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def _processes(self):
        found = []
        for file in Path("/proc").glob("[0-9]*/environ"):
            try:
                if str(self.folder).encode() in file.read_bytes():
                    found.append((file.parent / "cmdline").read_bytes())
            except OSError:
                continue
        return found


@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path)
    yield place
    place.run("down", "standing-in")
    assert place.left() == []


def test_two_hosts_come_up_are_compared_watched_and_ended(place):
    place.write(api_keys=["secret-of-mine"])
    done = place.deploy("--detach", "--set", f"model.reference={place.folder}/record.safetensors")
    assert done.returncode == 0, done.stderr
    assert "canary reference: 100.0% of" in done.stderr
    (row,) = json.loads(place.run("status", "standing-in", "--json").stdout)["data"]
    assert row["state"] == "ready"
    assert [p["host"] for p in row["processes"]] == ["127.0.0.1", "127.0.0.2"]
    assert all(p["is_ready"] for p in row["processes"])
    logs = place.run("logs", "standing-in").stdout
    assert '"headless": true' in logs
    assert '"data-parallel-start-rank": 4' in logs
    commands = b"".join(place._processes())
    assert b"secret-of-mine" not in commands
    again = place.deploy()
    assert "runs already" in again.stdout
    assert place.run("down", "standing-in").stdout == "standing-in: stopped\n"
    assert place.left() == []


def test_without_a_reference_the_canary_says_so(place):
    done = place.deploy("--detach")
    assert done.returncode == 0, done.stderr
    assert "ready: " in done.stderr
    assert "canary unreferenced" in done.stderr


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("wrong weights", 5, "does not serve what"),
        ("dies", 6, "ended with exit code"),
        ("other model", 6, "serves another, not v4-flash"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_stays(place, fault, code, message):
    reference = f"model.reference={place.folder}/record.safetensors"
    done = place.deploy("--set", reference, STAND_IN_FAULT=fault)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert place.left() == []


def test_conformance_is_run_before_it_is_called_ready(place):
    done = place.deploy("--conformance")
    assert done.returncode == 1, done.stderr  # the stand-in answers no chat
    assert "cases failed" in done.stderr
    assert "ready: " not in done.stderr
    assert place.left() == []


def test_without_vllm_nothing_is_started(place):
    (place.folder / "bin" / "vllm").unlink()
    done = place.deploy()
    assert done.returncode == 4
    assert "no such command on PATH" in done.stderr


def test_other_commands_replace_those_that_run_with_downtime_and_a_way_back(place):
    assert place.deploy("--detach").returncode == 0
    (before,) = json.loads(place.run("status", "--json").stdout)["data"]
    more = ("--set", "serve.concurrency=64")
    said = place.deploy("--dry-run", *more).stdout
    assert "--max-num-seqs  4 -> 8  of 2 processes" in said
    assert "--replace downtime stops it first" in said
    data = json.loads(place.deploy("--dry-run", "--json", *more).stdout)["data"]
    assert (data["action"], data["changes"][0]["n_processes"]) == ("refuse", 2)
    refused = place.deploy("--detach", *more)
    assert refused.returncode == 6
    assert "vLLM cannot wait beside them; --replace downtime stops it first" in refused.stderr

    # What does not become ready is taken back, and the one before serves again.
    failed = place.deploy("--detach", "--replace", "downtime", *more, STAND_IN_FAULT="dies of more")
    assert failed.returncode == 6, failed.stderr
    assert "gone back: ready: " in failed.stderr
    (again,) = json.loads(place.run("status", "--json").stdout)["data"]
    assert again["pid"] != before["pid"]

    done = place.deploy("--detach", "--replace", "downtime", *more)
    assert done.returncode == 0, done.stderr
    assert "was down for " in done.stderr
    assert '"max-num-seqs": 8' in place.run("logs", "standing-in").stdout
