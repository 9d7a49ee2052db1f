"""Recorded calls, made again after their inputs changed, give what the function gives."""

import pytest
import torch

from v4_ascend.backends.cpu.compiled import library
from v4_ascend.backends.cpu.recorder import record_calls
from v4_ascend.errors import CaptureError
from v4_ascend.ops import rms_norm, swiglu


def accumulated(x, ids):
    total = torch.zeros(len(x))  # written to, so it has to be cleared again
    total += x.sum(-1)
    start = torch.full((len(x),), 2.0)
    start.add_(total)
    return start


FUNCTIONS = {
    "products": lambda x, ids: torch.nn.functional.linear(x, x[:3]) @ x[:3, :2],
    "batched": lambda x, ids: torch.bmm(x.unflatten(1, (2, -1)).transpose(0, 1), x.view(2, 5, 4)),
    "views": lambda x, ids: x.t()[1:].contiguous().flatten()[3:].view(-1)[:5] * 2,
    "copies": lambda x, ids: x.to(torch.bfloat16).float().clone(),
    "looked up": lambda x, ids: x[ids] + x.index_select(0, ids),
    "two results": lambda x, ids: x.topk(3).values + x.topk(3).indices,
    "joined": lambda x, ids: torch.cat((x, x.repeat(1, 2)), dim=1),
    "constants": lambda x, ids: x * torch.tensor([2.0]) + torch.arange(10),
    "in place": accumulated,
    "compiled": lambda x, ids: swiglu(rms_norm(x, torch.ones(10), 1e-6), 7.0, None),
}


def inputs(seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(4, 10, generator=g), torch.randint(0, 4, (6,), generator=g)


@pytest.mark.parametrize("name", FUNCTIONS)
@torch.inference_mode()
def test_calls_made_again_see_new_inputs(name):
    x, ids = inputs(0)
    result, replay = record_calls(lambda: FUNCTIONS[name](x, ids))
    assert torch.equal(result, FUNCTIONS[name](*inputs(0)))
    for seed in (1, 2):
        for place, value in zip((x, ids), inputs(seed), strict=True):
            place.copy_(value)
        replay()
        assert torch.equal(result, FUNCTIONS[name](*inputs(seed)))


READS = {
    "a value": lambda x: x * x.sum().item(),
    "a condition": lambda x: x if x[0, 0] > 0 else -x,
    "a list": lambda x: x * x[0].tolist()[0],
    "how many": lambda x: x[x > 0],
    "where": lambda x: x.flatten()[x.flatten().nonzero()],
    "counts": lambda x: x.repeat_interleave(torch.tensor([1, 2, 1, 0]), dim=0),
}


@pytest.mark.parametrize("name", READS)
@torch.inference_mode()
def test_what_depends_on_values_is_refused(name):
    with pytest.raises(CaptureError, match="on the host|depends on values"):
        record_calls(lambda: READS[name](inputs(0)[0]))
    assert not library._recorders
