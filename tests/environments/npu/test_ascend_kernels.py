"""Every Ascend kernel on every case, per chip, on emulated NPUs.

The calls are checked by the vendor's schemas and by validators written from its documents;
the numbers are those of CPU stand-ins. See oracles.py for what they are compared with.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from test_schemas import CALLS as SCHEMA_CALLS

from v4_ascend.backends import BACKENDS
from v4_ascend.backends.ascend import soc
from v4_ascend.emulation.stand_in import STAND_INS
from v4_ascend.ops import OPS

RUNNER = Path(__file__).with_name("run_on_chip.py")
EMULATED = {"a2": "a2", "a3": "a3", "950": "950dt"}
ELSEWHERE = {
    "npu::npu_format_cast": "torch_npu has no Meta kernel for it; test_schemas.py",
    "npu::npu_moe_distribute_dispatch_v2": "needs other ranks; test_mc2.py",
    "npu::npu_moe_distribute_combine_v2": "needs other ranks; test_mc2.py",
}
FUSED = {"_C_ascend::dispatch_ffn_combine"}  # of the A3, with other ranks: test_mc2.py
# They refuse one rank, and so every case: test_mc2, test_expert_layer and
# tests/backends/cpu/test_exchange have more.
OF_MANY_RANKS = (
    "distribute_dispatch",
    "distribute_combine",
    "exchange_tokens",
    "exchange_rows",
    "dispatch_ffn_combine",
)


def _kernels():
    for chip in soc.CHIPS:
        for op in OPS.values():
            for kernel in soc.kernels_of(op, chip):
                if kernel.provider == "triton" or kernel.name in OF_MANY_RANKS:
                    continue  # triton's are another environment's, and interpreted with CUDA's
                yield pytest.param(chip, op, kernel, id=f"{chip}-{op.name}-{kernel.name}")


@pytest.fixture(scope="session")
def answers(tmp_path_factory):
    """Return a function: what a chip's kernels did on cases of a size, asked once."""

    @cache
    def ask(chip, shapes):
        out = tmp_path_factory.mktemp("chip") / f"{chip}-{shapes}.json"
        done = subprocess.run(
            [sys.executable, str(RUNNER), "kernels", EMULATED[chip], str(out), shapes],
            env=os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(out.read_text())
        assert found["chip"] == chip  # read off the emulated device
        return found

    return ask


@pytest.fixture(scope="session")
def results(answers):
    """Return a function: each kernel of a chip on each case of a size."""
    return lambda chip, shapes: answers(chip, shapes)["results"]


@pytest.fixture(scope="session")
def opchecks(answers):
    """Return a function: what opcheck said of each vendor operator a chip was asked for."""
    return lambda chip: [tuple(c) for s in ("tiny", "flash") for c in answers(chip, s)["opchecks"]]


def _of(results, op, kernel):
    return [r for r in results if (r["op"], r["kernel"]) == (op.name, kernel.name)]


def _runs():
    for of_chip in _kernels():
        for shapes in ("tiny", "flash", "pro"):
            # Where the kernel is the reference, real widths prove no more than tiny ones.
            if shapes == "tiny" or of_chip.values[2].provider != "torch":
                marks = [pytest.mark.slow] if shapes == "pro" else []
                yield pytest.param(
                    *of_chip.values, shapes, id=f"{of_chip.id}-{shapes}", marks=marks
                )


@pytest.mark.parametrize(("chip", "op", "kernel", "shapes"), list(_runs()))
def test_kernels_are_the_reference(results, chip, op, kernel, shapes):
    mine = _of(results(chip, shapes), op, kernel)
    assert mine
    assert [f"{r['case']}: {r['error']}" for r in mine if r["error"]] == []


@pytest.mark.parametrize(("chip", "op", "kernel"), list(_kernels()))
def test_a_kernel_accepts_some_case(results, chip, op, kernel):
    """One that refuses everything is never tested; V4's own widths are what it is for."""
    mine = _of(results(chip, "flash") + results(chip, "tiny"), op, kernel)
    refusals = {r["refused"] for r in mine}
    expected = op.name in soc.absent(chip)
    assert (None in refusals) is not expected, refusals
    if expected:
        assert all("no fp8" in why for why in refusals)


@pytest.mark.parametrize("chip", soc.CHIPS)
def test_a_kernel_makes_the_calls_its_row_names(results, chip):
    """And no others: the table says what runs."""
    found = results(chip, "flash") + results(chip, "tiny")
    left_out = {r.kernel for r in soc.TRITON} | set(OF_MANY_RANKS)
    for row in (r for r in soc.TABLE if chip in r.chips and r.kernel not in left_out):
        mine = [r for r in found if (r["op"], r["kernel"]) == (row.op, row.kernel)]
        calls = {c for r in mine if not r["refused"] for c in r["calls"]}
        assert calls == {row.vendor, *row.beside}, row


@pytest.mark.parametrize("chip", soc.CHIPS)
def test_stand_ins_return_what_meta_kernels_say(opchecks, chip):
    """On the calls our kernels make: torch_npu's own Meta, and for `_C_ascend` ours."""
    assert [(name, why) for name, why in opchecks(chip) if why] == []


@pytest.mark.parametrize("chip", soc.CHIPS)
def test_every_operator_of_a_chip_is_opchecked(opchecks, chip):
    """Here or, of torch_npu's, in test_schemas.py, on the same stand-ins."""
    alone = {f"npu::{name}" for name, _, _ in SCHEMA_CALLS} | set(ELSEWHERE)
    there = {s.name for s in STAND_INS.values() if chip in s.generations}
    assert there - {name for name, _ in opchecks(chip)} - alone == (
        FUSED if chip == "a3" else set()
    )
    assert set(ELSEWHERE) <= there


@pytest.mark.parametrize("chip", soc.CHIPS)
def test_v32_operators_are_never_called(results, chip):
    made = {c for s in ("tiny", "flash") for r in results(chip, s) for c in r.get("calls", ())}
    assert made
    assert not {c for c in made if c.partition("::")[2] in soc.NEVER}


def test_the_backend_reads_the_chip_off_the_device():
    assert BACKENDS["ascend"].why_unavailable() is None
    BACKENDS["ascend"].use_chip(None)
    assert soc.current_chip() == "950"
