"""Attention and the indexer, each with the operator that cuts its work for the cores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

Tensor: TypeAlias = Any  # mindspore.Tensor, which importing this module must not need
UNLIMITED = 2**63 - 1


@dataclass(frozen=True)
class AttentionOperators:
    """vllm-ascend's attention operators on MindSpore tensors of an Ascend device. Never run.

    `module` is what CustomOpBuilder built of ``v4_ops.cc``. T tokens, B requests, N heads.
    Defaults are the vendor's; V4 is served with layout_q or layout_query "TND", layout_kv
    "PA_ND", layout_key "PA_BSND" and ori_win_left 127.
    """

    module: Any

    def npu_sparse_attn_sharedkv(
        self,
        q: Tensor,
        *,
        ori_kv: Tensor | None = None,
        cmp_kv: Tensor | None = None,
        ori_sparse_indices: Tensor | None = None,
        cmp_sparse_indices: Tensor | None = None,
        ori_block_table: Tensor | None = None,
        cmp_block_table: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_ori_kv: Tensor | None = None,
        cu_seqlens_cmp_kv: Tensor | None = None,
        seqused_q: Tensor | None = None,
        seqused_kv: Tensor | None = None,
        sinks: Tensor | None = None,
        metadata: Tensor | None = None,
        softmax_scale: float = 0.0,
        cmp_ratio: int = 0,
        ori_mask_mode: int = 4,
        cmp_mask_mode: int = 3,
        ori_win_left: int = 128,
        ori_win_right: int = 0,
        layout_q: str = "BSND",
        layout_kv: str = "PA_ND",
        return_softmax_lse: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Attend to the window, and to compressed rows: all without indices, else the chosen.

        Shapes:
            q                   [T, N, 512]  bf16, N a multiple of 4; A2 and A3 only
            ori_kv, cmp_kv      [blocks, size, 1, 512]  bf16; pages may lie apart
            ori_block_table, cmp_block_table  [B, n]  int32
            cmp_sparse_indices  [T, 1, 512 or 1024]  int32, -1 behind the valid ones
            cu_seqlens_q        [B + 1]; seqused_kv [B]  int32
            sinks               [N]  fp32; metadata [1024] int32
            return              out like q; softmax_lse, which the operator leaves invalid

        Source: vllm-ascend csrc/attention/sparse_attn_sharedkv/README.md.
        """
        rows = (ori_kv, cmp_kv, ori_sparse_indices, cmp_sparse_indices)
        tables = (ori_block_table, cmp_block_table)
        lengths = (cu_seqlens_q, cu_seqlens_ori_kv, cu_seqlens_cmp_kv, seqused_q, seqused_kv)
        masks = (softmax_scale, cmp_ratio, ori_mask_mode, cmp_mask_mode)
        mode = (*masks, ori_win_left, ori_win_right, layout_q, layout_kv, return_softmax_lse)
        args = (q, *rows, *tables, *lengths, sinks, metadata, *mode)
        out, softmax_lse = self.module.npu_sparse_attn_sharedkv(*args)
        return out, softmax_lse

    def npu_sparse_attn_sharedkv_metadata(
        self,
        num_heads_q: int,
        num_heads_kv: int,
        head_dim: int,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_ori_kv: Tensor | None = None,
        cu_seqlens_cmp_kv: Tensor | None = None,
        seqused_q: Tensor | None = None,
        seqused_kv: Tensor | None = None,
        batch_size: int = 0,
        max_seqlen_q: int = 0,
        max_seqlen_kv: int = 0,
        ori_topk: int = 0,
        cmp_topk: int = 0,
        cmp_ratio: int = 4,
        ori_mask_mode: int = 4,
        cmp_mask_mode: int = 3,
        ori_win_left: int = 128,
        ori_win_right: int = 0,
        layout_q: str = "BSND",
        layout_kv: str = "PA_ND",
        has_ori_kv: bool = True,
        has_cmp_kv: bool = True,
    ) -> Tensor:
        """Return the `metadata` of attention, [1024] int32: once a step and kind of layer.

        Lengths are those of the call itself, int32 on the device.

        Source: vllm-ascend csrc/torch_binding.cpp, aclnnSparseAttnSharedkvMetadata.
        """
        lengths = (cu_seqlens_q, cu_seqlens_ori_kv, cu_seqlens_cmp_kv, seqused_q, seqused_kv)
        sizes = (batch_size, max_seqlen_q, max_seqlen_kv, ori_topk, cmp_topk)
        masks = (cmp_ratio, ori_mask_mode, cmp_mask_mode, ori_win_left, ori_win_right)
        mode = (*masks, layout_q, layout_kv, has_ori_kv, has_cmp_kv)
        args = (num_heads_q, num_heads_kv, head_dim, *lengths, *sizes, *mode)
        return self.module.npu_sparse_attn_sharedkv_metadata(*args)

    def npu_vllm_quant_lightning_indexer(
        self,
        query: Tensor,
        key: Tensor,
        weights: Tensor,
        query_dequant_scale: Tensor,
        key_dequant_scale: Tensor,
        query_quant_mode: int = 0,
        key_quant_mode: int = 0,
        actual_seq_lengths_query: Tensor | None = None,
        actual_seq_lengths_key: Tensor | None = None,
        block_table: Tensor | None = None,
        metadata: Tensor | None = None,
        layout_query: str = "BSND",
        layout_key: str = "BSND",
        sparse_count: int = 2048,
        sparse_mode: int = 3,
        pre_tokens: int = UNLIMITED,
        next_tokens: int = UNLIMITED,
        cmp_ratio: int = 1,
        return_value: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Choose `sparse_count` compressed rows for every token; -1 behind the valid ones.

        Shapes:
            query    [T, 64, 128]  int8, fp8_e4m3 on 950
            key      [blocks, size, 1, 128]  like query; pages may lie apart, also of scales
            weights  [T, 64]; query_dequant_scale [T, 64]; key_dequant_scale [blocks, size, 1]
                     fp16, fp32 on 950
            actual_seq_lengths_query  [B]  int32, prefix sums without the leading 0
            actual_seq_lengths_key    [B]  int32, of original tokens
            block_table  [B, n]  int32; metadata [1024] int32
            return   ids [T, 1, sparse_count] int32; values, empty unless return_value

        Source: vllm-ascend csrc/attention/vllm_quant_lightning_indexer/README.md.
        """
        tensors = (query, key, weights, query_dequant_scale, key_dequant_scale)
        lengths = (actual_seq_lengths_query, actual_seq_lengths_key, block_table, metadata)
        masks = (sparse_count, sparse_mode, pre_tokens, next_tokens, cmp_ratio, return_value)
        args = (*tensors, query_quant_mode, key_quant_mode, *lengths, layout_query, layout_key)
        ids, values = self.module.npu_vllm_quant_lightning_indexer(*args, *masks)
        return ids, values

    def npu_vllm_quant_lightning_indexer_metadata(
        self,
        num_heads_q: int,
        num_heads_k: int,
        head_dim: int,
        query_quant_mode: int,
        key_quant_mode: int,
        actual_seq_lengths_query: Tensor | None = None,
        actual_seq_lengths_key: Tensor | None = None,
        batch_size: int = 0,
        max_seqlen_q: int = 0,
        max_seqlen_k: int = 0,
        layout_query: str = "BSND",
        layout_key: str = "BSND",
        sparse_count: int = 2048,
        sparse_mode: int = 3,
        pre_tokens: int = UNLIMITED,
        next_tokens: int = UNLIMITED,
        cmp_ratio: int = 1,
    ) -> Tensor:
        """Return the `metadata` of the indexer, [1024] int32: once a step.

        Source: vllm-ascend csrc/torch_binding.cpp, aclnnVllmQuantLightningIndexerMetadata.
        """
        heads = (num_heads_q, num_heads_k, head_dim, query_quant_mode, key_quant_mode)
        lengths = (actual_seq_lengths_query, actual_seq_lengths_key)
        sizes = (batch_size, max_seqlen_q, max_seqlen_k, layout_query, layout_key)
        masks = (sparse_count, sparse_mode, pre_tokens, next_tokens, cmp_ratio)
        call = self.module.npu_vllm_quant_lightning_indexer_metadata
        return call(*heads, *lengths, *sizes, *masks)
