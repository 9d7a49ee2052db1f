"""A container's health check: the fronts that run answer, or it says which does not."""

import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from v4_ascend.deploy.state import Supervisor, start_time


@pytest.fixture
def front():
    """A server whose /health has the status it is told."""

    class Handler(BaseHTTPRequestHandler):
        status = 200

        def do_GET(self):
            self.send_response(self.status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server, Handler
    server.shutdown()
    server.server_close()


def check(state, **env):
    return subprocess.run(
        [sys.executable, "-m", "v4_ascend.deploy.healthy"],
        env=os.environ | {"XDG_STATE_HOME": str(state)} | env,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def announce(state, url, started):
    folder = state / "v4-ascend" / "one"
    folder.mkdir(parents=True)
    Supervisor("one", os.getpid(), started, url, "0", "m").write(folder)


def test_nothing_that_runs_is_healthy(tmp_path):
    assert check(tmp_path).returncode == 0
    announce(tmp_path, "http://127.0.0.1:9", started=1)  # of a process that is gone
    assert check(tmp_path).returncode == 0


def test_a_front_that_answers_is_healthy_whatever_the_proxy(tmp_path, front):
    server, handler = front
    url = f"http://127.0.0.1:{server.server_port}"
    announce(tmp_path, url, start_time(os.getpid()))
    assert check(tmp_path, http_proxy="http://127.0.0.1:9").returncode == 0
    handler.status = 503
    done = check(tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith(f"one: {url}/health: HTTP Error 503")


def test_a_front_that_does_not_is_not(tmp_path):
    announce(tmp_path, "http://127.0.0.1:9", start_time(os.getpid()))
    done = check(tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "Connection refused" in done.stderr
