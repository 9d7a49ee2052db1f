"""Our Triton kernels and the functions that launch them, for CUDA and triton-ascend alike.

Importing this package needs nothing; its modules import triton. Kernels are plain Triton: no
inline assembly and no vendor library. One-byte formats arrive as bytes and are decoded by
their bits, since not every Triton knows FP8.
"""
