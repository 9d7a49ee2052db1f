"""FP8 by arithmetic: MindSpore's CPU target can neither cast to FP8 nor reinterpret bits.

Powers of two and their products are exact in fp32, so the bytes are those of the reference.
"""

from mindspore import Tensor, ops
from mindspore import dtype as mstype

FP8_MAX = 448.0
AMAX_FLOOR = 1e-4
MIN_EXPONENT = -6  # of a normal e4m3; below, steps stay as wide


def ceil_exponent(x: Tensor) -> Tensor:
    """Smallest integer e with 2^e >= x, for positive normal fp32, as fp32.

    A logarithm may miss by one near powers of two; comparing with 2^e does not.
    """
    e = ops.round(ops.log2(x)) - 1.0
    for _ in range(2):
        e = e + (ops.pow(2.0, e) < x).astype(mstype.float32)
    return e


def floor_exponent(x: Tensor) -> Tensor:
    """Largest integer e with 2^e <= x, for positive fp32, as fp32."""
    e = ops.round(ops.log2(x)) + 1.0
    for _ in range(2):
        e = e - (ops.pow(2.0, e) > x).astype(mstype.float32)
    return e


def act_quant(x: Tensor, is_negative: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """As the op `act_quant`: bytes of e4m3 and of e8m0, uint8.

    `is_negative` is uint8 as x: the sign of a zero is part of the bytes.
    """
    shape = x.shape
    groups = x.astype(mstype.float32).reshape(shape[:-1] + (-1, group_size))
    amax = ops.amax(ops.abs(groups), -1)
    exponent = ceil_exponent(ops.maximum(amax, AMAX_FLOOR) * (1.0 / FP8_MAX))
    # 2^-e by halves: for tiny groups 2^-e itself may not fit.
    half = ops.floor(exponent * -0.5)
    scaled = groups * ops.pow(2.0, half).expand_dims(-1)
    scaled = scaled * ops.pow(2.0, -exponent - half).expand_dims(-1)
    magnitude = ops.minimum(ops.abs(scaled), FP8_MAX)
    e = ops.maximum(floor_exponent(ops.maximum(magnitude, 2.0**-20)), float(MIN_EXPONENT))
    steps = ops.round(magnitude * ops.pow(2.0, 3.0 - e))  # 8..16 of a normal, ties to even
    code = (e - MIN_EXPONENT) * 8.0 + steps
    sign = is_negative.reshape(groups.shape).astype(mstype.float32) * 128.0
    return (
        (code + sign).astype(mstype.int32).astype(mstype.uint8).reshape(shape),
        (exponent + 127.0).astype(mstype.int32).astype(mstype.uint8),
    )
