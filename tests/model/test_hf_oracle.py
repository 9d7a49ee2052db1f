"""Against Hugging Face transformers' deepseek_v4, which shares nothing with us but the files."""

import pytest
import torch
from conftest import GOLDEN, caches
from dspark_reference import Reference
from transformers import AutoModelForCausalLM

from v4_ascend.checkpoint.reader import Checkpoint
from v4_ascend.checkpoint.synthetic import in_format, write_synthetic
from v4_ascend.config.model import ModelConfig
from v4_ascend.config.presets import preset_path
from v4_ascend.model.dspark import Targets
from v4_ascend.model.numerics import Numerics
from v4_ascend.runtime.kv_cache import Chunk
from v4_ascend.runtime.load import load_model
from v4_ascend.runtime.parity import Recording, record

TINY = ModelConfig.read(preset_path("tiny"))
CONFIGS = {
    "swa": {"compress_ratios": (0, 0, 0), "n_layers": 2, "n_hash_layers": 0},
    "csa": {"compress_ratios": (4, 4, 0), "n_layers": 2, "n_hash_layers": 0},
    "hca": {"compress_ratios": (128, 128, 0), "n_layers": 2, "n_hash_layers": 1},
    "mixed": {},
    # Angles far beyond the YaRN boundary appear at small positions.
    "yarn": {"original_seq_len": 128, "compress_rope_theta": 2000.0},
}
N = 300  # crosses 4, the window, 128 twice; 75 CSA rows for a top-k of 16


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """Our checkpoint, and the logits HF computes from its files."""
    config = in_format(TINY.model_copy(update=CONFIGS[request.param]), "fp32")
    folder = tmp_path_factory.mktemp(request.param) / "checkpoint"
    write_synthetic(config, folder, seed=3)
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not [k for k in report["unexpected_keys"] if not k.startswith("mtp.")]
    ids = torch.tensor([[t % config.vocab_size for t in GOLDEN["tokens"][:N]]])
    with torch.inference_mode():
        return Checkpoint(folder), ids, model.eval()(ids).logits


@pytest.mark.parametrize(
    ("prefill", "chunk"),
    [(N, None), (5, None), (127, None), *((N, c) for c in (1, 7, 50, 64, 129))],
    ids=lambda v: str(v),
)
def test_every_position_agrees(pair, prefill, chunk):
    checkpoint, ids, want = pair
    how = Recording(prefill=prefill, chunk=chunk)
    got, metadata = record(checkpoint, ids, how, lambda done, total: None)
    assert metadata["dtype"] == "fp32"
    torch.testing.assert_close(got["logits"], want, rtol=0, atol=2e-5)


def test_dsparks_guesses_are_the_dense_drafters_behind_hfs_streams(tmp_path):
    """Nothing of ours on the other side: HF runs the network, the dense drafter the stages."""
    config = in_format(ModelConfig.read(preset_path("tiny-dspark")), "fp32")
    write_synthetic(config, tmp_path / "checkpoint", seed=3)
    hf = AutoModelForCausalLM.from_pretrained(
        tmp_path / "checkpoint", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids, seen = [t % config.vocab_size for t in GOLDEN["tokens"][:N]], []
    for layer in config.dspark.target_layer_ids:
        hf.model.layers[layer].register_forward_hook(lambda _, given, out: seen.append(out[0]))
    hf(torch.tensor([ids[:-1]]))
    means = [sum(x[:, j] for j in range(config.hc_mult)) / config.hc_mult for x in seen]
    checkpoint = Checkpoint(tmp_path / "checkpoint")
    weights = {name: checkpoint.tensor(name) for name in checkpoint.headers}
    want = Reference(weights, config).guesses(means, ids[-1])

    numerics = Numerics.of(config, None, "auto")
    model = load_model(checkpoint, numerics, with_drafter=True, progress=lambda done, total: None)
    cache, drafter = caches(config), model.dspark
    for first, end in ((0, 130), (130, N - 1)):
        batch = cache.batch([Chunk(0, ids[first:end], first)])
        targets = Targets(config.dspark, model.shard.layers)
        model(batch, cache.layers, targets.observe)
        drafter.take(targets.seen, batch, cache.layers[config.n_layers :])
    got = model.draft_blocks(
        cache.block([0], [N - 1], [[ids[-1], 500, 500, 500, 500]]), cache.layers
    )
    assert got.ids[0].tolist() == want[0]
    torch.testing.assert_close(got.logits[0], want[1], rtol=0, atol=2e-5)
    torch.testing.assert_close(got.confidence[0], want[2], rtol=0, atol=2e-5)
