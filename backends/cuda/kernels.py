"""What CUDA runs: kernels for its tensor cores, the shared Triton ones, and plain torch."""

from __future__ import annotations

from v4_ascend.backends.cuda import limits
from v4_ascend.backends.triton.limits import MODULES
from v4_ascend.backends.triton.registry import register
from v4_ascend.ops import OPS

# They talk to other ranks, draw a token a sequence, are cuBLAS's own, or the host's: plain torch.
PLAIN_TORCH = ("moe_dispatch", "moe_combine", "sample", "heads_gemm", "linear", "new_rows")

for _folder, _modules in (("cuda", limits.MODULES), ("triton", MODULES)):
    for _module, _ops in _modules.items():
        for _op, _refuses in _ops.items():
            register(OPS[_op], f"{_folder}.{_module}", _refuses)
for _op in PLAIN_TORCH:
    OPS[_op].kernel("cuda", provider="torch")(OPS[_op].reference)
