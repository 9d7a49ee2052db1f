"""What our launch functions launch at the real widths: kernels and specialisations."""

from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from v4_ascend.backends.cuda import limits as cuda
from v4_ascend.backends.triton import limits as shared
from v4_ascend.ops import OPS, use_policy

FOLDERS = {"triton": shared.MODULES, "cuda": cuda.MODULES}

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
}


@dataclass(frozen=True)
class Launch:
    """One specialisation of one kernel."""

    fn: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self):
        constants = ",".join(f"{k}={v}" for k, v in self.constants)
        types = ",".join(t for _, t in self.signature if t.startswith("*"))
        return f"{self.fn.__name__}[{constants}]({types})"


@contextmanager
def recording():
    """Note launches instead of making them."""
    seen = {}

    def run(self, *args, grid=None, warmup=False, **kwargs):
        values = dict(zip(self.arg_names, args, strict=False))
        values |= {k: kwargs.pop(k) for k in list(kwargs) if k in self.arg_names}
        types = {p.name: _type(p, values[p.name]) for p in self.params}
        constants = {p.name: values[p.name] for p in self.params if p.is_constexpr}
        launch = Launch(self, *(tuple(d.items()) for d in (types, constants, kwargs)))
        seen[launch.name, launch.options] = launch

    original, JITFunction.run = JITFunction.run, run
    try:
        yield seen
    finally:
        JITFunction.run = original


def _type(parameter, value):
    if parameter.is_constexpr:
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def launches_of(op_name, folder="triton"):
    """Every specialisation that an operator's Flash and Pro cases launch of a folder's kernels."""
    op = OPS[op_name]
    module = next(m for m, ops in FOLDERS[folder].items() if op_name in ops)
    launch = getattr(import_module(f"v4_ascend.backends.{folder}.{module}"), op_name)
    refuses = FOLDERS[folder][module][op_name] or (lambda **_: None)
    with recording() as seen, torch.inference_mode(), use_policy(backend="cuda"):
        for case in op.cases():
            if not case.models:
                continue
            inputs = op.inputs(case)
            op.prepare_inputs(inputs)
            if not refuses(**inputs):
                launch(**inputs)
    return list(seen.values())
