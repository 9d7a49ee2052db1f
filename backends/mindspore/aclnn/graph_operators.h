// SPDX-License-Identifier: Apache-2.0
//
// Each operator as MindSpore's compiler sees it: its parameters in order, and the shapes and dtypes
// of what it returns. Parameters are those of the torch operators; a test compares them.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "mindspore/core/include/ops/ops_func_impl/op_func_impl.h"
#include "shapes.h"

namespace v4_ascend::graph {
using Infos = mindspore::ops::InferInfoPtrList;
using mindspore::TypeId;
using Types = std::vector<TypeId>;

constexpr auto kFloat = TypeId::kNumberTypeFloat32;
constexpr auto kInt = TypeId::kNumberTypeInt32;

template <typename T>
T Value(const Infos &call, size_t parameter) {
  return call[parameter]->GetScalarValueWithCheck<T>();
}

struct HcPre {
  enum Parameters { x, hc_fn, hc_scale, hc_base, hc_mult, hc_sinkhorn_iters, norm_eps, hc_eps };
  static std::vector<size_t> Shaped() { return {x}; }
  static Shapes ShapesOf(const Infos &c) { return HcPreShapes(c[x]->GetShape(), Value<int64_t>(c, hc_mult)); }
  static Types TypesOf(const Infos &c) { return {c[x]->GetType(), kFloat, kFloat}; }
};

struct HcPost {
  enum Parameters { x, residual, post, comb };
  static std::vector<size_t> Shaped() { return {residual}; }
  static Shapes ShapesOf(const Infos &c) { return HcPostShapes(c[residual]->GetShape()); }
  static Types TypesOf(const Infos &c) { return {c[residual]->GetType()}; }
};

struct Compressor {
  enum Parameters {
    x, wkv, wgate, state_cache, ape, norm_weight, rope_sin, rope_cos, state_block_table, cu_seqlens, seqused,
    start_pos, rope_head_dim, cmp_ratio, coff, norm_eps, rotary_mode, cache_mode
  };
  static std::vector<size_t> Shaped() { return {x, norm_weight, rope_sin}; }
  static Shapes ShapesOf(const Infos &c) {
    return CompressorShapes(c[x]->GetShape(), c[norm_weight]->GetShape(), c[rope_sin]->GetShape(),
                            Value<int64_t>(c, cmp_ratio));
  }
  static Types TypesOf(const Infos &c) { return {c[x]->GetType()}; }
};

struct SparseAttnSharedkv {
  enum Parameters {
    q, ori_kv, cmp_kv, ori_sparse_indices, cmp_sparse_indices, ori_block_table, cmp_block_table, cu_seqlens_q,
    cu_seqlens_ori_kv, cu_seqlens_cmp_kv, seqused_q, seqused_kv, sinks, metadata, softmax_scale, cmp_ratio,
    ori_mask_mode, cmp_mask_mode, ori_win_left, ori_win_right, layout_q, layout_kv, return_softmax_lse
  };
  static std::vector<size_t> Shaped() { return {q}; }
  static Shapes ShapesOf(const Infos &c) { return AttentionShapes(c[q]->GetShape(), Value<bool>(c, return_softmax_lse)); }
  static Types TypesOf(const Infos &c) { return {c[q]->GetType(), kFloat}; }
};

struct KvQuantSparseAttnSharedkv {
  enum Parameters {
    q, kv_quant_mode, ori_kv, cmp_kv, ori_sparse_indices, cmp_sparse_indices, ori_block_table, cmp_block_table,
    cu_seqlens_q, cu_seqlens_ori_kv, cu_seqlens_cmp_kv, seqused_q, seqused_kv, sinks, metadata, tile_size,
    rope_head_dim, softmax_scale, cmp_ratio, ori_mask_mode, cmp_mask_mode, ori_win_left, ori_win_right, layout_q,
    layout_kv, return_softmax_lse
  };
  static std::vector<size_t> Shaped() { return {q}; }
  static Shapes ShapesOf(const Infos &c) { return AttentionShapes(c[q]->GetShape(), Value<bool>(c, return_softmax_lse)); }
  static Types TypesOf(const Infos &c) { return {c[q]->GetType(), kFloat}; }
};

struct Metadata {
  static std::vector<size_t> Shaped() { return {}; }
  static Shapes ShapesOf(const Infos &) { return MetadataShapes(); }
  static Types TypesOf(const Infos &) { return {kInt}; }
};

struct SparseAttnSharedkvMetadata : Metadata {
  enum Parameters {
    num_heads_q, num_heads_kv, head_dim, cu_seqlens_q, cu_seqlens_ori_kv, cu_seqlens_cmp_kv, seqused_q, seqused_kv,
    batch_size, max_seqlen_q, max_seqlen_kv, ori_topk, cmp_topk, cmp_ratio, ori_mask_mode, cmp_mask_mode,
    ori_win_left, ori_win_right, layout_q, layout_kv, has_ori_kv, has_cmp_kv
  };
};

struct KvQuantSparseAttnSharedkvMetadata : Metadata {
  enum Parameters {
    num_heads_q, num_heads_kv, head_dim, kv_quant_mode, cu_seqlens_q, cu_seqlens_ori_kv, cu_seqlens_cmp_kv,
    seqused_q, seqused_kv, batch_size, max_seqlen_q, max_seqlen_kv, ori_topk, cmp_topk, tile_size, rope_head_dim,
    cmp_ratio, ori_mask_mode, cmp_mask_mode, ori_win_left, ori_win_right, layout_q, layout_kv, has_ori_kv, has_cmp_kv
  };
};

struct QuantLightningIndexer {
  enum Parameters {
    query, key, weights, query_dequant_scale, key_dequant_scale, query_quant_mode, key_quant_mode,
    actual_seq_lengths_query, actual_seq_lengths_key, block_table, metadata, layout_query, layout_key, sparse_count,
    sparse_mode, pre_tokens, next_tokens, cmp_ratio, return_value
  };
  static std::vector<size_t> Shaped() { return {query, key}; }
  static Shapes ShapesOf(const Infos &c) {
    return IndexerShapes(c[query]->GetShape(), c[key]->GetShape(), Value<std::string>(c, layout_key),
                         Value<int64_t>(c, sparse_count), Value<bool>(c, return_value));
  }
  static Types TypesOf(const Infos &) { return {kInt, kFloat}; }
};

struct QuantLightningIndexerMetadata : Metadata {
  enum Parameters {
    num_heads_q, num_heads_k, head_dim, query_quant_mode, key_quant_mode, actual_seq_lengths_query,
    actual_seq_lengths_key, batch_size, max_seqlen_q, max_seqlen_k, layout_query, layout_key, sparse_count,
    sparse_mode, pre_tokens, next_tokens, cmp_ratio
  };
};

struct MoeGatingTopKHash {
  enum Parameters {
    x, k, bias, input_ids, tid2eid, k_group, group_count, routed_scaling_factor, eps, group_select_mode, renorm,
    norm_type, out_flag
  };
  static std::vector<size_t> Shaped() { return {x}; }
  static Shapes ShapesOf(const Infos &c) { return GateShapes(c[x]->GetShape(), Value<int64_t>(c, k)); }
  static Types TypesOf(const Infos &c) { return {c[x]->GetType(), kInt, kFloat}; }
};
}  // namespace v4_ascend::graph

// operator, what it is here
#define V4_ASCEND_OPERATORS(DO)                                                        \
  DO(npu_hc_pre_v2, HcPre)                                                             \
  DO(npu_hc_post, HcPost)                                                              \
  DO(compressor, Compressor)                                                           \
  DO(npu_sparse_attn_sharedkv, SparseAttnSharedkv)                                     \
  DO(npu_sparse_attn_sharedkv_metadata, SparseAttnSharedkvMetadata)                    \
  DO(npu_kv_quant_sparse_attn_sharedkv, KvQuantSparseAttnSharedkv)                     \
  DO(npu_kv_quant_sparse_attn_sharedkv_metadata, KvQuantSparseAttnSharedkvMetadata)    \
  DO(npu_vllm_quant_lightning_indexer, QuantLightningIndexer)                          \
  DO(npu_vllm_quant_lightning_indexer_metadata, QuantLightningIndexerMetadata)         \
  DO(moe_gating_top_k_hash, MoeGatingTopKHash)
