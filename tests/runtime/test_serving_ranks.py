"""Drafts over real ranks and gloo: the answers of one process without them."""

import json
from pathlib import Path

from layouts import write_tiny
from parallel_plans import launch
from served import DRAFTERS, drive, plan, poison, requests_of

from v4_ascend.ops import use_policy
from v4_ascend.runtime.engine import Engine
from v4_ascend.runtime.limits import limits_of

SCRIPT = Path(__file__).with_name("serving_ranks.py")
GRAMMAR = "start: /[a-z0-9]+( [a-z0-9]+)*/"
# Of a family's prompts one begins as the other; the fourth waits for the third's pages.
SHAPES = (
    (0, 256, 7, 9, False),
    (0, 256, 30, 9, True),
    (1, 0, 45, 9, False),
    (1, 300, 20, 9, True),
    (0, 256, 50, 6, False),
)
LAYOUTS = {
    "mtp-pp2-ep2": ("tiny", {"pp_size": 2, "dp_size": 2, "ep_size": 2}),
    "dspark-pp2-tp2-ep2": ("tiny-dspark", {"pp_size": 2, "tp_size": 2, "ep_size": 2}),
}


def test_answers_are_those_of_one_process_without_drafts(tmp_path):
    """With rules and a grammar, prefixes found, requests sent back, guesses right and wrong."""
    truth = {preset: alone(write_tiny(tmp_path / preset, preset=preset)) for preset in DRAFTERS}
    cases = {
        name: {
            "plan": plan(tmp_path / preset, DRAFTERS[preset], layout).model_dump(mode="json"),
            "store": str(tmp_path / f"{name}.store"),
            "shapes": SHAPES,
            "grammar": GRAMMAR,
            "truth": truth[preset],
        }
        for name, (preset, layout) in LAYOUTS.items()
    }
    launch(SCRIPT, tmp_path, cases, 4)
    for name, (preset, _) in LAYOUTS.items():
        found = json.loads((tmp_path / f"{name}-rank0.json").read_text())
        assert {int(n): tokens for n, tokens in found["tokens"].items()} == truth[preset], name
        counters = found["counters"]
        assert counters["drafted"] > sum(counters["accepted_at"]) > 0, name
        assert counters["cached_tokens"] > 0, name


def alone(checkpoint):
    """Return what each request is answered when nobody else asks."""
    plain = plan(checkpoint, 0, prefix_snapshots=0)
    with use_policy(kernels="reference"):
        engine = Engine.load(plain, lambda done, total: None)
        limits, truth = limits_of(plain, engine.config), {}
        for request in requests_of(SHAPES, engine.config.vocab_size, GRAMMAR):
            poison(engine)
            truth |= drive([engine], limits, [request])[0]
    return truth
