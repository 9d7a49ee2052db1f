"""Norms and rotary embedding."""

from mindspore import Tensor, ops
from mindspore import dtype as mstype


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """Scale the last dim to unit root mean square, in fp32."""
    wide = x.astype(mstype.float32)
    return wide * ops.rsqrt(ops.square(wide).mean(-1, keep_dims=True) + eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the op `rms_norm`."""
    return (unit_rms(x, eps) * weight).astype(x.dtype)


def head_rms_norm(q: Tensor, eps: float) -> Tensor:
    """As the op `head_rms_norm`; fp32 inside."""
    return unit_rms(q, eps).astype(q.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """Rotate the last dims of [n_tokens, (n_heads,) head_dim]; sign -1 turns back."""
    width = 2 * cos.shape[-1]
    # As a graph, MindSpore's CPU target cannot slice bf16; through fp32 and back is exact.
    wide = x.astype(mstype.float32)
    turned = wide[..., x.shape[-1] - width :]
    sin = sin * sign
    if x.ndim == 3:
        cos, sin = cos.expand_dims(1), sin.expand_dims(1)
    a, b = turned[..., 0::2], turned[..., 1::2]
    turned = ops.stack((a * cos - b * sin, a * sin + b * cos), -1).reshape(turned.shape)
    if width < x.shape[-1]:
        turned = ops.cat((wide[..., : x.shape[-1] - width], turned), -1)
    return turned.astype(x.dtype)
