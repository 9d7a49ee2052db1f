"""The indexer on values a model has: 64 heads that all count, FP4 grid, ragged requests.

The generated cases choose by few heads, so that no rounding decides; here the scores of what
was chosen are compared with those of what was not.
"""

import torch
from torch.nn import functional as F

from v4_ascend.backends import BACKENDS
from v4_ascend.emulation import calls
from v4_ascend.ops import (
    fp4_round_trip,
    index_scores,
    index_select,
    sparse_attn,
    store_rows,
    use_policy,
)
from v4_ascend.ops.records import RECORDS

RATIO, ROWS, TOPK = 4, 32, 512
LENGTHS = ((3000, 5), (0, 9), (2049, 40))  # tokens before the step, tokens it brings


def _inputs():
    g = torch.Generator().manual_seed(8)
    seq_lens = torch.tensor([p + n for p, n in LENGTHS], dtype=torch.int32)
    counts = torch.tensor([n for _, n in LENGTHS])
    blocks = int(seq_lens.max()) // (RATIO * ROWS) + 1
    table = torch.randperm(len(LENGTHS) * blocks, generator=g).view(len(LENGTHS), blocks).int()
    storage = RECORDS["fp8_132"].new_storage(table.numel(), ROWS, 128)
    keys = fp4_round_trip(torch.randn(table.numel() * ROWS, 128, generator=g), 32)
    store_rows.reference(storage, keys.bfloat16(), torch.arange(len(keys)), "fp8_132")
    n_tokens = int(counts.sum())
    return {
        "q": fp4_round_trip(torch.randn(n_tokens, 64, 128, generator=g), 32).bfloat16(),
        "weights": torch.randn(n_tokens, 64, generator=g).bfloat16() * 0.01,
        "storage": storage,
        "record": "fp8_132",
        "block_table": table,
        "seq_lens": seq_lens,
        "cu_seqlens": F.pad(counts.cumsum(0), (1, 0)).int(),
        "compress_ratio": RATIO,
    }


def test_no_row_left_out_scores_higher_than_one_chosen():
    BACKENDS["ascend"].use_chip(None)
    inputs = _inputs()
    there = {k: v.to("npu") if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    with torch.inference_mode(), use_policy(backend="ascend"):
        chosen = index_select(**there, topk=TOPK).cpu().long()
    assert calls("_C_ascend")["_C_ascend::npu_vllm_quant_lightning_indexer"] == 1

    wide = {"q": inputs["q"].float(), "weights": inputs["weights"].float()}
    scores = index_scores.reference(**inputs | wide)  # exact: no value is off the FP4 grid
    for ids, row in zip(chosen, scores, strict=True):
        visible = int((row > float("-inf")).sum())
        ids = ids[ids >= 0]
        assert len(ids) == len(ids.unique()) == min(visible, TOPK)
        others = row.clone()
        others[ids] = float("-inf")
        if len(ids):
            assert float(row[ids].min()) >= float(others.max()) - 1e-5


def test_tables_are_made_once_a_step_and_anew_for_the_next():
    """Even if two steps share a tensor of theirs: decoding brings one token a request each time."""
    BACKENDS["ascend"].use_chip(None)
    inputs = _inputs()
    there = {k: v.to("npu") if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    name = "_C_ascend::npu_vllm_quant_lightning_indexer_metadata"
    with torch.inference_mode(), use_policy(backend="ascend"):
        for _layer in range(3):
            index_select(**there, topk=TOPK)
        assert calls("_C_ascend")[name] == 1
        longer = there | {"seq_lens": there["seq_lens"] + 4}
        index_select(**longer, topk=TOPK)
        assert calls("_C_ascend")[name] == 2


def test_attention_takes_chosen_rows_in_any_order():
    """-1 between ids: the vendor reads up to the first, so they are moved behind."""
    BACKENDS["ascend"].use_chip(None)
    case = next(c for c in sparse_attn.cases() if c.id == "fp8_640-flash-csa")
    inputs = sparse_attn.inputs(case)
    is_id = inputs["indices"] >= 0
    assert (is_id[:, 1:] & ~is_id[:, :-1]).any()
    there = {k: v.to("npu") if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    with torch.inference_mode(), use_policy(backend="ascend"):
        got = sparse_attn(**there).cpu().float()
    want = sparse_attn.reference(**inputs | {"q": inputs["q"].float()})
    assert (got - want).norm() <= 4e-3 * want.norm()
