"""The whole deploy path on emulated NPUs: ranks in another environment, one answer, an end."""

import httpx
import pytest
from test_deploy import ASK, Box


@pytest.mark.slow
def test_a_tiny_model_answers_on_two_emulated_npus(tmp_path):
    """Each rank has one of its own, and they exchange rows by what they ask of HCCL."""
    box = Box(tmp_path)
    done = box.run("init", "--preset", "tiny", "--out", box.folder / "tiny")
    assert done.returncode == 0, done.stderr
    two = "cluster.supernodes=[{name: here, hosts: [localhost], devices_per_host: 2}]"
    layout = "layout={dp_size: 2, ep_size: 2}"
    device = ("--set", "cluster.device=cpu-emulated-npu", "--set", two, "--set", layout)
    done = box.run("deploy", "--topology", box.topology, *device, "--detach", timeout=600)
    try:
        assert done.returncode == 0, done.stderr
        answer = httpx.post(
            f"{box.url}/v1/chat/completions", json=ASK | {"max_tokens": 2}, timeout=120
        ).json()
        assert answer["usage"]["completion_tokens"] == 2
        (row,) = box.status("laptop")
        assert [r["what"].partition(", localhost ")[2] for r in row["ranks"]] == [
            "device 0)",
            "device 1)",
        ]
        assert all(r["bytes_sent"]["ep"] > 0 for r in row["ranks"])
    finally:
        assert box.run("down", "laptop").returncode == 0
