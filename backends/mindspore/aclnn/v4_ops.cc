// SPDX-License-Identifier: Apache-2.0
//
// DeepSeek-V4's aclnn operators for MindSpore, built by CustomOpBuilder where CANN is. A function
// here has the parameters of the torch operator; what it hands to aclnn, in which order, is
// recorded in interface.txt, and a test compares the two. Syntax-checked against MindSpore's
// headers; never compiled against CANN, never run.

#include <initializer_list>

#include "ms_extension/all.h"
#include "shapes.h"

namespace v4_ascend {
using ms::Tensor;
using Tensors = std::vector<Tensor>;
using Maybe = std::optional<Tensor>;
using Launch = ms::pynative::AclnnOpRunner::AclnnLaunchFunc;

constexpr auto kFloat = ms::TypeId::kNumberTypeFloat32;
constexpr auto kInt = ms::TypeId::kNumberTypeInt32;

Tensors Run(const std::string &name, const Launch &launch, const std::vector<Maybe> &inputs,
            const Tensors &outputs) {
  auto runner = std::make_shared<ms::pynative::AclnnOpRunner>(name);
  runner->SetLaunchFunc(launch);
  Tensors present;
  for (const auto &input : inputs) {
    if (input.has_value()) present.push_back(input.value());
  }
  runner->Run(present, outputs);
  return outputs;
}

// Pages of a cache lie apart; the operators want the distance in elements.
int64_t PageStride(const Maybe &pages) { return pages.has_value() ? pages->stride()[0] : 0; }

// The metadata operators run on the AI CPU and are given empty tensors, not null.
void EmptyForNone(std::initializer_list<Maybe *> lengths) {
  for (auto *one : lengths) {
    if (!one->has_value()) *one = ms::zeros({0}, kInt);
  }
}

Tensors HcPre(const Tensor &x, const Tensor &hc_fn, const Tensor &hc_scale, const Tensor &hc_base, int64_t hc_mult,
              int64_t hc_sinkhorn_iters, double norm_eps, double hc_eps) {
  const auto shapes = HcPreShapes(x.shape(), hc_mult);
  Tensor y(x.data_type(), shapes[0]), post(kFloat, shapes[1]), comb(kFloat, shapes[2]);
  const auto launch = LAUNCH_ACLNN_FUNC(aclnnHcPre, x, hc_fn, hc_scale, hc_base, hc_mult, hc_sinkhorn_iters, hc_eps,
                                        norm_eps, y, post, comb);
  return Run("HcPre", launch, {x, hc_fn, hc_scale, hc_base}, {y, post, comb});
}

Tensors HcPost(const Tensor &x, const Tensor &residual, const Tensor &post, const Tensor &comb) {
  Tensor out(residual.data_type(), HcPostShapes(residual.shape())[0]);
  const auto launch = LAUNCH_ACLNN_FUNC(aclnnHcPost, x, residual, post, comb, out);
  return Run("HcPost", launch, {x, residual, post, comb}, {out});
}

Tensors Compressor(const Tensor &x, const Tensor &wkv, const Tensor &wgate, const Tensor &state_cache,
                   const Tensor &ape, const Tensor &norm_weight, const Tensor &rope_sin, const Tensor &rope_cos,
                   const Maybe &state_block_table, const Maybe &cu_seqlens, const Maybe &seqused,
                   const Maybe &start_pos, int64_t rope_head_dim, int64_t cmp_ratio, int64_t coff, double norm_eps,
                   int64_t rotary_mode, int64_t cache_mode) {
  const auto shapes = CompressorShapes(x.shape(), norm_weight.shape(), rope_sin.shape(), cmp_ratio);
  const auto state_cache_stride = PageStride(state_cache);
  Tensor cmp_kv(x.data_type(), shapes[0]);
  const auto launch = LAUNCH_ACLNN_FUNC(
    aclnnCompressor, x, wkv, wgate, state_cache, ape, norm_weight, rope_sin, rope_cos, state_block_table, cu_seqlens,
    seqused, start_pos, rope_head_dim, cmp_ratio, coff, norm_eps, rotary_mode, cache_mode, state_cache_stride, cmp_kv);
  return Run("Compressor", launch,
             {x, wkv, wgate, state_cache, ape, norm_weight, rope_sin, rope_cos, state_block_table, cu_seqlens, seqused,
              start_pos},
             {cmp_kv});
}

Tensors SparseAttnSharedkv(const Tensor &q, const Maybe &ori_kv, const Maybe &cmp_kv, const Maybe &ori_sparse_indices,
                           const Maybe &cmp_sparse_indices, const Maybe &ori_block_table, const Maybe &cmp_block_table,
                           const Maybe &cu_seqlens_q, const Maybe &cu_seqlens_ori_kv, const Maybe &cu_seqlens_cmp_kv,
                           const Maybe &seqused_q, const Maybe &seqused_kv, const Maybe &sinks, const Maybe &metadata,
                           double softmax_scale, int64_t cmp_ratio, int64_t ori_mask_mode, int64_t cmp_mask_mode,
                           int64_t ori_win_left, int64_t ori_win_right, const std::string &layout_q,
                           const std::string &layout_kv, bool return_softmax_lse) {
  const auto shapes = AttentionShapes(q.shape(), return_softmax_lse);
  const auto ori_kv_stride = PageStride(ori_kv), cmp_kv_stride = PageStride(cmp_kv);
  Tensor out(q.data_type(), shapes[0]), softmax_lse(kFloat, shapes[1]);
  const auto launch = LAUNCH_ACLNN_FUNC(
    aclnnSparseAttnSharedkv, q, ori_kv, cmp_kv, ori_sparse_indices, cmp_sparse_indices, ori_block_table,
    cmp_block_table, cu_seqlens_q, cu_seqlens_ori_kv, cu_seqlens_cmp_kv, seqused_q, seqused_kv, sinks, metadata,
    softmax_scale, cmp_ratio, ori_mask_mode, cmp_mask_mode, ori_kv_stride, cmp_kv_stride, ori_win_left, ori_win_right,
    layout_q, layout_kv, return_softmax_lse, out, softmax_lse);
  return Run("SparseAttnSharedkv", launch,
             {q, ori_kv, cmp_kv, ori_sparse_indices, cmp_sparse_indices, ori_block_table, cmp_block_table, cu_seqlens_q,
              cu_seqlens_ori_kv, cu_seqlens_cmp_kv, seqused_q, seqused_kv, sinks, metadata},
             {out, softmax_lse});
}

Tensors SparseAttnSharedkvMetadata(int64_t num_heads_q, int64_t num_heads_kv, int64_t head_dim, Maybe cu_seqlens_q,
                                   Maybe cu_seqlens_ori_kv, Maybe cu_seqlens_cmp_kv, Maybe seqused_q, Maybe seqused_kv,
                                   int64_t batch_size, int64_t max_seqlen_q, int64_t max_seqlen_kv, int64_t ori_topk,
                                   int64_t cmp_topk, int64_t cmp_ratio, int64_t ori_mask_mode, int64_t cmp_mask_mode,
                                   int64_t ori_win_left, int64_t ori_win_right, const std::string &layout_q,
                                   const std::string &layout_kv, bool has_ori_kv, bool has_cmp_kv) {
  EmptyForNone({&cu_seqlens_q, &cu_seqlens_ori_kv, &cu_seqlens_cmp_kv, &seqused_q, &seqused_kv});
  Tensor metadata(kInt, MetadataShapes()[0]);
  const auto launch = LAUNCH_ACLNN_FUNC(
    aclnnSparseAttnSharedkvMetadata, cu_seqlens_q, cu_seqlens_ori_kv, cu_seqlens_cmp_kv, seqused_q, seqused_kv,
    num_heads_q, num_heads_kv, head_dim, batch_size, max_seqlen_q, max_seqlen_kv, ori_topk, cmp_topk, cmp_ratio,
    ori_mask_mode, cmp_mask_mode, ori_win_left, ori_win_right, layout_q, layout_kv, has_ori_kv, has_cmp_kv, metadata);
  return Run("SparseAttnSharedkvMetadata", launch,
             {cu_seqlens_q, cu_seqlens_ori_kv, cu_seqlens_cmp_kv, seqused_q, seqused_kv}, {metadata});
}

Tensors KvQuantSparseAttnSharedkv(const Tensor &q, int64_t kv_quant_mode, const Maybe &ori_kv, const Maybe &cmp_kv,
                                  const Maybe &ori_sparse_indices, const Maybe &cmp_sparse_indices,
                                  const Maybe &ori_block_table, const Maybe &cmp_block_table, const Maybe &cu_seqlens_q,
                                  const Maybe &cu_seqlens_ori_kv, const Maybe &cu_seqlens_cmp_kv,
                                  const Maybe &seqused_q, const Maybe &seqused_kv, const Maybe &sinks,
                                  const Maybe &metadata, int64_t tile_size, int64_t rope_head_dim, double softmax_scale,
                                  int64_t cmp_ratio, int64_t ori_mask_mode, int64_t cmp_mask_mode, int64_t ori_win_left,
                                  int64_t ori_win_right, const std::string &layout_q, const std::string &layout_kv,
                                  bool return_softmax_lse) {
  const auto shapes = AttentionShapes(q.shape(), return_softmax_lse);
  const auto ori_kv_stride = PageStride(ori_kv), cmp_kv_stride = PageStride(cmp_kv);
  Tensor out(q.data_type(), shapes[0]), softmax_lse(kFloat, shapes[1]);
  const auto launch = LAUNCH_ACLNN_FUNC(
    aclnnKvQuantSparseAttnSharedkv, q, ori_kv, cmp_kv, ori_sparse_indices, cmp_sparse_indices, ori_block_table,
    cmp_block_table, cu_seqlens_q, cu_seqlens_ori_kv, cu_seqlens_cmp_kv, seqused_q, seqused_kv, sinks, metadata,
    kv_quant_mode, tile_size, rope_head_dim, softmax_scale, cmp_ratio, ori_mask_mode, cmp_mask_mode, ori_win_left,
    ori_win_right, layout_q, layout_kv, ori_kv_stride, cmp_kv_stride, return_softmax_lse, out, softmax_lse);
  return Run("KvQuantSparseAttnSharedkv", launch,
             {q, ori_kv, cmp_kv, ori_sparse_indices, cmp_sparse_indices, ori_block_table, cmp_block_table, cu_seqlens_q,
              cu_seqlens_ori_kv, cu_seqlens_cmp_kv, seqused_q, seqused_kv, sinks, metadata},
             {out, softmax_lse});
}

Tensors KvQuantSparseAttnSharedkvMetadata(int64_t num_heads_q, int64_t num_heads_kv, int64_t head_dim,
                                          int64_t kv_quant_mode, Maybe cu_seqlens_q, Maybe cu_seqlens_ori_kv,
                                          Maybe cu_seqlens_cmp_kv, Maybe seqused_q, Maybe seqused_kv,
                                          int64_t batch_size, int64_t max_seqlen_q, int64_t max_seqlen_kv,
                                          int64_t ori_topk, int64_t cmp_topk, int64_t tile_size, int64_t rope_head_dim,
                                          int64_t cmp_ratio, int64_t ori_mask_mode, int64_t cmp_mask_mode,
                                          int64_t ori_win_left, int64_t ori_win_right, const std::string &layout_q,
                                          const std::string &layout_kv, bool has_ori_kv, bool has_cmp_kv) {
  EmptyForNone({&cu_seqlens_q, &cu_seqlens_ori_kv, &cu_seqlens_cmp_kv, &seqused_q, &seqused_kv});
  Tensor metadata(kInt, MetadataShapes()[0]);
  const auto launch = LAUNCH_ACLNN_FUNC(
    aclnnKvQuantSparseAttnSharedkvMetadata, cu_seqlens_q, cu_seqlens_ori_kv, cu_seqlens_cmp_kv, seqused_q, seqused_kv,
    num_heads_q, num_heads_kv, head_dim, batch_size, max_seqlen_q, max_seqlen_kv, ori_topk, cmp_topk, kv_quant_mode,
    tile_size, rope_head_dim, cmp_ratio, ori_mask_mode, cmp_mask_mode, ori_win_left, ori_win_right, layout_q, layout_kv,
    has_ori_kv, has_cmp_kv, metadata);
  return Run("KvQuantSparseAttnSharedkvMetadata", launch,
             {cu_seqlens_q, cu_seqlens_ori_kv, cu_seqlens_cmp_kv, seqused_q, seqused_kv}, {metadata});
}

Tensors QuantLightningIndexer(const Tensor &query, const Tensor &key, const Tensor &weights,
                              const Tensor &query_dequant_scale, const Tensor &key_dequant_scale,
                              int64_t query_quant_mode, int64_t key_quant_mode, const Maybe &actual_seq_lengths_query,
                              const Maybe &actual_seq_lengths_key, const Maybe &block_table, const Maybe &metadata,
                              const std::string &layout_query, const std::string &layout_key, int64_t sparse_count,
                              int64_t sparse_mode, int64_t pre_tokens, int64_t next_tokens, int64_t cmp_ratio,
                              bool return_value) {
  const auto shapes = IndexerShapes(query.shape(), key.shape(), layout_key, sparse_count, return_value);
  const auto key_stride = PageStride(key), key_dequant_scale_stride = PageStride(key_dequant_scale);
  Tensor sparse_indices(kInt, shapes[0]), sparse_values(kFloat, shapes[1]);
  const auto launch = LAUNCH_ACLNN_FUNC(
    aclnnVllmQuantLightningIndexer, query, key, weights, query_dequant_scale, key_dequant_scale,
    actual_seq_lengths_query, actual_seq_lengths_key, block_table, metadata, query_quant_mode, key_quant_mode,
    layout_query, layout_key, sparse_count, sparse_mode, pre_tokens, next_tokens, cmp_ratio, return_value, key_stride,
    key_dequant_scale_stride, sparse_indices, sparse_values);
  return Run("QuantLightningIndexer", launch,
             {query, key, weights, query_dequant_scale, key_dequant_scale, actual_seq_lengths_query,
              actual_seq_lengths_key, block_table, metadata},
             {sparse_indices, sparse_values});
}

Tensors QuantLightningIndexerMetadata(int64_t num_heads_q, int64_t num_heads_k, int64_t head_dim,
                                      int64_t query_quant_mode, int64_t key_quant_mode, Maybe actual_seq_lengths_query,
                                      Maybe actual_seq_lengths_key, int64_t batch_size, int64_t max_seqlen_q,
                                      int64_t max_seqlen_k, const std::string &layout_query,
                                      const std::string &layout_key, int64_t sparse_count, int64_t sparse_mode,
                                      int64_t pre_tokens, int64_t next_tokens, int64_t cmp_ratio) {
  EmptyForNone({&actual_seq_lengths_query, &actual_seq_lengths_key});
  Tensor metadata(kInt, MetadataShapes()[0]);
  const auto launch = LAUNCH_ACLNN_FUNC(
    aclnnVllmQuantLightningIndexerMetadata, actual_seq_lengths_query, actual_seq_lengths_key, num_heads_q, num_heads_k,
    head_dim, query_quant_mode, key_quant_mode, batch_size, max_seqlen_q, max_seqlen_k, layout_query, layout_key,
    sparse_count, sparse_mode, pre_tokens, next_tokens, cmp_ratio, metadata);
  return Run("QuantLightningIndexerMetadata", launch, {actual_seq_lengths_query, actual_seq_lengths_key}, {metadata});
}

Tensors MoeGatingTopKHash(const Tensor &x, int64_t k, const Maybe &bias, const Maybe &input_ids, const Maybe &tid2eid,
                          int64_t k_group, int64_t group_count, double routed_scaling_factor, double eps,
                          int64_t group_select_mode, int64_t renorm, int64_t norm_type, bool out_flag) {
  const auto shapes = GateShapes(x.shape(), k);
  Tensor y(x.data_type(), shapes[0]), expert_idx(kInt, shapes[1]), out(kFloat, shapes[2]);
  const auto launch =
    LAUNCH_ACLNN_FUNC(aclnnMoeGatingTopKHash, x, bias, input_ids, tid2eid, k, k_group, group_count,
                      routed_scaling_factor, eps, group_select_mode, renorm, norm_type, out_flag, y, expert_idx, out);
  return Run("MoeGatingTopKHash", launch, {x, bias, input_ids, tid2eid}, {y, expert_idx, out});
}

// MindSpore copies what is not contiguous before a call, unless told not to: state that the
// operator writes must be the caller's, and caches must not be copied.
void KeepStrides(const Tensor &tensor) { tensor.SetNeedContiguous(false); }
void KeepStrides(const Maybe &tensor) {
  if (tensor.has_value()) KeepStrides(tensor.value());
}
template <typename T>
void KeepStrides(const T &) {}

template <int kOutputs, typename... Args>
void Define(pybind11::module_ *m, const char *name, Tensors (*function)(Args...)) {
  m->def(name, [name, function](std::decay_t<Args>... args) {
    (KeepStrides(args), ...);
    return ms::pynative::PyboostRunner::Call<kOutputs>(std::string(name), function, args...);
  });
}
}  // namespace v4_ascend

PYBIND11_MODULE(MS_EXTENSION_NAME, m) {
  using namespace v4_ascend;
  Define<3>(&m, "npu_hc_pre_v2", HcPre);
  Define<1>(&m, "npu_hc_post", HcPost);
  Define<1>(&m, "compressor", Compressor);
  Define<2>(&m, "npu_sparse_attn_sharedkv", SparseAttnSharedkv);
  Define<1>(&m, "npu_sparse_attn_sharedkv_metadata", SparseAttnSharedkvMetadata);
  Define<2>(&m, "npu_kv_quant_sparse_attn_sharedkv", KvQuantSparseAttnSharedkv);
  Define<1>(&m, "npu_kv_quant_sparse_attn_sharedkv_metadata", KvQuantSparseAttnSharedkvMetadata);
  Define<2>(&m, "npu_vllm_quant_lightning_indexer", QuantLightningIndexer);
  Define<1>(&m, "npu_vllm_quant_lightning_indexer_metadata", QuantLightningIndexerMetadata);
  Define<3>(&m, "moe_gating_top_k_hash", MoeGatingTopKHash);
}
