"""Choosing the highest scores, ties to the lower index, and the gates."""

from mindspore import Tensor, ops
from mindspore import dtype as mstype

WEIGHT_SUM_FLOOR = 1e-20


def lowest_of_highest(scores: Tensor, topk: int) -> Tensor:
    """Ids [n, topk] int32, ascending, of the highest scores; of equal ones the lower ids.

    A top-k kernel's order among equal scores is not defined, its lowest value is.
    """
    threshold = ops.topk(scores, topk)[0][:, topk - 1 : topk]
    above = (scores > threshold).astype(mstype.int32)
    equal = (scores == threshold).astype(mstype.int32)
    vacant = topk - above.sum(-1, keepdims=True)
    taken = equal * (ops.cumsum(equal, -1) <= vacant).astype(mstype.int32)
    n = scores.shape[1]
    index = ops.arange(n).astype(mstype.float32)  # exact up to 2^24
    ids = ops.where(above + taken > 0, index, float(n))
    return ops.sort(ids)[0][:, :topk].astype(mstype.int32)


def index_topk(scores: Tensor, topk: int) -> Tensor:
    """As the op `index_topk`."""
    ids = lowest_of_highest(scores, topk)
    hidden = ops.gather_elements(scores, 1, ids) == float("-inf")
    return ops.where(hidden, -1, ids).astype(mstype.int32)


def _weights(logits: Tensor, ids: Tensor, route_scale: float) -> Tensor:
    chosen = ops.gather_elements(gate_scores(logits), 1, ids)
    total = ops.maximum(chosen.sum(-1, keepdims=True), WEIGHT_SUM_FLOOR)
    return chosen / total * route_scale


def gate_scores(logits: Tensor) -> Tensor:
    """sqrt(softplus(logits)) without overflow."""
    softplus = ops.maximum(logits, 0.0) + ops.log1p(ops.exp(-ops.abs(logits)))
    return ops.sqrt(softplus)


def topk_gate(logits: Tensor, bias: Tensor, topk: int, route_scale: float) -> tuple[Tensor, Tensor]:
    """As the op `topk_gate`."""
    ids = lowest_of_highest(gate_scores(logits) + bias, topk)
    return _weights(logits, ids, route_scale), ids.astype(mstype.int64)


def hash_gate(
    logits: Tensor, tid2eid: Tensor, input_ids: Tensor, route_scale: float
) -> tuple[Tensor, Tensor]:
    """As the op `hash_gate`."""
    ids = ops.gather(tid2eid, input_ids, 0)
    return _weights(logits, ids, route_scale), ids


def swiglu(x: Tensor, limit: float, weight: Tensor | None) -> Tensor:
    """As the op `swiglu`."""
    wide = x.astype(mstype.float32)
    half = wide.shape[-1] // 2
    gate, up = ops.minimum(wide[:, :half], limit), ops.clamp(wide[:, half:], -limit, limit)
    y = gate * ops.sigmoid(gate) * up
    if weight is not None:
        y = y * weight.expand_dims(-1)
    return y.astype(x.dtype)
