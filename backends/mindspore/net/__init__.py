"""V4's operators in MindSpore: pure functions of MindSpore tensors and plain numbers.

Everything is fp32 inside. They use what both the CPU and the Ascend target have: basic
`mindspore.ops` (fused ones such as RmsNorm or GroupedMatmul have no CPU kernel, the last of
them without saying so).
"""
