"""Drafts over real ranks and gloo: the answers of one process without them, and its guesses."""

import json
from pathlib import Path

import pytest
from layouts import write_tiny
from parallel_plans import launch
from served import DRAFTERS, Noting, drive, lucky, plan, poison, requests_of

from v4_ascend.checkpoint.folder import CheckpointFolder
from v4_ascend.checkpoint.shard import Sharding
from v4_ascend.ops import use_policy
from v4_ascend.runtime.engine import Engine
from v4_ascend.runtime.limits import limits_of

SCRIPT = Path(__file__).with_name("serving_ranks.py")
GRAMMAR = "start: /[a-z0-9]+( [a-z0-9]+)*/"
# Of one family's prompts the first 128 tokens are found. They share what is behind those too: MTP's
# last row there, and so its guesses, are of the request that has left it.
SHAPES = (
    (0, 130, 5, 8, False),
    (0, 130, 28, 8, True),
    (1, 0, 45, 8, True),
    (0, 130, 18, 5, False),
)
QUICK = {
    "mtp-pp2-ep2": ("tiny", {"pp_size": 2, "dp_size": 2, "ep_size": 2}),
    "dspark-pp2-tp2-ep2": ("tiny-dspark", {"pp_size": 2, "tp_size": 2, "ep_size": 2}),
}
MORE = {
    "dspark-pp2-ep2": ("tiny-dspark", {"pp_size": 2, "dp_size": 2, "ep_size": 2}),
    "mtp-pp4": ("tiny", {"pp_size": 4}),
    "mtp-pp2-tp2-dsa": ("tiny", {"pp_size": 2, "tp_size": 2, "dsa_cp": True}),
    "mtp-cp2-tp2-ep4": ("tiny", {"cp_size": 2, "tp_size": 2, "ep_size": 4}),
    "dspark-pp2-cp2": ("tiny-dspark", {"pp_size": 2, "cp_size": 2}),
    "dspark-dp2-cp2-ep4": ("tiny-dspark", {"dp_size": 2, "cp_size": 2, "ep_size": 4}),
}


@pytest.mark.parametrize("layouts", [QUICK, pytest.param(MORE, marks=pytest.mark.slow)])
def test_answers_and_guesses_are_those_of_one_process(tmp_path, layouts):
    """With rules and a grammar, prefixes found, guesses right and wrong; from files of ranks."""
    alone = {
        preset: one_process(write_tiny(tmp_path / preset, preset=preset)) for preset in DRAFTERS
    }
    cases = {}
    for name, (preset, layout) in layouts.items():
        of_ranks = planned(tmp_path / preset, DRAFTERS[preset], layout)
        Sharding(CheckpointFolder(tmp_path / preset), of_ranks).run(tmp_path / name)
        of_ranks = of_ranks.model_copy(update={"checkpoint": str(tmp_path / name)})
        cases[name] = {
            "plan": of_ranks.model_dump(mode="json"),
            "store": str(tmp_path / f"{name}.store"),
            "shapes": SHAPES,
            "grammar": GRAMMAR,
            "truth": alone[preset][0],
        }
    launch(SCRIPT, tmp_path, cases, 4)
    for name, (preset, _) in layouts.items():
        found = json.loads((tmp_path / f"{name}-rank0.json").read_text())
        tokens, guesses = alone[preset]
        assert {int(n): drawn for n, drawn in found["tokens"].items()} == tokens, name
        seen = {(request, n): drafts for request, n, drafts in found["guesses"]}
        both = seen.keys() & guesses.keys()
        assert len(both) >= 10, name
        assert {at: seen[at] for at in both} == {at: guesses[at] for at in both}, name
        counters = found["counters"]
        assert counters["drafted"] > sum(counters["accepted_at"]) > 0, name
        assert counters["cached_tokens"] > 0, name
        assert found["kept"] <= 4, name


def planned(checkpoint, n_drafts, layout=None, **changes):
    return plan(checkpoint, n_drafts, layout, max_chunk=96, max_batch_size=2, **changes)


def one_process(checkpoint):
    """Return what each request is answered when nobody else asks, and guesses on the way."""
    n_drafts = DRAFTERS[checkpoint.name]
    drafting = planned(checkpoint, n_drafts)
    with use_policy(kernels="reference"):
        engine = Engine.load(drafting, lambda done, total: None)
        plain = limits_of(planned(checkpoint, 0, prefix_snapshots=0), engine.config)
        tokens = {}
        requests = requests_of(SHAPES, engine.config.vocab_size, GRAMMAR)
        for request in requests:
            poison(engine)
            tokens |= drive([engine], plain, [request])[0]
        poison(engine)
        noting = Noting(lucky(tokens, n_drafts))
        drive([engine], limits_of(drafting, engine.config), requests, noting)
    return tokens, noting.seen
