"""HCCL call sites on two ranks of gloo, under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).with_name("collectives_worker.py")


def test_two_ranks():
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    done = subprocess.run(
        [*command, str(WORKER)],
        capture_output=True, text=True, check=False, timeout=240,
        env=os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(done.stdout.split()) == ["rank0-done", "rank1-done"]
