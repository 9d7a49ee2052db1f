"""Which decode steps a plan has captured, and what it says of those that cannot be."""

import pytest

from v4_ascend.config.topology import ParallelConfig, load_topology
from v4_ascend.errors import ConfigError
from v4_ascend.supernode.capture import default_sizes, few_sizes
from v4_ascend.supernode.plan import Rank, plan_of


def sizes(device, *settings, world=1, concurrency=20):
    topology = load_topology(
        "laptop", [f"cluster.device={device}", f"serve.concurrency={concurrency}", *settings]
    )
    ranks = tuple(Rank(rank=r, host="here", layers=(0, 6), experts=(0, 8)) for r in range(world))
    return plan_of(topology, ParallelConfig(tp_size=world), ranks).capture_sizes


def test_a_gpu_captures_few_sequences_closely_and_many_roughly():
    assert sizes("nvidia-h200") == (1, 2, 4, 8, 16, 20)
    assert sizes("nvidia-h200", "runtime.capture_sizes=[]") == ()
    assert sizes("nvidia-h200", "runtime.capture_sizes=[1, 20]") == (1, 20)
    assert default_sizes(1) == (1,)
    assert default_sizes(160)[-4:] == (64, 96, 128, 160)


def test_a_cpu_captures_few_sequences_if_its_kernels_let_it():
    assert sizes("cpu") is None
    assert sizes("cpu", "runtime.capture_sizes=[3]") == (3,)
    assert sizes("cpu", "serve.n_draft_tokens=1") == ()
    assert [few_sizes(n) for n in (1, 3, 8, 20)] == [(1,), (1, 2, 3), (1, 2, 4, 8), (1, 2, 4, 8)]


@pytest.mark.parametrize("device", ["ascend-950dt-96", "cpu-emulated-npu"])
def test_where_none_was_seen_to_capture_none_is_unless_asked(device):
    assert sizes(device) == ()


def test_an_npu_captures_if_asked():
    assert sizes("ascend-950dt-96", "runtime.capture_sizes=[4]") == (4,)


@pytest.mark.parametrize(
    ("device", "settings", "world", "says"),
    [
        ("cpu", ["[1]"], 2, "2 ranks"),
        ("cpu-emulated-npu", ["[1]"], 1, "an emulated NPU"),
        ("nvidia-h200", ["[1]"], 2, "2 ranks"),
        ("nvidia-h200", ["[1]", "serve.n_draft_tokens=1"], 1, "1 draft tokens"),
        ("nvidia-h200", ["[1]", "runtime.kernels=reference"], 1, "references wait"),
        ("nvidia-h200", ["[4, 2]"], 1, "must ascend"),
        ("nvidia-h200", ["[2, 2]"], 1, "must ascend"),
        ("nvidia-h200", ["[1, 21]"], 1, "21 sequences, each DP group serves 20"),
        ("nvidia-h200", ["[0]"], 1, "must be greater than or equal to 1, got 0"),
    ],
)
def test_what_cannot_be_captured_is_refused(device, settings, world, says):
    first, *more = settings
    with pytest.raises(ConfigError, match=says.replace("[", r"\[")):
        sizes(device, f"runtime.capture_sizes={first}", *more, world=world)
