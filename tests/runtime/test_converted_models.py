"""What `convert` makes runs: bit for bit where it is lossless, within written bounds elsewhere."""

import pytest
import torch
from layouts import LAYOUTS, make_plan, write_tiny
from parallel_plans import run_ranks

from v4_ascend.checkpoint.convert import Conversion
from v4_ascend.checkpoint.folder import CheckpointFolder
from v4_ascend.checkpoint.reader import Checkpoint
from v4_ascend.checkpoint.recoding import Recoding
from v4_ascend.checkpoint.shard import Sharding
from v4_ascend.config.precision import recipe_for
from v4_ascend.errors import ConfigError
from v4_ascend.ops import use_policy
from v4_ascend.runtime.compare import CONVERTED, compare, open_pair
from v4_ascend.runtime.engine import Engine
from v4_ascend.runtime.kv_cache import Chunk
from v4_ascend.runtime.parity import Recording, record, write_record

LOSSLESS = ("mxfp4", "fp8", "mxfp8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("converted")
    write_tiny(made / "source")
    source = CheckpointFolder(made / "source")
    for name in (*LOSSLESS, "w8a8", "w4a8"):
        Conversion(source, Recoding(source, name, recipe_for(name, None, None))).run(made / name)
    return made


@pytest.fixture(scope="module")
def recorded(folder):
    """Return a function: the record of a checkpoint, made once."""
    checkpoint = Checkpoint(folder / "source")
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, checkpoint.config.vocab_size, (1, 150), generator=g)

    def make(name):
        out = folder / f"{name}.safetensors"
        if not out.exists():
            how = Recording(prefill=148)
            made = record(Checkpoint(folder / name), ids, how, lambda done, total: None)
            write_record(out, *made)
        return out

    return make


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_formats_give_the_same_logits_bit_for_bit(recorded, name):
    a, b, bounds = open_pair(recorded("source"), recorded(name))
    found = compare(a, b, bounds)
    assert (found.max_abs, found.problems) == (0.0, [])


@pytest.mark.parametrize("name", CONVERTED)
def test_int8_and_int4_stay_within_the_bounds_of_the_docs(recorded, name):
    a, b, bounds = open_pair(recorded("source"), recorded(name))
    assert bounds == CONVERTED[name]
    found = compare(a, b, bounds)
    assert found.problems == []
    assert 0 < found.median_error < bounds.median
    # Either may be the first.
    assert open_pair(recorded(name), recorded("source"))[2] == bounds


def test_two_conversions_are_not_compared_with_each_other(recorded):
    with pytest.raises(ConfigError, match="is of other checkpoints"):
        open_pair(recorded("w8a8"), recorded("w4a8"))


def test_ranks_of_a_converted_checkpoint_compute_what_one_process_computes(tmp_path, folder):
    """TP cuts integers and their scales; read by name, or from files made in one pass."""
    source, plans = CheckpointFolder(folder / "source"), {}
    for name in ("w8a8", "w4a8"):
        by_name = make_plan(folder / name, LAYOUTS["tp2"], kernels="reference")
        one = Recoding(source, name, recipe_for(name, None, None))
        Sharding(source, by_name, recoding=one).run(tmp_path / name)
        own = by_name.model_copy(update={"checkpoint": str(tmp_path / name)})
        plans |= {name: by_name, f"{name}-own": own}
    cases = run_ranks(tmp_path, plans, 2, ragged=((90, 3), (1, 1)))
    for name in ("w8a8", "w4a8"):
        alone = make_plan(folder / name, {}, kernels="reference")
        with use_policy(kernels="reference"):
            engine = Engine.load(alone, lambda done, total: None)
            want = [engine.logits([Chunk(*c) for c in s[0]]) for s in cases[name]["steps"]]
        by_name, own = (torch.load(tmp_path / f"{n}-dp0.pt") for n in (name, f"{name}-own"))
        for a, b, c in zip(want, by_name, own, strict=True):
            assert (a - b).abs().max() < 1e-5
            assert torch.equal(b, c)


def test_a_drafter_is_converted_and_sharded_with_the_rest(tmp_path):
    write_tiny(tmp_path / "source", preset="tiny-dspark")
    folder = CheckpointFolder(tmp_path / "source")
    settings = {"n_draft_tokens": 5, "quant_sim": "auto", "kernels": "reference"}
    plan = make_plan(folder.path, {}, **settings)
    Sharding(folder, plan).run(tmp_path / "sharded")
    Conversion(folder, Recoding(folder, "fp8", recipe_for("fp8", None, None))).run(tmp_path / "fp8")
    want = guesses(plan, tmp_path / "source")
    assert want.logits.isfinite().all()
    for name in ("sharded", "fp8"):
        assert torch.equal(guesses(plan, tmp_path / name).logits, want.logits)


def guesses(plan, folder):
    with use_policy(kernels="reference"), torch.inference_mode():
        at = plan.model_copy(update={"checkpoint": str(folder)})
        engine = Engine.load(at, lambda done, total: None)
        model, layers = engine.model, engine.cache.layers
        batch = engine.cache.batch([Chunk(0, range(60, 100), 0)])
        model(batch, layers, engine.targets.observe)
        model.dspark.take(engine.targets.seen, batch, layers[model.config.n_layers :])
        return model.draft_blocks(engine.cache.block([0], [40], [[5, *[500] * 4]]), layers)
