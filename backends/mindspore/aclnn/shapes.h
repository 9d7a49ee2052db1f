// SPDX-License-Identifier: Apache-2.0
//
// The shapes that each operator returns, in order: the same for eager calls and for graphs. Plain
// C++, so that a test can ask them without MindSpore. A graph may not know a dimension yet; where
// one is computed from it, it is unknown too.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace v4_ascend {
using Shape = std::vector<int64_t>;
using Shapes = std::vector<Shape>;

constexpr int64_t kUnknown = -1;  // as MindSpore's Shape::kShapeDimAny
constexpr int64_t kMetadataSize = 1024;

// x [.., n, D]: y [.., D], post [.., n], comb [.., n, n].
inline Shapes HcPreShapes(const Shape &x, int64_t hc_mult) {
  Shape post(x.begin(), x.end() - 1), y(x.begin(), x.end() - 2), comb = post;
  y.push_back(x.back());
  comb.push_back(hc_mult);
  return {y, post, comb};
}

inline Shapes HcPostShapes(const Shape &residual) { return {residual}; }

// Of batches [B, S, H] a row for each group of tokens; of packed tokens [T, H] as many as there
// are angles.
inline Shapes CompressorShapes(const Shape &x, const Shape &norm_weight, const Shape &rope_sin, int64_t cmp_ratio) {
  if (x.size() != 3) return {{rope_sin[0], norm_weight[0]}};
  const auto rows = x[1] == kUnknown ? kUnknown : (x[1] + cmp_ratio - 1) / cmp_ratio;
  return {{x[0], rows, norm_weight[0]}};
}

// Like q; and a number per head, or nothing.
inline Shapes AttentionShapes(const Shape &q, bool return_softmax_lse) {
  auto lse = return_softmax_lse ? q : Shape{0};
  if (return_softmax_lse) lse.back() = 1;
  return {q, lse};
}

inline Shapes MetadataShapes() { return {{kMetadataSize}}; }

// query [.., N, D]: ids [.., key heads, sparse_count], and their values or nothing.
inline Shapes IndexerShapes(const Shape &query, const Shape &key, const std::string &layout_key, int64_t sparse_count,
                            bool return_value) {
  auto ids = query;
  ids[ids.size() - 2] = key[layout_key == "TND" ? 1 : 2];
  ids.back() = sparse_count;
  return {ids, return_value ? ids : Shape{0}};
}

// Logits [T, E]: weights and ids [T, k], and scores like the logits.
inline Shapes GateShapes(const Shape &x, int64_t k) { return {{x[0], k}, {x[0], k}, x}; }
}  // namespace v4_ascend
