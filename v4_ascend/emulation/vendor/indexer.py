"""The lightning indexer: scores of compressed keys, and the best of them.

Source: vllm-ascend csrc/attention/vllm_quant_lightning_indexer, README and op_host tiling.
"""

from __future__ import annotations

import torch

from v4_ascend.emulation.checks import Checks
from v4_ascend.emulation.stand_in import running_on, stand_in
from v4_ascend.emulation.vendor.metadata import check_table, indexer_fields

DIM, HEADS, HALF_MAX = 128, 64, 65504.0
NO_LIMIT = 2**63 - 1


@stand_in("_C_ascend::npu_vllm_quant_lightning_indexer")
def npu_vllm_quant_lightning_indexer(
    query: torch.Tensor,
    key: torch.Tensor,
    weights: torch.Tensor,
    query_dequant_scale: torch.Tensor,
    key_dequant_scale: torch.Tensor,
    query_quant_mode: int = 0,
    key_quant_mode: int = 0,
    actual_seq_lengths_query: torch.Tensor | None = None,
    actual_seq_lengths_key: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    metadata: torch.Tensor | None = None,
    layout_query: str = "BSND",
    layout_key: str = "BSND",
    sparse_count: int = 2048,
    sparse_mode: int = 3,
    pre_tokens: int = NO_LIMIT,
    next_tokens: int = NO_LIMIT,
    cmp_ratio: int = 1,
    return_value: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows with the highest ``sum_h w_h relu(s_q s_k q_h.k)``, best first, then -1.

    actual_seq_lengths_query are prefix sums without the leading 0; ..._key count original
    tokens, of which key s covers cmp_ratio. Ties go to the lower index (the vendor leaves
    their order open).

    Shapes (layout TND, PA_BSND):
        query                [T, 64, 128]  int8 (A2, A3) or fp8_e4m3fn (950)
        key                  [block_num, block_size, 1, 128]
        weights, query_dequant_scale  [T, 64]  fp16 (A2, A3) or fp32 (950)
        key_dequant_scale    [block_num, block_size, 1]
        return               [T, 1, sparse_count] int32, and nothing
    """
    check = Checks(
        "npu_vllm_quant_lightning_indexer", "vllm-ascend vllm_quant_lightning_indexer README"
    )
    on_950 = running_on().generation == "950"
    values, scales = (torch.float8_e4m3fn, torch.float32) if on_950 else (torch.int8, torch.float16)
    check.one_of(("TND",), layout_query=layout_query)
    check.one_of(("PA_BSND",), layout_key=layout_key)
    check.given(
        actual_seq_lengths_query=actual_seq_lengths_query,
        actual_seq_lengths_key=actual_seq_lengths_key,
        block_table=block_table,
    )
    assert actual_seq_lengths_query is not None
    assert actual_seq_lengths_key is not None
    assert block_table is not None
    tokens, batch = query.shape[0], actual_seq_lengths_key.numel()
    check.shape(None, HEADS, DIM, query=query)
    check.shape(None, None, 1, DIM, key=key)
    check.pages(key=key)
    check.shape(tokens, HEADS, weights=weights, query_dequant_scale=query_dequant_scale)
    check.shape(*key.shape[:2], 1, key_dequant_scale=key_dequant_scale)
    check.dtype(values, query=query, key=key)
    check.dtype(
        scales, weights=weights, query_dequant_scale=query_dequant_scale,
        key_dequant_scale=key_dequant_scale,
    )  # fmt: skip
    # Keys and their scales may be views into one page: the kernel is told the stride between.
    check.contiguous(weights=weights, query_dequant_scale=query_dequant_scale)
    check.contiguous(**{"key[0]": key[0], "key_dequant_scale[0]": key_dequant_scale[0]})
    check.dtype(
        torch.int32, actual_seq_lengths_query=actual_seq_lengths_query,
        actual_seq_lengths_key=actual_seq_lengths_key, block_table=block_table,
    )  # fmt: skip
    check.shape(batch, actual_seq_lengths_query=actual_seq_lengths_query)
    check.shape(batch, None, block_table=block_table)
    check.one_of((0,), query_quant_mode=query_quant_mode, key_quant_mode=key_quant_mode)
    check.one_of((0, 3), sparse_mode=sparse_mode)
    check.one_of((NO_LIMIT,), pre_tokens=pre_tokens, next_tokens=next_tokens)
    check.one_of((1, 4, 128) if on_950 else (1, 2, 4, 8, 16, 32, 64, 128), cmp_ratio=cmp_ratio)
    limit = "it must be 1 to 2048"
    check.need(1 <= sparse_count <= 2048, "sparse_count", sparse_count, limit)
    check.one_of((False,), return_value=return_value)
    check_table(check, metadata, *indexer_fields(HEADS, batch, cmp_ratio, sparse_count))

    starts = [0, *actual_seq_lengths_query.tolist()]
    check.prefix_sums(tokens, actual_seq_lengths_query=torch.tensor(starts))
    weighted = weights.float() * query_dequant_scale.float()
    if not on_950 and tokens:
        largest = weighted.abs().max().item()
        limit = "the kernel holds it in fp16, at most 65504"
        check.need(largest <= HALF_MAX, "weights * query_dequant_scale", largest, limit)

    out = torch.full((tokens, 1, sparse_count), -1, dtype=torch.int32)
    keys = key.reshape(-1, DIM).float() * key_dequant_scale.reshape(-1, 1).float()
    rows = key.shape[1]
    for b, length in enumerate(actual_seq_lengths_key.tolist()):
        first, last = starts[b], starts[b + 1]
        n_keys, ahead = length // cmp_ratio, length - (last - first)
        blocks = -(-n_keys // rows)
        limit = f"request {b} has {n_keys} keys, {blocks} blocks"
        check.need(
            block_table.shape[1] >= blocks, "block_table.shape[1]", block_table.shape[1], limit
        )
        s = torch.arange(n_keys)
        mine = keys[block_table[b, s // rows].long() * rows + s % rows]
        for t in range(first, last):
            visible = (ahead + t - first + 1) // cmp_ratio if sparse_mode == 3 else n_keys
            score = weighted[t] @ torch.relu(query[t].float() @ mine[:visible].T)
            best = torch.sort(score, descending=True, stable=True).indices[:sparse_count]
            out[t, 0, : len(best)] = best.int()
    return out, torch.empty(0)
