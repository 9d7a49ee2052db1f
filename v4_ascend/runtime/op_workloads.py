"""What a step asks of each operator at a model's widths, and the least that it costs.

A workload is one step of one layer on one device: so many sequences that decode a token each
behind a context, or one that prefills a chunk. The bytes of a call are those of a perfect kernel:
every input read once, every output written once, in the formats the checkpoint has; its
operations are those of its products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from v4_ascend.config.model import ModelConfig
from v4_ascend.ops.compress_kv import row_positions, state_rows
from v4_ascend.ops.ragged import max_new_rows
from v4_ascend.ops.records import INDEX_FP4_GROUP, KV_GROUP, RECORDS
from v4_ascend.ops.rope import rope_freqs, rope_table
from v4_ascend.runtime.workload import BF16, Maker, Workload

Unit = Literal["fp32", "bf16", "fp8"]
FP32 = torch.float32
BLOCK = 128  # tokens of a cache page
MAX_SCORES = 1 << 28  # of one call of index_topk: 1 GiB


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an operator.

    Attributes:
        what: which of the layer's calls of this operator.
        make: its arguments, fresh ones at each call, weights and caches too.
        nbytes, operations: of a perfect kernel; multiplications and additions count as two.
        unit: what the products would run in.
    """

    op: str
    what: str
    make: Callable[[], dict[str, Any]]
    nbytes: float
    operations: float = 0.0
    unit: Unit = "bf16"


def calls(
    config: ModelConfig, work: Workload, make: Maker, kv_record: str, index_record: str
) -> Iterator[Call]:
    """The calls of one CSA and one HCA layer whose experts are all on this device."""
    yield from _streams(config, work, make)
    yield from _compression(config, work, make)
    yield from _indexer(config, work, make, index_record)
    yield from _attention(config, work, make, kv_record)
    yield from _products(config, work, make)
    yield from _experts(config, work, make)


def _streams(c: ModelConfig, work: Workload, make: Maker) -> Iterator[Call]:
    n, hc = work.n, c.hc_mult
    x, n_mixes, flat = n * c.dim * 2, hc * (2 + hc), hc * c.dim
    mixing = 2.0 * n * n_mixes * flat
    nbytes = hc * x + x + n_mixes * flat * 4
    yield Call("hc_pre", "", partial(_hc_pre, c, n, make), nbytes, mixing)
    yield Call("hc_post", "", partial(_hc_post, c, n, make), x + 2 * hc * x)
    yield Call("rms_norm", "", partial(_rms_norm, c, n, make), 2 * x + c.dim * 4)
    quant = partial(_quant, c, n, make)
    yield Call("act_quant", "", quant, n * c.dim * (2 + 1 + 1 / 128))


def _hc_pre(c: ModelConfig, n: int, make: Maker) -> dict[str, Any]:
    n_mixes, flat = c.hc_mult * (2 + c.hc_mult), c.hc_mult * c.dim
    return {
        "x": make.normal(n, c.hc_mult, c.dim),
        "fn": make.normal(n_mixes, flat, dtype=FP32, scale=flat**-0.5),
        "scale": make.normal(3, dtype=FP32),
        "base": make.normal(n_mixes, dtype=FP32),
        "norm_eps": c.norm_eps,
        "hc_eps": c.hc_eps,
        "sinkhorn_iters": c.hc_sinkhorn_iters,
    }


def _hc_post(c: ModelConfig, n: int, make: Maker) -> dict[str, Any]:
    return {
        "x": make.normal(n, c.dim),
        "residual": make.normal(n, c.hc_mult, c.dim),
        "post": make.normal(n, c.hc_mult, dtype=FP32),
        "comb": make.normal(n, c.hc_mult, c.hc_mult, dtype=FP32),
    }


def _rms_norm(c: ModelConfig, n: int, make: Maker) -> dict[str, Any]:
    weight = make.normal(c.dim, dtype=FP32)
    return {"x": make.normal(n, c.dim), "weight": weight, "eps": c.norm_eps}


def _quant(c: ModelConfig, n: int, make: Maker) -> dict[str, Any]:
    return {"x": make.normal(n, c.dim), "group_size": 128}


def _compression(c: ModelConfig, work: Workload, make: Maker) -> Iterator[Call]:
    for what, ratio, head in (
        ("CSA", 4, c.head_dim),
        ("CSA indexer", 4, c.index_head_dim),
        ("HCA", 128, c.head_dim),
    ):
        wide = head * (2 if ratio == 4 else 1)
        reach = 2 * ratio if ratio == 4 else ratio  # tokens a row is made of
        n_rows = work.batch * ((work.context + work.tokens) // ratio - work.context // ratio)
        kept = work.batch * min(work.tokens, state_rows(ratio, ratio == 4))
        read = n_rows * reach * 2 * wide * 4 if work.tokens == 1 else 0
        nbytes = work.n * c.dim * 2 + 2 * wide * c.dim * 2 + read + kept * 2 * wide * 4
        nbytes += max_new_rows(work.n, work.batch, ratio) * head * 2
        inputs = partial(_compress, c, work, make, ratio, head, wide)
        yield Call("compress_kv", what, inputs, nbytes, 2.0 * work.n * c.dim * 2 * wide)


def _compress(
    c: ModelConfig, work: Workload, make: Maker, ratio: int, head: int, wide: int
) -> dict[str, Any]:
    lengths = make.lengths(work)
    done = row_positions(lengths["seq_lens"].cpu(), lengths["cu_seqlens"].cpu(), ratio)
    spare = max_new_rows(work.n, work.batch, ratio) - len(done)
    freqs = rope_freqs(c.rope_head_dim, c.compress_rope_theta)
    cos, sin = rope_table(torch.tensor(done + [0] * spare, dtype=torch.int64), freqs)
    rows = state_rows(ratio, ratio == 4)
    return lengths | {
        "x": make.normal(work.n, c.dim),
        # Widened from the checkpoint's bf16, as the model has them.
        "wkv": make.normal(wide, c.dim, scale=c.dim**-0.5).float(),
        "wgate": make.normal(wide, c.dim, scale=c.dim**-0.5).float(),
        "ape": make.normal(ratio, wide, dtype=FP32),
        "norm_weight": make.normal(head).float(),
        "cos": cos.to(make.device),
        "sin": sin.to(make.device),
        "state": make.normal(work.batch, rows, 2 * wide, dtype=FP32),
        "state_slots": torch.arange(work.batch, device=make.device),
        "compress_ratio": ratio,
        "norm_eps": c.norm_eps,
    }


def _width(record: str, dim: int) -> int:
    kind = RECORDS[record]
    return kind.data_bytes + kind.tail_bytes or dim * kind.dtype.itemsize


def _indexer(c: ModelConfig, work: Workload, make: Maker, record: str) -> Iterator[Call]:
    n_rows = (work.context + work.tokens) // 4
    if n_rows <= c.index_topk:
        return  # every row is chosen: the model asks nobody
    queries = work.n * c.index_n_heads * (c.index_head_dim + 1) * 2
    keys = work.distinct(work.seen(4), 4) * _width(record, c.index_head_dim)
    products = 2.0 * work.n * c.index_n_heads * c.index_head_dim * work.seen(4)
    rotated = partial(_queries, c, work.n, make)
    moved = work.n * c.index_n_heads * c.index_head_dim * 2 * 2
    yield Call("hadamard", "", rotated, moved)
    yield Call("fp4_round_trip", "", lambda: rotated() | {"group_size": INDEX_FP4_GROUP}, moved)
    select = partial(_select, c, work, make, record)
    yield Call("index_select", "", select, queries + keys + work.n * c.index_topk * 4, products)
    if work.n * n_rows > MAX_SCORES:
        return
    nbytes = work.n * (n_rows + c.index_topk) * 4.0
    for what in ("random", "tied"):
        yield Call("index_topk", what, partial(_topk, c, work.n, n_rows, make, what), nbytes)


def _select(c: ModelConfig, work: Workload, make: Maker, record: str) -> dict[str, Any]:
    n_rows = (work.context + work.tokens) // 4
    storage, table = make.cache(work.batch, n_rows, BLOCK // 4, c.index_head_dim, record)
    return make.lengths(work) | {
        "q": make.normal(work.n, c.index_n_heads, c.index_head_dim),
        "weights": make.normal(work.n, c.index_n_heads, scale=0.01),
        "storage": storage,
        "record": record,
        "block_table": table,
        "compress_ratio": 4,
        "topk": c.index_topk,
    }


def _topk(c: ModelConfig, n: int, n_rows: int, make: Maker, what: str) -> dict[str, Any]:
    if what == "tied":
        scores = make.integers(0, 4, n, n_rows, dtype=FP32)
    else:
        scores = make.normal(n, n_rows, dtype=FP32)
    return {"scores": scores, "topk": c.index_topk}


def _attention(c: ModelConfig, work: Workload, make: Maker, record: str) -> Iterator[Call]:
    q_bytes = work.n * c.n_heads * c.head_dim * 2
    near = min(c.window_size, work.context + work.tokens)
    near_rows = work.batch * near if work.tokens == 1 else work.tokens + near
    for what, ratio, topk in (("CSA", 4, c.index_topk), ("HCA", 128, None)):
        far = work.seen(ratio, topk)
        rows = near_rows + work.distinct(far, ratio)
        yield Call(
            "sparse_attn",
            what,
            partial(_attend, c, work, make, record, ratio, topk),
            2 * q_bytes + rows * _width(record, c.head_dim),
            4.0 * work.n * c.n_heads * c.head_dim * (near + far),
        )
    yield Call("head_rms_norm", "", partial(_head_norm, c, work.n, make), 2 * q_bytes)
    yield Call("rope", "", partial(_rope, c, work.n, make), 2 * q_bytes)
    stored = partial(_stored, c, work.n, make)
    yield Call("fp8_round_trip", "", stored, work.n * c.head_dim * 2 * 2)


def _attend(
    c: ModelConfig, work: Workload, make: Maker, record: str, ratio: int, topk: int | None
) -> dict[str, Any]:
    end = work.context + work.tokens
    window, ring = make.cache(work.batch, work.tokens + 2 * BLOCK, BLOCK, c.head_dim, record)
    turns = torch.arange(end // BLOCK + 1, device=make.device) % ring.shape[1]
    rows, table = make.cache(work.batch, end // ratio, max(BLOCK // ratio, 1), c.head_dim, record)
    # Of rows that are no more than topk none are named.
    names = _chosen(make, work, topk) if topk is not None and end // ratio > topk else None
    return make.lengths(work) | {
        "q": make.normal(work.n, c.n_heads, c.head_dim),
        "window": window,
        "window_block_table": ring[:, turns],
        "compressed": rows,
        "block_table": table,
        "indices": names,
        "record": record,
        "sink": make.normal(c.n_heads, dtype=FP32),
        "softmax_scale": c.head_dim**-0.5,
        "window_size": c.window_size,
        "compress_ratio": ratio,
    }


def _chosen(make: Maker, work: Workload, topk: int) -> torch.Tensor:
    """Rows spread over what each token sees, ascending; -1 behind those of one that sees few."""
    first = work.context + 1
    seen = (torch.arange(first, first + work.tokens, device=make.device) // 4).repeat(work.batch)
    stride = (seen / topk).clamp_min(1.0).unsqueeze(1)
    each = torch.arange(topk, device=make.device) + make.uniform(work.n, topk)
    row = (each * stride).long()
    return torch.where(row < seen.unsqueeze(1), row, -1).int()


def _queries(c: ModelConfig, n: int, make: Maker) -> dict[str, Any]:
    return {"x": make.normal(n, c.index_n_heads, c.index_head_dim)}


def _stored(c: ModelConfig, n: int, make: Maker) -> dict[str, Any]:
    kept = {"group_size": KV_GROUP, "n_kept": c.rope_head_dim}
    return {"x": make.normal(n, c.head_dim)} | kept


def _head_norm(c: ModelConfig, n: int, make: Maker) -> dict[str, Any]:
    return {"q": make.normal(n, c.n_heads, c.head_dim), "eps": c.norm_eps}


def _rope(c: ModelConfig, n: int, make: Maker) -> dict[str, Any]:
    cos, sin = rope_table(torch.arange(n), rope_freqs(c.rope_head_dim, c.rope_theta))
    x = make.normal(n, c.n_heads, c.head_dim)
    return {"x": x, "cos": cos.to(make.device), "sin": sin.to(make.device)}


def _products(c: ModelConfig, work: Workload, make: Maker) -> Iterator[Call]:
    for what, n, k in (
        ("wq_a", c.q_lora_rank, c.dim),
        ("wq_b", c.n_heads * c.head_dim, c.q_lora_rank),
        ("wo_b", c.dim, c.o_groups * c.o_lora_rank),
    ):
        nbytes = work.n * k * (1 + 1 / 128) + n * k + work.n * n * 2
        inputs = partial(_product, work.n, n, k, make)
        yield Call("fp8_gemm", what, inputs, nbytes, 2.0 * work.n * n * k, "fp8")
    groups, n, k = c.o_groups, c.o_lora_rank, c.n_heads * c.head_dim // c.o_groups
    nbytes = groups * (work.n * (n + k) + n * k) * 2.0
    heads = partial(_heads, work.n, groups, n, k, make)
    yield Call("heads_gemm", "wo_a", heads, nbytes, 2.0 * work.n * groups * n * k)
    n, k = c.n_routed_experts, c.dim
    nbytes = (work.n * (n + k) + n * k) * 4.0
    scores = partial(_linear, work.n, n, k, make)
    yield Call("linear", "gate", scores, nbytes, 2.0 * work.n * n * k, "fp32")


def _heads(m: int, groups: int, n: int, k: int, make: Maker) -> dict[str, Any]:
    return {"x": make.normal(m, groups, k), "weight": make.normal(groups, n, k)}


def _linear(m: int, n: int, k: int, make: Maker) -> dict[str, Any]:
    return {"x": make.normal(m, k, dtype=FP32), "weight": make.normal(n, k, dtype=FP32)}


def _product(m: int, n: int, k: int, make: Maker) -> dict[str, Any]:
    a, a_scale = make.activation(m, k)
    b, b_scale = make.fp8(n, k)
    return {"a": a, "a_scale": a_scale, "b": b, "b_scale": b_scale, "out_dtype": BF16}


def _experts(c: ModelConfig, work: Workload, make: Maker) -> Iterator[Call]:
    n_experts, topk, inter = c.n_routed_experts, c.n_activated_experts, c.moe_inter_dim
    gate = partial(_gate, c, work.n, make)
    yield Call("topk_gate", "", gate, work.n * (n_experts * 4 + topk * 12) + n_experts * 4)
    n_rows = work.n * topk
    touched = n_experts * (1 - (1 - topk / n_experts) ** work.n)
    for what, n, k in (("w1 and w3", 2 * inter, c.dim), ("w2", c.dim, inter)):
        nbytes = n_rows * k * (1 + 1 / 128) + touched * n * k * (1 / 2 + 1 / 32) + n_rows * n * 2
        inputs = partial(_grouped, c, work.n, n, k, make)
        yield Call("grouped_gemm", what, inputs, nbytes, 2.0 * n_rows * n * k, "fp8")
    yield Call("swiglu", "", partial(_swiglu, c, n_rows, make), n_rows * inter * 3 * 2)


def _gate(c: ModelConfig, n: int, make: Maker) -> dict[str, Any]:
    return {
        "logits": make.normal(n, c.n_routed_experts, dtype=FP32),
        "bias": make.normal(c.n_routed_experts, dtype=FP32),
        "topk": c.n_activated_experts,
        "route_scale": c.route_scale,
    }


def _grouped(c: ModelConfig, n_tokens: int, n: int, k: int, make: Maker) -> dict[str, Any]:
    n_experts = c.n_routed_experts
    x, x_scale = make.activation(n_tokens * c.n_activated_experts, k)
    chosen = make.uniform(n_tokens, n_experts).argsort(-1)[:, : c.n_activated_experts]
    weight, scale = make.fp4(n_experts, n, k)
    return {
        "x": x,
        "x_scale": x_scale,
        "weight": weight,
        "weight_scale": scale,
        "group_sizes": torch.bincount(chosen.flatten(), minlength=n_experts),
        "out_dtype": BF16,
    }


def _swiglu(c: ModelConfig, n_rows: int, make: Maker) -> dict[str, Any]:
    return {
        "x": make.normal(n_rows, 2 * c.moe_inter_dim),
        "limit": c.swiglu_limit,
        "weight": make.normal(n_rows, dtype=FP32),
    }
