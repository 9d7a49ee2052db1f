"""DSpark behind a front: answers as without it, and guesses that are right where they can be."""

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_deploy import ASK, Box

DEVICES = "cluster.supernodes=[{name: here, hosts: [localhost], devices_per_host: 2}]"
GREEDY = ASK | {"temperature": 0, "max_tokens": 60, "ignore_eos": True}


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    box = Box(tmp_path_factory.mktemp("spark"))
    made = ("init", "--preset", "tiny-dspark", "--format", "fp32", "--out", box.folder / "tiny")
    done = box.run(*made)
    assert done.returncode == 0, done.stderr
    make_foreseeable(box.folder / "tiny")
    return box


def make_foreseeable(checkpoint):
    """Let the next token depend on the last one alone, and the drafter's correction know how.

    Embeddings of few dimensions outweigh what layers add to them, so that logits are head times
    embedding: the product the correction is made of, too.
    """
    g = torch.Generator().manual_seed(5)
    few = torch.randn(512, 32, generator=g)
    wide = torch.linalg.qr(torch.randn(128, 32, generator=g)).Q.T
    head = 0.1 * torch.randn(512, 128, generator=g)
    head[1] = 0  # of the end token
    changed = {
        "embed.weight": 60 * few @ wide,
        "head.weight": head,
        "norm.weight": torch.ones(128),
        "mtp.2.markov_head.markov_w1.weight": 60 * few,
        "mtp.2.markov_head.markov_w2.weight": head @ wide.T,
    }
    for file in checkpoint.glob("*.safetensors"):
        tensors = load_file(file)
        if new := changed.keys() & tensors.keys():
            tensors |= {name: changed.pop(name).contiguous() for name in new}
            save_file(tensors, file, metadata={"format": "pt"})
    assert not changed


def answers(box, *settings):
    options = [o for s in settings for o in ("--set", s)]
    done = box.run("deploy", "--topology", box.topology, *options, "--detach")
    assert done.returncode == 0, done.stderr
    try:
        said = []
        for question in ("hi", "what else?"):
            body = GREEDY | {"messages": [{"role": "user", "content": question}]}
            answer = httpx.post(f"{box.url}/v1/chat/completions", json=body, timeout=120)
            assert answer.status_code == 200, answer.text
            said.append(answer.json()["choices"][0]["message"]["content"])
        return said, metrics(box)
    finally:
        assert box.run("down", "laptop").returncode == 0


def metrics(box):
    lines = httpx.get(f"{box.url}/metrics").text.splitlines()
    return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))


def counted(found, name, **labels):
    """Values of a metric, in order."""
    return [
        float(v)
        for k, v in found.items()
        if k.startswith(name + "{") and all(f'{label}="{x}"' in k for label, x in labels.items())
    ]


def test_a_chat_is_answered_as_without_drafts_and_most_are_right(box):
    """By two stages: the last one drafts, both take wrong guesses back."""
    plain, _ = answers(box)
    assert len(plain[0]) > 20
    drafts = ("serve.n_draft_tokens=4", "serve.min_draft_confidence=0")
    said, found = answers(box, "layout={pp_size: 2}", DEVICES, *drafts)
    assert said == plain
    name = "vllm:spec_decode_num"
    (rounds,) = counted(found, f"{name}_drafts_total")
    (drafted,) = counted(found, f"{name}_draft_tokens_total")
    (accepted,) = counted(found, f"{name}_accepted_tokens_total")
    by_place = counted(found, f"{name}_accepted_tokens_per_pos_total")
    assert [counted(found, f"{name}_accepted_tokens_per_pos_total", position=p) for p in range(4)]
    assert sum(by_place) == accepted
    assert by_place == sorted(by_place, reverse=True)
    assert len(by_place) == 4
    assert 0.5 < accepted / drafted <= 1
    assert rounds < 2 * 60 / 2
