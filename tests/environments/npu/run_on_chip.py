"""Does one thing on one emulated chip, in a process of its own: torch_npu loads once.

    python run_on_chip.py kernels CHIP OUT SHAPES
    python run_on_chip.py record CHIP OUT CHECKPOINT IDS PREFILL CHUNK
    python run_on_chip.py both CHIP OUT CHECKPOINT IDS PREFILL CHUNK FEW_IDS

both records again, of a few tokens, what the chip does where vllm-ascend's package is not
installed: beside OUT, as stock-OUT.

OUT is JSON: for kernels a list of results, and what opcheck says of each vendor operator; for
record the calls of vendor operators, and the record itself lies beside it.
"""

import json
import sys
from pathlib import Path

import torch
from opchecks import FirstCalls, problem
from oracles import wanted

from v4_ascend.backends import BACKENDS
from v4_ascend.backends.ascend import custom_ops, soc
from v4_ascend.checkpoint.reader import Checkpoint
from v4_ascend.emulation import calls, install, reset_calls
from v4_ascend.ops import OPS, use_policy
from v4_ascend.ops.check import assert_close
from v4_ascend.runtime.parity import Recording, read_input_ids, record, write_record

ASCEND = BACKENDS["ascend"]


def _on_npu(inputs):
    return {k: v.to("npu") if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def _outputs(op, inputs, result):
    result = op.canonical(result)
    outputs = list(result) if isinstance(result, tuple) else [result]
    return tuple(o.cpu() for o in [*outputs, *(inputs[name] for name in op.mutates)])


def _run(op, case, kernel):
    """One kernel on one case: its refusal, or the vendor's calls it made and its error."""
    inputs = _on_npu(op.inputs(case))
    op.prepare_inputs(inputs)
    why = kernel.why_not(**inputs)
    found = {"op": op.name, "kernel": kernel.name, "case": case.id, "refused": why, "error": None}
    if why is not None:
        return found
    reset_calls()
    try:
        got = _outputs(op, inputs, kernel.fn(**inputs))
        assert_close(got, wanted(op, case, kernel), op.tolerance)
    except Exception as e:  # noqa: BLE001  # the test that asked wants to see every failure
        found["error"] = f"{type(e).__name__}: {e}"
    return found | {"calls": [*calls("_C_ascend"), *calls("npu")]}


def kernels(out, shapes):
    """Every kernel of the chip on every case of a size; references at tiny ones only."""
    results, made = [], FirstCalls()
    with torch.inference_mode(), use_policy(backend="ascend", kernels="fast"), made:
        tiny = shapes == "tiny"
        for op in OPS.values():
            cases = [c for c in op.cases() if (tiny and not c.models) or shapes in c.models]
            for kernel in op.tried("ascend"):
                if tiny or kernel.provider != "torch":
                    results += [_run(op, case, kernel) for case in cases]
    chip = soc.current_chip()
    calls_made = list(made.calls.values())
    checks = [(f.name(), problem(f, args, kwargs)) for f, args, kwargs in calls_made]
    Path(out).write_text(json.dumps({"chip": chip, "results": results, "opchecks": checks}))


def record_logits(out, folder, ids, prefill, chunk):
    """A parity record of a checkpoint, and what the vendor's operators were called."""
    checkpoint = Checkpoint(Path(folder))
    tokens = read_input_ids(Path(ids), checkpoint.config.vocab_size)
    how = Recording(prefill=int(prefill), chunk=int(chunk), dtype="bf16", backend="ascend")
    reset_calls()
    tensors, metadata = record(checkpoint, tokens, how, lambda done, total: None)
    write_record(Path(out).with_suffix(".safetensors"), tensors, metadata)
    Path(out).write_text(json.dumps(calls("_C_ascend") | calls("npu")))


def record_with_and_without_the_package(out, folder, ids, prefill, chunk, few):
    """As `record_logits`; then with torch_npu's own operators and plain torch alone."""
    record_logits(out, folder, ids, prefill, chunk)
    custom_ops.has_c_ascend = lambda name: False
    custom_ops.why_no_c_ascend = lambda: "left out for a test"
    stock = Path(out).with_name(f"stock-{Path(out).name}")
    record_logits(stock, folder, few, 5, chunk)


if __name__ == "__main__":
    what, chip, *rest = sys.argv[1:]
    install(chip)
    ASCEND.use_chip(None)  # what the emulated device says it is
    both = record_with_and_without_the_package
    {"kernels": kernels, "record": record_logits, "both": both}[what](*rest)
