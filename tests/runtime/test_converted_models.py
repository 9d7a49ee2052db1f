"""What `convert` makes runs: bit for bit where it is lossless, within written bounds elsewhere."""

import pytest
import torch
from layouts import write_tiny

from v4_ascend.checkpoint.convert import Conversion
from v4_ascend.checkpoint.folder import CheckpointFolder
from v4_ascend.checkpoint.reader import Checkpoint
from v4_ascend.checkpoint.recoding import Recoding
from v4_ascend.config.precision import recipe_for
from v4_ascend.errors import ConfigError
from v4_ascend.runtime.compare import CONVERTED, compare, open_pair
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
