// SPDX-License-Identifier: Apache-2.0
//
// What a graph runs for each operator on an Ascend device: its aclnn function, with the arguments in
// the order that interface.txt records; a test compares the two. Syntax-checked against MindSpore's
// headers; never compiled against CANN, never run.

#include "ms_extension/all.h"

#include "kernel/ascend/aclnn/kernel_mod_impl/aclnn_kernel_mod.h"

#include "graph_operators.h"

namespace v4_ascend::graph {
// The macros of aclnn_kernel_mod.h name things as if they were written there.
using namespace mindspore;
using namespace mindspore::kernel;
using Tensors = std::vector<KernelTensor *>;

// One call's arguments, by the operator's parameters. A tensor that was not given is None.
class Call {
 public:
  Call(const Tensors &inputs, const Tensors &outputs, KernelTensor *empty)
      : inputs_(inputs), outputs_(outputs), empty_(empty) {}
  KernelTensor *In(size_t i) const { return inputs_[i]; }
  KernelTensor *Out(size_t i) const { return outputs_[i]; }
  int64_t Int(size_t i) const { return inputs_[i]->GetValueWithCheck<int64_t>(); }
  double Float(size_t i) const { return static_cast<double>(inputs_[i]->GetValueWithCheck<pyfloat>()); }
  bool Bool(size_t i) const { return inputs_[i]->GetValueWithCheck<bool>(); }
  std::string Str(size_t i) const { return inputs_[i]->GetValueWithCheck<std::string>(); }
  // The metadata operators run on the AI CPU and are given empty tensors, not null.
  KernelTensor *OrEmpty(size_t i) const { return IsNone(i) ? empty_ : inputs_[i]; }
  // Elements from page to page: in a graph tensors have no gaps.
  int64_t Stride(size_t i) const {
    if (IsNone(i)) return 0;
    int64_t elements = 1;
    const auto &shape = inputs_[i]->GetShapeVector();
    for (size_t dim = 1; dim < shape.size(); ++dim) elements *= shape[dim];
    return elements;
  }

 private:
  bool IsNone(size_t i) const { return inputs_[i]->type_id() == kMetaTypeNone; }
  const Tensors &inputs_, &outputs_;
  KernelTensor *empty_;
};

template <typename Arguments>
class Kernel : public AclnnKernelMod {
 public:
  Kernel() : AclnnKernelMod(Arguments::kAclnn) {}
  void GetWorkSpaceInfo(const Tensors &inputs, const Tensors &outputs) override {
    std::apply([this](const auto &...a) { GetWorkspaceForResize(a...); },
               Arguments::Of(Call(inputs, outputs, empty_.get())));
  }
  bool Launch(const Tensors &inputs, const Tensors &workspace, const Tensors &outputs, void *stream) override {
    std::apply([&](const auto &...a) { RunOp(stream, workspace, a...); },
               Arguments::Of(Call(inputs, outputs, empty_.get())));
    return true;
  }

 private:
  DEFINE_GET_WORKSPACE_FOR_RESIZE()
  EmptyKernelTensor empty_{kObjectTypeTensorType, kInt};
};

struct HcPreArguments : HcPre {
  static constexpr const char *kAclnn = "aclnnHcPre";
  static auto Of(const Call &c) {
    return std::make_tuple(c.In(x), c.In(hc_fn), c.In(hc_scale), c.In(hc_base), c.Int(hc_mult),
                           c.Int(hc_sinkhorn_iters), c.Float(hc_eps), c.Float(norm_eps), c.Out(0), c.Out(1), c.Out(2));
  }
};

struct HcPostArguments : HcPost {
  static constexpr const char *kAclnn = "aclnnHcPost";
  static auto Of(const Call &c) { return std::make_tuple(c.In(x), c.In(residual), c.In(post), c.In(comb), c.Out(0)); }
};

struct CompressorArguments : Compressor {
  static constexpr const char *kAclnn = "aclnnCompressor";
  static auto Of(const Call &c) {
    return std::make_tuple(c.In(x), c.In(wkv), c.In(wgate), c.In(state_cache), c.In(ape), c.In(norm_weight),
                           c.In(rope_sin), c.In(rope_cos), c.In(state_block_table), c.In(cu_seqlens), c.In(seqused),
                           c.In(start_pos), c.Int(rope_head_dim), c.Int(cmp_ratio), c.Int(coff), c.Float(norm_eps),
                           c.Int(rotary_mode), c.Int(cache_mode), c.Stride(state_cache), c.Out(0));
  }
};

struct SparseAttnSharedkvArguments : SparseAttnSharedkv {
  static constexpr const char *kAclnn = "aclnnSparseAttnSharedkv";
  static auto Of(const Call &c) {
    return std::make_tuple(
      c.In(q), c.In(ori_kv), c.In(cmp_kv), c.In(ori_sparse_indices), c.In(cmp_sparse_indices), c.In(ori_block_table),
      c.In(cmp_block_table), c.In(cu_seqlens_q), c.In(cu_seqlens_ori_kv), c.In(cu_seqlens_cmp_kv), c.In(seqused_q),
      c.In(seqused_kv), c.In(sinks), c.In(metadata), c.Float(softmax_scale), c.Int(cmp_ratio), c.Int(ori_mask_mode),
      c.Int(cmp_mask_mode), c.Stride(ori_kv), c.Stride(cmp_kv), c.Int(ori_win_left), c.Int(ori_win_right),
      c.Str(layout_q), c.Str(layout_kv), c.Bool(return_softmax_lse), c.Out(0), c.Out(1));
  }
};

struct SparseAttnSharedkvMetadataArguments : SparseAttnSharedkvMetadata {
  static constexpr const char *kAclnn = "aclnnSparseAttnSharedkvMetadata";
  static auto Of(const Call &c) {
    return std::make_tuple(c.OrEmpty(cu_seqlens_q), c.OrEmpty(cu_seqlens_ori_kv), c.OrEmpty(cu_seqlens_cmp_kv),
                           c.OrEmpty(seqused_q), c.OrEmpty(seqused_kv), c.Int(num_heads_q), c.Int(num_heads_kv),
                           c.Int(head_dim), c.Int(batch_size), c.Int(max_seqlen_q), c.Int(max_seqlen_kv),
                           c.Int(ori_topk), c.Int(cmp_topk), c.Int(cmp_ratio), c.Int(ori_mask_mode),
                           c.Int(cmp_mask_mode), c.Int(ori_win_left), c.Int(ori_win_right), c.Str(layout_q),
                           c.Str(layout_kv), c.Bool(has_ori_kv), c.Bool(has_cmp_kv), c.Out(0));
  }
};

struct KvQuantSparseAttnSharedkvArguments : KvQuantSparseAttnSharedkv {
  static constexpr const char *kAclnn = "aclnnKvQuantSparseAttnSharedkv";
  static auto Of(const Call &c) {
    return std::make_tuple(
      c.In(q), c.In(ori_kv), c.In(cmp_kv), c.In(ori_sparse_indices), c.In(cmp_sparse_indices), c.In(ori_block_table),
      c.In(cmp_block_table), c.In(cu_seqlens_q), c.In(cu_seqlens_ori_kv), c.In(cu_seqlens_cmp_kv), c.In(seqused_q),
      c.In(seqused_kv), c.In(sinks), c.In(metadata), c.Int(kv_quant_mode), c.Int(tile_size), c.Int(rope_head_dim),
      c.Float(softmax_scale), c.Int(cmp_ratio), c.Int(ori_mask_mode), c.Int(cmp_mask_mode), c.Int(ori_win_left),
      c.Int(ori_win_right), c.Str(layout_q), c.Str(layout_kv), c.Stride(ori_kv), c.Stride(cmp_kv),
      c.Bool(return_softmax_lse), c.Out(0), c.Out(1));
  }
};

struct KvQuantSparseAttnSharedkvMetadataArguments : KvQuantSparseAttnSharedkvMetadata {
  static constexpr const char *kAclnn = "aclnnKvQuantSparseAttnSharedkvMetadata";
  static auto Of(const Call &c) {
    return std::make_tuple(
      c.OrEmpty(cu_seqlens_q), c.OrEmpty(cu_seqlens_ori_kv), c.OrEmpty(cu_seqlens_cmp_kv), c.OrEmpty(seqused_q),
      c.OrEmpty(seqused_kv), c.Int(num_heads_q), c.Int(num_heads_kv), c.Int(head_dim), c.Int(batch_size),
      c.Int(max_seqlen_q), c.Int(max_seqlen_kv), c.Int(ori_topk), c.Int(cmp_topk), c.Int(kv_quant_mode),
      c.Int(tile_size), c.Int(rope_head_dim), c.Int(cmp_ratio), c.Int(ori_mask_mode), c.Int(cmp_mask_mode),
      c.Int(ori_win_left), c.Int(ori_win_right), c.Str(layout_q), c.Str(layout_kv), c.Bool(has_ori_kv),
      c.Bool(has_cmp_kv), c.Out(0));
  }
};

struct QuantLightningIndexerArguments : QuantLightningIndexer {
  static constexpr const char *kAclnn = "aclnnVllmQuantLightningIndexer";
  static auto Of(const Call &c) {
    return std::make_tuple(c.In(query), c.In(key), c.In(weights), c.In(query_dequant_scale), c.In(key_dequant_scale),
                           c.In(actual_seq_lengths_query), c.In(actual_seq_lengths_key), c.In(block_table),
                           c.In(metadata), c.Int(query_quant_mode), c.Int(key_quant_mode), c.Str(layout_query),
                           c.Str(layout_key), c.Int(sparse_count), c.Int(sparse_mode), c.Int(pre_tokens),
                           c.Int(next_tokens), c.Int(cmp_ratio), c.Bool(return_value), c.Stride(key),
                           c.Stride(key_dequant_scale), c.Out(0), c.Out(1));
  }
};

struct QuantLightningIndexerMetadataArguments : QuantLightningIndexerMetadata {
  static constexpr const char *kAclnn = "aclnnVllmQuantLightningIndexerMetadata";
  static auto Of(const Call &c) {
    return std::make_tuple(c.OrEmpty(actual_seq_lengths_query), c.OrEmpty(actual_seq_lengths_key), c.Int(num_heads_q),
                           c.Int(num_heads_k), c.Int(head_dim), c.Int(query_quant_mode), c.Int(key_quant_mode),
                           c.Int(batch_size), c.Int(max_seqlen_q), c.Int(max_seqlen_k), c.Str(layout_query),
                           c.Str(layout_key), c.Int(sparse_count), c.Int(sparse_mode), c.Int(pre_tokens),
                           c.Int(next_tokens), c.Int(cmp_ratio), c.Out(0));
  }
};

struct MoeGatingTopKHashArguments : MoeGatingTopKHash {
  static constexpr const char *kAclnn = "aclnnMoeGatingTopKHash";
  static auto Of(const Call &c) {
    return std::make_tuple(c.In(x), c.In(bias), c.In(input_ids), c.In(tid2eid), c.Int(k), c.Int(k_group),
                           c.Int(group_count), c.Float(routed_scaling_factor), c.Float(eps), c.Int(group_select_mode),
                           c.Int(renorm), c.Int(norm_type), c.Bool(out_flag), c.Out(0), c.Out(1), c.Out(2));
  }
};

// MindSpore's own macro gives every registration of a file the same name.
#define V4_ASCEND_KERNEL(name, Operator)                                            \
  const bool registered_##name = CustomKernelFactory::Instance() \
    .Register("Custom_" #name, [] { return std::make_shared<Kernel<Operator##Arguments>>(); });
V4_ASCEND_OPERATORS(V4_ASCEND_KERNEL)
}  // namespace v4_ascend::graph
