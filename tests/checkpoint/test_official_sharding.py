"""What DeepSeek's inference/convert.py writes for mp model-parallel ranks, and what shard does.

The rules are written again here from that script: which dimension of a tensor is cut, by the last
name but one; which experts go where; everything else is on every rank.
"""

import pytest
import torch
from layouts import make_plan, write_tiny

from v4_ascend.checkpoint.folder import CheckpointFolder
from v4_ascend.checkpoint.reader import Checkpoint, RankCheckpoint
from v4_ascend.checkpoint.shard import Sharding
from v4_ascend.checkpoint.sharded import ShardedFolder
from v4_ascend.ops.formats import dequantize_fp8_block

DIM = {
    "embed": 0,
    "head": 0,
    "wq_b": 0,
    "wo_a": 0,
    "attn_sink": 0,
    "weights_proj": 0,
    "wo_b": 1,
}
# We keep the indexer whole on each rank: its choice is the same on all of them without a sum.
WHOLE = (".indexer.wq_b.", ".indexer.weights_proj.")


def converted(checkpoint, rank, mp):
    n_local = checkpoint.config.n_routed_experts // mp
    for name, tensor in checkpoint.stream():
        if name.startswith("mtp."):
            continue  # we shard no drafter yet
        words = name.split(".")
        if "experts" in words:
            expert = int(words[words.index("experts") + 1])
            if not rank * n_local <= expert < (rank + 1) * n_local:
                continue
            yield name, tensor
            continue
        key = words[-1] if words[-1] in DIM else words[-2] if len(words) > 1 else name
        if (dim := DIM.get(key)) is not None and mp > 1:
            size = tensor.shape[dim] // mp
            tensor = raw(tensor).narrow(dim, rank * size, size).contiguous().view(tensor.dtype)
        yield name, tensor


def raw(tensor):
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("official") / "checkpoint")


@pytest.mark.parametrize("mp", [1, 2, 4])
def test_ranks_hold_what_the_official_converter_gives_them(tmp_path, checkpoint, mp):
    plan = make_plan(checkpoint, {"tp_size": mp, "ep_size": mp})
    Sharding(CheckpointFolder(checkpoint), plan).run(tmp_path / "out")
    folder, original = ShardedFolder(tmp_path / "out"), Checkpoint(checkpoint)
    for rank in range(mp):
        ours = RankCheckpoint(folder, plan, rank)
        official = dict(converted(original, rank, mp))
        assert ours.headers.keys() == official.keys()
        for name, want in official.items():
            got = ours.tensor(name)
            if any(w in name for w in WHOLE):
                size = got.shape[0] // mp
                got = raw(got)[rank * size : (rank + 1) * size].view(got.dtype)
            assert got.dtype == want.dtype
            assert torch.equal(raw(got), raw(want)), name
        # It widens wo_a to BF16 after cutting it; we keep it as it is and widen it when loaded.
        at = "layers.0.attn.wo_a"
        widened = dequantize_fp8_block(official[f"{at}.weight"], official[f"{at}.scale"])
        mine = dequantize_fp8_block(ours.tensor(f"{at}.weight"), ours.tensor(f"{at}.scale"))
        assert torch.equal(widened.bfloat16(), mine.bfloat16())
