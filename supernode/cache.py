"""What the caches of V4's layers take: bytes that grow with a request, and bytes that do not.

Source: spec of the published code; records as FlashMLA, vLLM and vllm-ascend lay them out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from v4_ascend.config.devices import IndexRecord, KVRecord
from v4_ascend.config.model import ModelConfig

BLOCK_TOKENS = 128  # lcm(4, 128): one block of every cache covers as many original tokens
# Fewest rows of a cache page that a backend's kernels can address, where it is more than one.
MIN_PAGE_ROWS = {"ascend": 32}  # the smallest that vllm-ascend serves with
STATE_BYTES = 4  # compressor state is fp32
_KV_BYTES = {"fp8_584": 584, "fp8_640": 640}
_INDEX_BYTES = {"fp4_68": 68, "fp8_132": 132, "int8": 130}
Stream = Literal["fp32", "bf16"]


@dataclass(frozen=True, slots=True)
class RecordBytes:
    """Bytes of one row of the main caches and of the indexer's."""

    kv: int
    index: int

    @classmethod
    def of(
        cls, config: ModelConfig, kv: KVRecord, index: IndexRecord, stream: Stream = "bf16"
    ) -> RecordBytes:
        """Size the named records; `plain` rows have the stream's type."""
        item = 4 if stream == "fp32" else 2
        plain_kv, plain_index = config.head_dim * item, config.index_head_dim * item
        # Packed records are made for 512 and 128 channels; narrower models keep plain rows.
        is_wide = (config.head_dim, config.rope_head_dim) == (512, 64)
        return cls(
            _KV_BYTES.get(kv, plain_kv) if is_wide else plain_kv,
            _INDEX_BYTES.get(index, plain_index) if config.index_head_dim == 128 else plain_index,
        )


SPEC_RECORDS = RecordBytes(584, 68)


def page_tokens(min_page_rows: int) -> int:
    """Return the tokens a cache page covers: a block, or more where kernels want more rows in it.

    An HCA layer has one row for each block.
    """
    return BLOCK_TOKENS * min_page_rows


def block_bytes(config: ModelConfig, records: RecordBytes, layers: Iterable[int]) -> int:
    """Bytes of one block of 128 tokens over `layers`: 32 CSA rows and keys, 1 HCA row."""
    total = 0
    for layer in layers:
        if ratio := config.compress_ratios[layer]:
            row = records.kv + (records.index if ratio == 4 else 0)
            total += BLOCK_TOKENS // ratio * row
    return total


def bytes_per_token(config: ModelConfig, records: RecordBytes) -> float:
    """Bytes a token of context adds in the whole model."""
    return block_bytes(config, records, range(config.n_layers)) / BLOCK_TOKENS


def request_bytes(
    config: ModelConfig, records: RecordBytes, layers: Iterable[int], n_tokens: int
) -> int:
    """Bytes of `n_tokens` of context, in whole blocks, without the fixed state."""
    return -(-n_tokens // BLOCK_TOKENS) * block_bytes(config, records, layers)


def window_bytes(
    config: ModelConfig, records: RecordBytes, layers: Iterable[int], window_rows: int
) -> int:
    """Bytes of the windows of one request over `layers`, MTP layers included where listed."""
    return len(list(layers)) * window_rows * records.kv


def snapshot_bytes(
    config: ModelConfig, records: RecordBytes, layers: Sequence[int], n_guesses: int = 0
) -> int:
    """Bytes of what is kept of one prefix beside its blocks: a block of windows, CSA's states."""
    csa = [n for n in layers if config.compress_ratios[n] == 4]
    return window_bytes(config, records, layers, BLOCK_TOKENS) + state_bytes(config, csa, n_guesses)


def state_bytes(config: ModelConfig, layers: Iterable[int], n_guesses: int = 0) -> int:
    """Bytes of the compressors' fp32 states of one request over `layers`: K and Z rows.

    CSA's have room to go on in front of as many guesses, by whole pairs of groups.
    """
    total, csa_rows = 0, -(-(7 + n_guesses) // 8) * 8
    for layer in layers:
        ratio = config.compress_ratios[layer]
        rows, width = (csa_rows, 2) if ratio == 4 else (ratio, 1)
        if ratio:
            dims = config.head_dim + (config.index_head_dim if ratio == 4 else 0)
            total += rows * width * dims * 2 * STATE_BYTES
    return total
