"""What a vendor's kernel should return, with no more rounding than it does.

The references round where DeepSeek's published kernels do: probabilities to bf16, pooled rows
before their norm, an activation before it is quantised. Fused kernels keep these in fp32, and are
then further from the reference than its tolerance, which is meant for kernels that round at the
same places. So they are held to the same tolerance around the same reference, computed in fp32 up
to the roundings that the vendor's call has too. One kernel rounds once more than its reference.
"""

import torch

from v4_ascend.ops import compress_kv, grouped_int8_gemm, rope, swiglu, swiglu_act_quant
from v4_ascend.ops.formats import quantize_int8


def _attended_in_fp32(op, inputs):
    return op.reference(**inputs | {"q": inputs["q"].float()}).to(inputs["q"].dtype)


def _compressed_in_fp32(op, inputs):
    x, cos, sin = inputs["x"], inputs["cos"], inputs["sin"]
    still = {"x": x.float(), "cos": torch.ones_like(cos), "sin": torch.zeros_like(sin)}
    rows, state = op.reference(**inputs | still)
    return rope.reference(rows.to(x.dtype), cos, sin), state


def _product_in_bf16(inputs):
    """What the stock product of INT4 leaves of it: bf16 at most."""
    rest = {k: v for k, v in inputs.items() if k != "limit"}
    product = grouped_int8_gemm.reference(**rest, out_dtype=torch.bfloat16)
    return quantize_int8(swiglu.reference(product.float(), inputs["limit"], None))


def wanted(op, case, kernel):
    """Outputs in the contract's order, what the call mutates last."""
    inputs = op.inputs(case)
    fuses = kernel.provider == "_C_ascend"
    if fuses and op.name == "sparse_attn":
        result = _attended_in_fp32(op, inputs)
    elif fuses and op is swiglu_act_quant:
        result = op.reference(**inputs | {"x": inputs["x"].float()})
    elif fuses and op is compress_kv:
        result = _compressed_in_fp32(op, inputs)
    elif kernel.name == "grouped_matmul_int4_to_bf16":
        result = _product_in_bf16(inputs)
    else:
        result = op.reference(**inputs)
    result = op.canonical(result)
    outputs = result if isinstance(result, tuple) else (result,)
    return (*outputs, *(inputs[name] for name in op.mutates))
