"""What CUDA runs: every Triton launch function, and plain torch where that is the right choice."""

from __future__ import annotations

from v4_ascend.backends.triton.limits import MODULES
from v4_ascend.backends.triton.registry import register
from v4_ascend.ops import OPS

# They move rows, talk to other ranks, or draw one token a sequence: torch does it on the device.
PLAIN_TORCH = ("moe_permute", "moe_unpermute", "moe_dispatch", "moe_combine", "sample")

for _module, _ops in MODULES.items():
    for _op, _refuses in _ops.items():
        register(OPS[_op], _module, _refuses)
for _op in PLAIN_TORCH:
    OPS[_op].kernel("cuda", provider="torch")(OPS[_op].reference)
