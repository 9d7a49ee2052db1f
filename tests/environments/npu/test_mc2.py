"""The vendor's fused dispatch and combine between real processes, per chip, emulated."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("mc2_ranks.py")
SIZES = {"a2": 4, "a3": 3, "950dt": 2}
ONCE = {"moe_distribute_dispatch_v2": 1, "moe_distribute_combine_v2": 1}
REFUSALS = {
    "dtype": "x.dtype is torch.float32; it must be bfloat16, float16",
    "ids": "expert_ids.dtype is torch.int64; it must be int32",
    "twice": "expert_ids is twice the same in a row",
    "batch": "BS is 800; it must be 1 to ",
    "ranks": "of the 5 ranks|group_ep has",
    "rank": "this is rank 0 of group_ep",
    "group": "group_ep is 'hccl_world_group'; it must name an HCCL communicator",
    "no group": "group_ep is ''; it must name an HCCL communicator",
    "width": "H is 1000; it must be ",
    "mask": "x_active_mask is",
    "quant": "quant_mode is 2; it must be 0",
    "shared": "shared_expert_rank_num is 1; it must be 0",
    "experts": "moe_expert_num is 13; it must be a multiple of",
    "differ": "global_bs is .* it must be the same on every rank of group_ep",
    "scales": "expert_scales is ",
    "other info": "assist_info_for_combine is another tensor; what dispatch returned",
    "few rows": r"expand_x.shape\[0\] is 1; A is ",
    "fp32 rows": "x.dtype is torch.float32; it must be bfloat16, float16",
}


LAYER_REFUSALS = {
    "ids": "expert_idx is outside; 0 to 12, which is nobody",
    "rows": "max_output_size is 1; .* rows arrive",
    "out": "out.dtype is torch.float32; it must be bfloat16",
    "group": "group is 'hccl_world_group'; it must name an HCCL communicator",
    "depth": r"weight1.shape is \[4, 1024, 128\]; it must be \[any, 512, any\]",
    "nobody": r"len\(weight1\) is 0; one tensor for all experts, or one each",
}


@pytest.fixture(scope="module", params=SIZES)
def chip(request):
    return request.param


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, chip):
    """What each rank of a chip saw, its processes run once."""
    out = tmp_path_factory.mktemp(chip)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    size = SIZES[chip]
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), chip, str(r), str(size), str(port), str(out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        )
        for r in range(size)
    ]
    try:
        outputs = [p.communicate(timeout=200)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()
    assert not any(p.returncode for p in processes), "\n".join(o[-2000:] for o in outputs)
    return [json.loads((out / f"{r}.json").read_text()) for r in range(size)]


def test_rows_are_the_references_and_the_operators_are_called_where_they_can_be(ranks):
    """The ranks compared the rows; alike, uneven with one idle, nobody's, too many."""
    for seen in ranks:
        alike, uneven, nobodys, too_many = seen["calls"]
        assert alike == {name: 2 * n for name, n in ONCE.items()}  # once more to prove the order
        assert uneven == ONCE
        assert not nobodys.keys() & ONCE.keys()
        assert not too_many.keys() & ONCE.keys()


@pytest.mark.parametrize("what", REFUSALS)
def test_a_call_that_the_vendors_page_rules_out_is_refused(ranks, chip, what):
    said = ranks[0]["said"][what]
    if (chip, what) == ("950dt", "scales"):  # which alone may have them or not
        assert said == "accepted"
        return
    assert re.search(REFUSALS[what], said), said


def test_rows_in_another_order_are_found_at_the_first_call(ranks):
    for seen in ranks:
        assert "rows do not arrive by expert, rank and token" in seen["misordered"]


def test_a_whole_layer_is_one_call_where_it_can_be(ranks, chip):
    """The ranks compared sums and counts; nobody's tokens and too many go by parts."""
    for seen in ranks:
        assert seen["whole"] == ([1, 1, 0, 0] if chip == "a3" else [])


@pytest.mark.parametrize("kind", ["int8", "bf16"])
def test_the_fused_layer_is_the_references_experts(ranks, chip, kind):
    """The ranks compared rows and counts; here, what it refuses. Only the A3 has it."""
    for seen in ranks:
        if chip != "a3":
            assert seen["layer"] is None
            continue
        for what, said in seen["layer"][kind].items():
            assert re.search(LAYER_REFUSALS[what], said), (what, said)
        assert seen["layer"][kind].keys() == LAYER_REFUSALS.keys()
