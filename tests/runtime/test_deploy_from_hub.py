"""A deployment whose checkpoint is a hub's: fetched once, of one revision, then served."""

import openai
import pytest
from hub import hub
from test_deploy import ASK, Box


@pytest.mark.slow
def test_deploy_fetches_serves_and_pins_the_revision(tmp_path):
    box = Box(tmp_path)
    done = box.run("init", "--preset", "tiny", "--format", "fp32", "--out", tmp_path / "tiny")
    assert done.returncode == 0, done.stderr
    with hub({"org/tiny": {"main": tmp_path / "tiny"}}) as server:
        box.env |= {"HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(tmp_path / "cache")}
        asked = ("--topology", box.topology, "--set", "model.checkpoint=hf:org/tiny")
        dry = box.run("deploy", *asked, "--dry-run")
        assert dry.returncode == 0, dry.stderr
        assert not list((tmp_path / "cache").rglob("*.safetensors"))
        done = box.run("deploy", *asked, "--detach")
        assert done.returncode == 0, done.stderr
    # The hub is gone: what runs, and what starts again, has all it needs.
    try:
        with openai.OpenAI(base_url=f"{box.url}/v1", api_key="none", max_retries=0) as client:
            answer = client.chat.completions.create(**ASK, max_tokens=3)
        assert answer.usage.completion_tokens
        plan = (tmp_path / "state/v4-ascend/laptop/plan.json").read_text()
        commit = server.commit("org/tiny", "main")[0]
        assert f'"hf:org/tiny@{commit}"' in plan
    finally:
        assert box.run("down", "laptop").returncode == 0
    assert box.left() == []
