import os
import sys
from pathlib import Path

# Before anything imports triton: its own library is then built for the interpreter too. With
# TRITON_INTERPRET=0, on a machine with a GPU, the same tests run the kernels on it.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

# What a machine may lack. A test skipped for any other reason fails.
MAY_LACK = {
    "network namespaces need root and iproute2",
    "no chromium or google-chrome in PATH: the page is tried in a real browser",
    "no hadolint in PATH: its rules are in tests/dockerfiles.py",
    "no buildah in PATH: RUN lines are executed in a copy-on-write root",
    "RUN lines are executed as root, with mount namespaces and overlayfs",
}


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run real V4 widths and long drills too")
    parser.addoption(
        "--environment",
        help="run the tests of one of v4_ascend.emulation.environment, and no others",
    )


def pytest_ignore_collect(collection_path, config):
    """Tests of an environment need its packages: they run in it, and nothing else does."""
    wanted = config.getoption("--environment")
    root = Path(__file__).parent / "environments"
    inside = collection_path.is_relative_to(root) and collection_path != root
    if wanted is None:
        return True if inside else None
    ours = root / wanted.replace("-", "_")
    if not ours.is_dir():
        raise pytest.UsageError(f"--environment {wanted}: no folder {ours}")
    on_the_way = ours.is_relative_to(collection_path)
    return None if on_the_way or collection_path.is_relative_to(ours) else True


def pytest_collection_modifyitems(config, items):
    """Slow tests are left out, not skipped: a skip would have to be excused.

    Or they come first, and at the end there is something quick left for every process.
    """
    if config.getoption("--slow"):
        items.sort(key=lambda item: "slow" not in item.keywords)
        return
    slow = [item for item in items if "slow" in item.keywords]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if "slow" not in item.keywords]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if reason not in MAY_LACK:
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid}: skipped ({reason}), which conftest.py does not allow"
    return report


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Memory our code allocates and forgets to write is NaN, not whatever was there."""

    def nan_filled(make):
        def empty(*args, **kwargs):
            out = make(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("v4_ascend.") and out.dtype in (torch.float32, torch.bfloat16):
                out.fill_(float("nan"))
            return out

        return empty

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, nan_filled(getattr(owner, name)))
