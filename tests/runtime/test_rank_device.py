"""A rank computes on the device that the plan gives it, not on its host's first one."""

from types import SimpleNamespace

import pytest
import torch

from v4_ascend.runtime import worker


@pytest.mark.parametrize(
    ("kind", "index", "device", "chosen"),
    [("cuda", 3, "cuda:3", [3]), ("cuda", 0, "cuda", []), ("cpu", 3, "cpu", [])],
)
def test_a_rank_takes_the_plan_s_device(monkeypatch, kind, index, device, chosen):
    told = []
    monkeypatch.setattr(worker, "find_backend", lambda *_: SimpleNamespace(device=lambda: kind))
    module = SimpleNamespace(set_device=told.append)
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    plan = SimpleNamespace(backend=kind, ranks=[None, SimpleNamespace(device=index)])
    assert worker._device(plan, 1) == torch.device(device)
    assert told == chosen
