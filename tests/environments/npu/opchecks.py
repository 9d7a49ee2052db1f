"""Every vendor operator that is called, as opcheck sees it: the stand-in against a Meta kernel.

The Meta kernels are torch_npu's own, and for `_C_ascend` those of v4_ascend/emulation/meta.py.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NPU = "npu:0"
NAMESPACES = ("_C_ascend", "npu")
WITHOUT_META = {"npu::npu_format_cast"}  # test_schemas.py has what it returns


class FirstCalls(TorchDispatchMode):
    """Keeps each vendor operator's first call, with copies of its tensors as they came in."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        known = self.calls.keys() | WITHOUT_META
        is_new = func.namespace in NAMESPACES and func.name() not in known
        # A call without rows says nothing of the outputs' widths.
        if is_new and all(t.numel() for t in _tensors(args, kwargs)):
            self.calls[func.name()] = (func, *tree_map(_copy, (args, kwargs)))
        return func(*args, **kwargs)


def _tensors(*arguments):
    return [x for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)]


def _copy(x):
    if not isinstance(x, torch.Tensor):
        return x
    with torch.inference_mode(False):
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def problem(op, args, kwargs):
    """None if an operator passes opcheck, else what it says."""
    # test_schema multiplies its inputs to compare them, which torch cannot do in fp8.
    narrow = any(x.dtype.itemsize == 1 for x in _tensors(args, kwargs))
    with torch.inference_mode(False):
        for test in ("test_faketensor", "test_schema")[: 1 if narrow else 2]:
            try:
                torch.library.opcheck(op, args, kwargs, test_utils=test)
            except Exception as e:  # noqa: BLE001  # whatever it is, the test that asked says it
                return f"{test}: {type(e).__name__}: {e}"
    return None
