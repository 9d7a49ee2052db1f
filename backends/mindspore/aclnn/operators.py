"""The operators with the names, parameters and defaults that they have in torch."""

from __future__ import annotations

from dataclasses import dataclass

from v4_ascend.backends.mindspore.aclnn.attention import AttentionOperators, Tensor
from v4_ascend.backends.mindspore.aclnn.quant_attention import QuantAttentionOperators


@dataclass(frozen=True)
class AclnnOperators(AttentionOperators, QuantAttentionOperators):
    """All ten operators on MindSpore tensors of an Ascend device. Never run.

    T tokens, B requests, E experts. Outputs are new tensors; nothing else is written unless
    the operator says so.
    """

    def npu_hc_pre_v2(
        self,
        x: Tensor,
        hc_fn: Tensor,
        hc_scale: Tensor,
        hc_base: Tensor,
        hc_mult: int,
        hc_sinkhorn_iters: int,
        norm_eps: float,
        hc_eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mix the streams into one: norm, mixing product, Sinkhorn, weighted sum.

        Shapes:
            x        [T, 4, D]  bf16, D 4096 or 7168
            hc_fn    [24, 4 D]; hc_scale [3]; hc_base [24]  fp32; hc_mult is 4
            return   y [T, D] bf16; post [T, 4], comb [T, 4, 4] fp32

        Source: vllm-ascend csrc/torch_binding.cpp, aclnnHcPre.
        """
        args = (x, hc_fn, hc_scale, hc_base, hc_mult, hc_sinkhorn_iters, norm_eps, hc_eps)
        y, post, comb = self.module.npu_hc_pre_v2(*args)
        return y, post, comb

    def npu_hc_post(self, x: Tensor, residual: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        """Spread a sublayer's output over the streams.

        Shapes:
            x         [B, S, D]  bf16
            residual  [B, S, 4, D]  bf16, and so is the result
            post      [B, S, 4]; comb [B, S, 4, 4]  fp32

        Source: vllm-ascend csrc/torch_binding.cpp, aclnnHcPost.
        """
        return self.module.npu_hc_post(x, residual, post, comb)

    def compressor(
        self,
        x: Tensor,
        wkv: Tensor,
        wgate: Tensor,
        state_cache: Tensor,
        ape: Tensor,
        norm_weight: Tensor,
        rope_sin: Tensor,
        rope_cos: Tensor,
        state_block_table: Tensor | None,
        cu_seqlens: Tensor | None,
        seqused: Tensor | None,
        start_pos: Tensor | None,
        rope_head_dim: int,
        cmp_ratio: int,
        coff: int,
        norm_eps: float,
        rotary_mode: int,
        cache_mode: int,
    ) -> Tensor:
        """Compress tokens by `cmp_ratio`; writes `state_cache`.

        For V4: rope_head_dim 64, rotary_mode 2, cache_mode 1, and (D, coff, cmp_ratio) one of
        (512, 2, 4), (128, 2, 4), (512, 1, 128).

        Shapes:
            x            [T, H]  bf16; wkv, wgate [coff D, H] bf16
            state_cache  [blocks, size, 2 coff D]  fp32; block 0 takes what nobody needs
            ape          [cmp_ratio, coff D]  fp32; norm_weight [D] bf16, fp32 on 950
            rope_sin, rope_cos  [rows, 64]  bf16, rows = min(T, T // cmp_ratio + B)
            state_block_table   [B, n]; cu_seqlens [B + 1]; start_pos [B]  int32
            return       [rows, D]  bf16; what is behind the last complete row is not written

        Source: vllm-ascend csrc/attention/compressor/README.md, aclnnCompressor.
        """
        tensors = (x, wkv, wgate, state_cache, ape, norm_weight, rope_sin, rope_cos)
        lengths = (state_block_table, cu_seqlens, seqused, start_pos)
        mode = (rope_head_dim, cmp_ratio, coff, norm_eps, rotary_mode, cache_mode)
        return self.module.compressor(*tensors, *lengths, *mode)

    def moe_gating_top_k_hash(
        self,
        x: Tensor,
        k: int,
        bias: Tensor | None = None,
        input_ids: Tensor | None = None,
        tid2eid: Tensor | None = None,
        k_group: int = 1,
        group_count: int = 1,
        routed_scaling_factor: float = 1.0,
        eps: float = 1e-20,
        group_select_mode: int = 0,
        renorm: int = 0,
        norm_type: int = 0,
        out_flag: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choose experts by score and bias, or by the hash table of the token.

        For V4: norm_type 2 (square root of softplus), group_select_mode 1, renorm 0.

        Shapes:
            x          [T, E]  fp32; bias [E] fp32
            input_ids  [T]  int64; tid2eid [vocab, k] int32
            return     weights [T, k] fp32, ids [T, k] int32, scores [T, E] fp32

        Source: vllm-ascend csrc/torch_binding.cpp, aclnnMoeGatingTopKHash.
        """
        groups = (k_group, group_count, routed_scaling_factor, eps, group_select_mode)
        mode = (*groups, renorm, norm_type, out_flag)
        y, ids, out = self.module.moe_gating_top_k_hash(x, k, bias, input_ids, tid2eid, *mode)
        return y, ids, out
