"""V3.2's indexer and sparse attention look like V4's, and would be wrong: none is ever called."""

import ast
from pathlib import Path

import pytest
import torch

from v4_ascend.backends import ascend
from v4_ascend.backends.ascend import soc
from v4_ascend.ops import OPS
from v4_ascend.ops.ragged import spans

RATIO = 4


def _names(tree):
    """Every name and every string of a module, but those of docstrings and of soc.NEVER."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Name):
            yield node.id
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value
        ):
            yield node.value.partition("::")[2] or node.value


def _without_never(tree):
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "NEVER")
    ]
    return tree


def test_no_kernel_names_them():
    files = sorted(Path(ascend.__file__).parent.glob("*.py"))
    used = {f.name: set(_names(_without_never(ast.parse(f.read_text())))) for f in files}
    assert "npu_vllm_quant_lightning_indexer" in used["indexer.py"]  # so the search finds names
    for name in soc.NEVER:
        assert not [f for f, names in used.items() if name in names], name


def _visible(inputs, limit):
    """Which rows each token may choose, [n_tokens, n_rows], under V3.2's right-down causal mask.

    A query i of n, over m keys, sees keys s <= m - n + i; `limit` says what m counts.
    """
    q_spans = list(spans(inputs["seq_lens"], inputs["cu_seqlens"]))
    n_rows = int(inputs["seq_lens"].max()) // RATIO
    seen = torch.zeros(len(inputs["q"]), n_rows, dtype=torch.bool)
    for span in q_spans:
        m, n = limit(span), span.end - span.begin
        for i in range(n):
            seen[span.begin + i, : max(0, min(m - n + i + 1, span.stop // RATIO))] = True
    return seen


@pytest.fixture
def inputs():
    case = next(c for c in OPS["index_scores"].cases() if c.id == "fp32-ragged")
    return OPS["index_scores"].inputs(case)


@pytest.fixture
def truth(inputs):
    return OPS["index_scores"].reference(**inputs) > float("-inf")


def test_with_lengths_in_tokens_they_see_rows_of_the_future(inputs, truth):
    seen = _visible(inputs, lambda span: span.stop)
    future = seen & ~truth
    assert not (truth & ~seen).any()
    # A chunk of 66 tokens behind 64: all but its last few see rows that are not there yet.
    assert future.any(1).sum() > 60


def test_with_lengths_in_rows_they_lose_rows(inputs, truth):
    seen = _visible(inputs, lambda span: span.stop // RATIO)
    lost = truth & ~seen
    assert lost.any(1).sum() > 60
    assert lost.sum() > truth.sum() / 2


def test_decoding_hides_the_difference(inputs):
    """One token a request sees the same either way: a test of decoding alone would pass."""
    case = {
        "seq_lens": torch.tensor([301, 66], dtype=torch.int32),
        "cu_seqlens": torch.tensor([0, 1, 2], dtype=torch.int32),
    }
    one = inputs | case | {"q": inputs["q"][:2], "weights": inputs["weights"][:2]}
    one["block_table"] = inputs["block_table"][1:]
    truth = OPS["index_scores"].reference(**one) > float("-inf")
    assert torch.equal(_visible(one, lambda span: span.stop // RATIO), truth)
