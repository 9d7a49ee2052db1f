"""Accelerator code on machines without the accelerator, and how much that proves.

    from v4_ascend.emulation import install, calls
    install("950dt", devices=2)            # before anything imports torch_npu
    torch.ones(3, device="npu") * 2        # on host memory

The process gets the real torch_npu wheel (its operators' schemas, its Meta kernels, its
caching allocator, its streams API) on libraries we compile once: an ACL over host memory,
and for every other call a function that prints its name and ends the process. One process
is one chip: a2, a3, 950dt or 950pr.

Emulated
    Placement. Tensors live on npu:0, npu:1, ..; mixing devices is refused, and so is what
    does not fit into the device's memory (tensors alone: HCCL and workspaces take none).
    Plain torch operators. The CPU's kernel runs on the same memory, without copies.
    Vendor operators. Stand-ins in `vendor` for `torch_npu.npu_*` and for
    `torch.ops._C_ascend.*`, the operators vllm-ascend builds, only those each chip has.
    They are written from the vendor's documents, not from our references, check shapes,
    dtypes, layouts and chip limits (the vendor's Meta kernels accept most wrong calls), and
    compute in fp32 with one rounding. What the documents call undefined is NaN here.
    Collectives. "hccl" is gloo.
    A call log. `calls()` says how often each operator ran.

Not emulated, so not proven by anything that runs here
    The numbers of the vendor's kernels; our stand-ins say what they should be.
    Limits nobody wrote down, and everything about speed.
    Order: streams are synchronous, so a missing wait goes unnoticed. Graph capture: it aborts.
    Private formats: FRACTAL_NZ is accepted, and is plain order.
    HCCL itself, its buffer sizes and its time-outs. Gradients: the device is for inference.
    V3.2's indexer and attention, on purpose: their causal limit is wrong for V4's
    compressed keys, and a call to them should fail here as loudly as it fails in answers.

`environment` builds the Python environments these packages need, which cannot share one.
"""

from v4_ascend.emulation.call_log import calls, reset_calls
from v4_ascend.emulation.npu import install

__all__ = ["calls", "install", "reset_calls"]
