"""Flash and Pro with their true names, shapes and offsets; the data are holes."""

import json
import subprocess
import sys
import time

import pytest
from layouts import make_plan

from v4_ascend.checkpoint.folder import CheckpointFolder
from v4_ascend.checkpoint.sparse import write_sparse
from v4_ascend.config.model import ModelConfig
from v4_ascend.config.presets import preset_path

TENSORS = {"flash": (69_187, 159_609_485_896), "pro": (145_116, 864_704_792_696)}
LAYOUTS = {
    16: {"pp_size": 2, "dp_size": 4, "tp_size": 2, "ep_size": 8},
    64: {"dp_size": 32, "tp_size": 2, "ep_size": 64},
    384: {"pp_size": 3, "dp_size": 128, "ep_size": 128},
}
SECONDS = 30  # each; the machine of the tests is shared


@pytest.fixture(scope="module", params=["flash", "pro"])
def real(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / request.param
    write_sparse(ModelConfig.read(preset_path(request.param)), folder)
    return folder


def test_they_are_complete_and_take_no_space(real):
    report = CheckpointFolder(real).check()
    assert report.problems == ()
    assert (report.n_tensors, report.nbytes) == TENSORS[real.name]
    assert sum(f.stat().st_blocks for f in real.iterdir()) * 512 < 100e6


@pytest.mark.slow
@pytest.mark.parametrize("n_ranks", [16, 64, 384])
def test_a_dry_run_takes_seconds(real, tmp_path, n_ranks):
    make_plan(real, LAYOUTS[n_ranks]).write(tmp_path / "plan.json")
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "v4_ascend", "shard", str(real), "--plan", tmp_path / "plan.json"]
        + ["--out", tmp_path / "out", "--dry-run", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert time.monotonic() - begun < SECONDS
    said = json.loads(done.stdout)
    data = said["data"]
    assert len(data["ranks"]) == n_ranks
    # All but the drafter is on some rank.
    assert data["bytes_to_write"] > 0.9 * TENSORS[real.name][1]
    assert done.returncode == (data["bytes_to_write"] > data["bytes_free"])
    assert not (tmp_path / "out").exists()
