"""The whole deploy path on an emulated NPU: ranks in another environment, one answer, an end."""

import httpx
import pytest
from test_deploy import ASK, Box


@pytest.mark.slow
def test_a_tiny_model_answers_on_an_emulated_npu(tmp_path):
    box = Box(tmp_path)
    done = box.run("init", "--preset", "tiny", "--out", box.folder / "tiny")
    assert done.returncode == 0, done.stderr
    device = ("--set", "cluster.device=cpu-emulated-npu")
    done = box.run("deploy", "--topology", box.topology, *device, "--detach", timeout=600)
    try:
        assert done.returncode == 0, done.stderr
        answer = httpx.post(
            f"{box.url}/v1/chat/completions", json=ASK | {"max_tokens": 2}, timeout=120
        ).json()
        assert answer["usage"]["completion_tokens"] == 2
    finally:
        assert box.run("down", "laptop").returncode == 0
