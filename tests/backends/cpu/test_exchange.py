"""All-to-all and all-gather bring the same rows in the same order, and sum the same bits."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from v4_ascend.backends.exchange import exchange_rows, exchange_tokens
from v4_ascend.ops import fp8_round_trip, moe_combine, moe_dispatch

N_EXPERTS, TOPK, DIM = 8, 3, 256


class Together:
    """A group of threads."""

    def __init__(self, size):
        self.size, self.board = size, [None] * size
        self.barrier = threading.Barrier(size)

    def share(self, rank, value):
        self.board[rank] = value
        self.barrier.wait(timeout=20)
        seen = list(self.board)
        self.barrier.wait(timeout=20)
        return seen


class Member:
    def __init__(self, together, rank):
        self.together, self.rank, self.size = together, rank, together.size

    def all_gather(self, x, sizes=None):
        return self.together.share(self.rank, x)

    def all_reduce(self, x):
        return torch.stack(self.together.share(self.rank, x)).sum(0)

    def all_to_all(self, parts, sizes):
        got = [parts_of[self.rank] for parts_of in self.together.share(self.rank, list(parts))]
        assert [len(p) for p in got] == list(sizes)
        return got


def run(size, dispatch, combine, inputs, fp8):
    together, out = Together(size), [None] * size

    def work(rank):
        group, (x, ids, weights) = Member(together, rank), inputs[rank]
        rows, *rest = dispatch(x, ids, weights, N_EXPERTS, group, fp8)
        scaled = rows * 1.5 + rest[0].unsqueeze(1)
        out[rank] = (rows, *rest, combine(scaled, rest[2], TOPK, rest[3], group))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=60)
    return out


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("tokens", [(5, 0, 7, 2), (0, 0, 0, 0), (1, 1)])
def test_both_ways_give_the_same_bits(tokens, fp8):
    g = torch.Generator().manual_seed(4)
    inputs = [
        (
            torch.randn(n, DIM, generator=g),
            torch.rand(n, N_EXPERTS, generator=g).argsort(-1)[:, :TOPK].contiguous(),
            torch.rand(n, TOPK, generator=g),
        )
        for n in tokens
    ]
    want = run(len(tokens), moe_dispatch.reference, moe_combine.reference, inputs, fp8)
    got = run(len(tokens), exchange_tokens, exchange_rows, inputs, fp8)
    for a, b in zip(got, want, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@given(st.integers(0, 2**32), st.sampled_from([torch.float32, torch.bfloat16]))
def test_rounding_twice_is_rounding_once(seed, dtype):
    """So experts that round their input see no difference in rows that travelled rounded."""
    g = torch.Generator().manual_seed(seed)
    octave = torch.randint(-40, 30, (4, 256), generator=g).float()
    x = (torch.randn(4, 256, generator=g) * torch.exp2(octave)).to(dtype)
    once = fp8_round_trip(x, 128, 0)
    assert torch.equal(fp8_round_trip(once, 128, 0), once)
