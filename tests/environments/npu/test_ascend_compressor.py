"""The compressor's state, through calls of any size: rows must not depend on the chunks.

The kernel pages its state by position and reads some pages while it writes others; ours is a
ring. A step of several requests, long chunks and single tokens, slots in any order.
"""

import pytest
import torch
from torch.nn import functional as F

from v4_ascend.backends import BACKENDS
from v4_ascend.emulation import calls
from v4_ascend.ops import compress_kv, use_policy
from v4_ascend.ops.check import assert_close
from v4_ascend.ops.compress_kv import row_positions, state_rows
from v4_ascend.ops.ragged import max_new_rows
from v4_ascend.ops.rope import rope_freqs, rope_table

DIM = 1024  # the least the kernel takes
N_SLOTS = 5
# Each step: how many tokens requests 0, 1 and 2 bring.
STEPS = [(5, 130, 0), (1, 1, 1), (3, 2, 7), (1, 1, 1), (9, 0, 129), (140, 6, 1), (1, 1, 300)]
SLOTS = (3, 0, 4)  # slot 0 too: the kernel's page 0 is nobody's, our slot 0 is somebody's


@pytest.fixture
def model(request):
    head_dim, coff, ratio = request.param
    g = torch.Generator().manual_seed(5)
    width = coff * head_dim

    def stored(*shape):
        return (torch.randn(*shape, generator=g) * DIM**-0.5).bfloat16().float()

    return {
        "wkv": stored(width, DIM),
        "wgate": stored(width, DIM),
        "ape": torch.randn(ratio, width, generator=g),
        "norm_weight": (torch.rand(head_dim, generator=g) + 0.5).bfloat16().float(),
        "compress_ratio": ratio,
        "norm_eps": 1e-6,
    }


def _steps(model):
    """Every step's arguments, but the state."""
    g = torch.Generator().manual_seed(6)
    ratio, lengths = model["compress_ratio"], torch.zeros(3, dtype=torch.int32)
    for counts in STEPS:
        new = torch.tensor(counts, dtype=torch.int32)
        lengths = lengths + new
        cu_seqlens = F.pad(new.cumsum(0), (1, 0)).int()
        positions = torch.zeros(max_new_rows(sum(counts), 3, ratio), dtype=torch.int64)
        done = row_positions(lengths, cu_seqlens, ratio)
        positions[: len(done)] = torch.tensor(done, dtype=torch.int64)
        cos, sin = rope_table(positions, rope_freqs(64, 160000.0))
        yield {
            "x": torch.randn(sum(counts), DIM, generator=g).bfloat16(),
            "cos": cos,
            "sin": sin,
            "state_slots": torch.tensor(SLOTS),
            "seq_lens": lengths,
            "cu_seqlens": cu_seqlens,
        }


def _state(model):
    ratio, width = model["compress_ratio"], model["ape"].shape[1]
    rows = state_rows(ratio, width == 2 * model["norm_weight"].shape[0])
    # Whatever is in it: slots are not reset between requests.
    g = torch.Generator().manual_seed(7)
    return torch.randn(N_SLOTS, rows, 2 * width, generator=g)


def _on_npu(arguments):
    return {k: v.to("npu") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


KINDS = [(512, 2, 4), (128, 2, 4), (512, 1, 128)]


@pytest.mark.parametrize("model", KINDS, ids=["csa", "indexer", "hca"], indirect=True)
def test_any_chunking_gives_the_references_rows_and_state(model):
    BACKENDS["ascend"].use_chip(None)
    there, state, expected = _on_npu(model), _state(model).to("npu"), _state(model)
    with torch.inference_mode(), use_policy(backend="ascend"):
        compress_kv.prepare(there["wkv"], there["wgate"], there["norm_weight"])
        for step in _steps(model):
            got, state = compress_kv(**there, **_on_npu(step), state=state)
            wide = step | {"x": step["x"].float()}  # the kernel keeps fp32 up to the norm
            want, expected = compress_kv.reference(**model, **wide, state=expected)
            # Rounded once more than the fp32 reference, before the rotation.
            assert (got.cpu().float() - want).norm() <= 4e-3 * want.norm() + 1e-6
            assert_close(state.cpu(), expected, compress_kv.tolerance)
    assert calls("_C_ascend")["_C_ascend::compressor"] == len(STEPS)
