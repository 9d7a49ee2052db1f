"""What a step must read and compute at least, and how long that takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from v4_ascend.config.model import ModelConfig
from v4_ascend.model.resident import resident_bytes
from v4_ascend.model.transformer import Transformer
from v4_ascend.ops.records import RECORDS
from v4_ascend.runtime.bench_ops import Rates
from v4_ascend.runtime.op_workloads import Unit
from v4_ascend.runtime.workload import Workload


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Bytes of weights and of caches, and operations (a product and a sum are two).

    Attributes:
        unit: the fastest that multiplies any of the weights.
    """

    weight_bytes: float
    cache_bytes: float
    operations: float
    unit: Unit

    def floor(self, rates: Rates) -> float:
        """Seconds that no step can undercut."""
        read = (self.weight_bytes + self.cache_bytes) / rates.copy
        return max(read, self.operations / rates.products[self.unit])


def step_costs(model: Transformer, records: tuple[str, str], work: Workload) -> StepCosts:
    """Count a perfect step of `work`, which reads everything once and draws one token a sequence.

    Of the experts those are read that some token of the step is expected to choose.
    """
    c, n = model.config, work.n
    experts = float(sum(resident_bytes(block.ffn.experts) for block in model.layers))
    embed = 0 if model.embed is None else model.embed.nbytes
    head = 0 if model.head is None else resident_bytes(model.head)
    dense = resident_bytes(model) - experts - embed
    chosen = 1 - (1 - c.n_activated_experts / c.n_routed_experts) ** n
    kv, index = (row_bytes(c, records, which) for which in (0, 1))
    cache = operations = 0.0
    for ratio in c.compress_ratios[: c.n_layers]:
        seen = work.seen(1, c.window_size)
        cache += kv * work.distinct(seen, 1)
        if ratio:
            selected = work.seen(ratio, c.index_topk if ratio == 4 else None)
            cache += kv * work.distinct(selected, ratio)
            seen += selected
        if ratio == 4:
            compressed = work.seen(ratio)
            cache += index * work.distinct(compressed, ratio)
            operations += 2.0 * compressed * c.index_n_heads * c.index_head_dim
        operations += 4.0 * seen * c.n_heads * c.head_dim
    expert = model.layers[0].ffn.experts.w13.weight
    each = expert.element_size() / (2 if expert.dtype == torch.int8 else 1)  # FP4: two in a byte
    values = experts * c.n_activated_experts / c.n_routed_experts / each
    quantised = model.numerics.quant_sim and c.quantization is not None
    values += (dense - head) / (1 if quantised else model.numerics.dtype.itemsize)
    drawn = head / 4  # the head's weights are fp32
    return StepCosts(
        weight_bytes=dense + experts * chosen,
        cache_bytes=cache,
        operations=n * (operations + 2 * values) + work.batch * 2 * drawn,
        unit="fp8" if quantised else "fp32" if model.numerics.dtype == torch.float32 else "bf16",
    )


def row_bytes(config: ModelConfig, records: tuple[str, str], which: int) -> float:
    """Return the bytes of one cached row: 0, of the keys and values; 1, of the index."""
    width = (config.head_dim, config.index_head_dim)[which]
    storage = RECORDS[records[which]].new_storage(1, 1, width, torch.device("cpu"))
    return float(storage.nbytes)
