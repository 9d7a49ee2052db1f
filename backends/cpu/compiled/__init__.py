"""Kernels in C++, first to be tried where the package was built with a compiler."""

from v4_ascend.backends.cpu.compiled import attention as attention
from v4_ascend.backends.cpu.compiled import gemm as gemm
from v4_ascend.backends.cpu.compiled import hyper_connection as hyper_connection
from v4_ascend.backends.cpu.compiled import moe as moe
from v4_ascend.backends.cpu.compiled import quant as quant
from v4_ascend.backends.cpu.compiled import rows as rows
