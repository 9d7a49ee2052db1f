"""What loading holds at once."""

import weakref

import torch

from v4_ascend.checkpoint.reader import Checkpoint
from v4_ascend.checkpoint.synthetic import write_synthetic
from v4_ascend.config.model import ModelConfig
from v4_ascend.config.presets import preset_path
from v4_ascend.model.numerics import Numerics
from v4_ascend.model.transformer import Transformer


def test_an_expert_is_let_go_before_the_next_one_is_read(tmp_path):
    config = ModelConfig.read(preset_path("tiny"))
    write_synthetic(config, tmp_path / "c", seed=0)
    reader, seen, most = Checkpoint(tmp_path / "c"), [], 0

    def source(name):
        nonlocal most
        tensor = reader.tensor(name)
        if ".experts." in name:
            seen.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in seen))
        return tensor

    numerics = Numerics(dtype=torch.float32, quant_sim=True)
    Transformer.read(source, config, numerics, with_drafter=True)
    assert len(seen) == 6 * config.n_routed_experts * (config.n_layers + config.n_mtp_layers)
    assert most == 4  # w1 and w3 with their scales
