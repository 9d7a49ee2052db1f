"""Attention over fp8 rows, with the operator that cuts its work for the cores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from v4_ascend.backends.mindspore.aclnn.attention import Tensor


@dataclass(frozen=True)
class QuantAttentionOperators:
    """The 950's attention on MindSpore tensors. Never run.

    `module` is what CustomOpBuilder built of ``v4_ops.cc``. T tokens, B requests, N heads. V4 is
    served with kv_quant_mode 1, tile_size 64, rope_head_dim 64, layout_q "TND".
    """

    module: Any

    def npu_kv_quant_sparse_attn_sharedkv(
        self,
        q: Tensor,
        kv_quant_mode: int,
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
        tile_size: int = 0,
        rope_head_dim: int = 0,
        softmax_scale: float = 0.0,
        cmp_ratio: int = 0,
        ori_mask_mode: int = 4,
        cmp_mask_mode: int = 3,
        ori_win_left: int = 127,
        ori_win_right: int = 0,
        layout_q: str = "BSND",
        layout_kv: str = "PA_ND",
        return_softmax_lse: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Attend to the window, and to compressed rows: all without indices, else the chosen.

        Shapes:
            q                   [T, 64 or 128, 512]  bf16
            ori_kv, cmp_kv      [blocks, size, 1, 640]  fp8_e4m3; pages may lie apart
            ori_block_table, cmp_block_table  [B, n]  int32
            cmp_sparse_indices  [T, 1, 512 or 1024]  int32, -1 behind the valid ones
            cu_seqlens_q        [B + 1]; seqused_kv [B]  int32
            sinks               [N]  fp32, must be given; metadata [1024] int32
            return              out like q; softmax_lse, which the operator leaves invalid

        Source: vllm-ascend csrc/torch_binding.cpp, aclnnKvQuantSparseAttnSharedkv.
        """
        rows = (ori_kv, cmp_kv, ori_sparse_indices, cmp_sparse_indices)
        tables = (ori_block_table, cmp_block_table)
        lengths = (cu_seqlens_q, cu_seqlens_ori_kv, cu_seqlens_cmp_kv, seqused_q, seqused_kv)
        masks = (softmax_scale, cmp_ratio, ori_mask_mode, cmp_mask_mode)
        mode = (*masks, ori_win_left, ori_win_right, layout_q, layout_kv, return_softmax_lse)
        args = (q, kv_quant_mode, *rows, *tables, *lengths, sinks, metadata)
        call = self.module.npu_kv_quant_sparse_attn_sharedkv
        out, softmax_lse = call(*args, tile_size, rope_head_dim, *mode)
        return out, softmax_lse

    def npu_kv_quant_sparse_attn_sharedkv_metadata(
        self,
        num_heads_q: int,
        num_heads_kv: int,
        head_dim: int,
        kv_quant_mode: int,
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
        tile_size: int = 0,
        rope_head_dim: int = 0,
        cmp_ratio: int = -1,
        ori_mask_mode: int = 4,
        cmp_mask_mode: int = 3,
        ori_win_left: int = 127,
        ori_win_right: int = 0,
        layout_q: str = "BSND",
        layout_kv: str = "PA_ND",
        has_ori_kv: bool = True,
        has_cmp_kv: bool = True,
    ) -> Tensor:
        """Return the `metadata` of attention, [1024] int32: once a step and kind of layer.

        Source: vllm-ascend csrc/torch_binding.cpp, aclnnKvQuantSparseAttnSharedkvMetadata.
        """
        heads = (num_heads_q, num_heads_kv, head_dim, kv_quant_mode)
        lengths = (cu_seqlens_q, cu_seqlens_ori_kv, cu_seqlens_cmp_kv, seqused_q, seqused_kv)
        sizes = (batch_size, max_seqlen_q, max_seqlen_kv, ori_topk, cmp_topk)
        masks = (cmp_ratio, ori_mask_mode, cmp_mask_mode, ori_win_left, ori_win_right)
        mode = (tile_size, rope_head_dim, *masks, layout_q, layout_kv, has_ori_kv, has_cmp_kv)
        call = self.module.npu_kv_quant_sparse_attn_sharedkv_metadata
        return call(*heads, *lengths, *sizes, *mode)
