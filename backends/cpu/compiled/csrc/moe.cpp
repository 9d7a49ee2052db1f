// Routing: which experts a token goes to, and its rows there and back.
#include "simd.h"

namespace {

constexpr float WEIGHT_SUM_FLOOR = 1e-20f;

// sqrt(softplus(x)) without overflow
float affinity(float x) { return std::sqrt(std::max(x, 0.0f) + std::log1p(std::exp(-std::abs(x)))); }

void weigh(const float* score, const int64_t* ids, int64_t topk, float route_scale, float* weights) {
  float total = 0.0f;
  for (int64_t k = 0; k < topk; k++) total += score[ids[k]];
  total = std::max(total, WEIGHT_SUM_FLOOR);
  for (int64_t k = 0; k < topk; k++) weights[k] = score[ids[k]] / total * route_scale;
}

int64_t n_outside(const int64_t* ids, int64_t n, int64_t n_experts) {
  return std::count_if(ids, ids + n, [=](int64_t id) { return id < 0 || id >= n_experts; });
}

}  // namespace

extern "C" {

// Ties go to the lower id.
void topk_gate(const float* logits, const float* bias, float* weights, int64_t* ids, int64_t tokens,
               int64_t n_experts, int64_t topk, float route_scale) {
  parallel(tokens, 64 * n_experts, [=](int64_t begin, int64_t end) {
    std::vector<float> score(n_experts);
    std::vector<int64_t> order(n_experts);
    for (int64_t t = begin; t < end; t++) {
      for (int64_t e = 0; e < n_experts; e++) {
        score[e] = affinity(logits[t * n_experts + e]);
        order[e] = e;
      }
      auto is_before = [&](int64_t a, int64_t b) {
        float x = score[a] + bias[a], y = score[b] + bias[b];
        return x > y || (x == y && a < b);
      };
      std::partial_sort(order.begin(), order.begin() + topk, order.end(), is_before);
      std::copy_n(order.begin(), topk, ids + t * topk);
      weigh(score.data(), ids + t * topk, topk, route_scale, weights + t * topk);
    }
  });
}

// Return how many ids are no experts; nothing is computed if there are any.
int64_t hash_gate(const float* logits, const int64_t* ids, float* weights, int64_t tokens,
                  int64_t n_experts, int64_t topk, float route_scale) {
  if (int64_t wrong = n_outside(ids, tokens * topk, n_experts)) return wrong;
  parallel(tokens, 64 * topk, [=](int64_t begin, int64_t end) {
    std::vector<float> score(n_experts);
    for (int64_t t = begin; t < end; t++) {
      const int64_t* chosen = ids + t * topk;
      for (int64_t k = 0; k < topk; k++) score[chosen[k]] = affinity(logits[t * n_experts + chosen[k]]);
      weigh(score.data(), chosen, topk, route_scale, weights + t * topk);
    }
  });
  return 0;
}

// Order the pairs (token, choice) by expert, in their own order within one; count each expert's.
// Return how many ids are no experts; nothing is ordered if there are any.
int64_t moe_order(const int64_t* ids, int64_t n_pairs, int64_t n_experts, int64_t* group_sizes,
                  int64_t* source) {
  if (int64_t wrong = n_outside(ids, n_pairs, n_experts)) return wrong;
  std::fill_n(group_sizes, n_experts, 0);
  for (int64_t i = 0; i < n_pairs; i++) group_sizes[ids[i]]++;
  std::vector<int64_t> next(n_experts, 0);
  for (int64_t e = 1; e < n_experts; e++) next[e] = next[e - 1] + group_sizes[e - 1];
  for (int64_t i = 0; i < n_pairs; i++) source[next[ids[i]]++] = i;
  return 0;
}

// rows[r] = x[source[r] / topk], row_weights[r] = weights[source[r]]
void moe_gather(const char* x, const float* weights, const int64_t* source, char* rows,
                float* row_weights, int64_t n_pairs, int64_t topk, int64_t row_bytes) {
  parallel(n_pairs, row_bytes / 4, [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      memcpy(rows + r * row_bytes, x + source[r] / topk * row_bytes, size_t(row_bytes));
      row_weights[r] = weights[source[r]];
    }
  });
}
}

namespace {

template <typename T>
CLONES void combine(const T* rows, const int64_t* row_of, float* out, int64_t begin, int64_t end,
                    int64_t topk, int64_t dim) {
  for (int64_t t = begin; t < end; t++) {
    float* to = out + t * dim;
    int64_t i = 0;
    for (; i + LANES <= dim; i += LANES) {
      f32x16 y = {};
      for (int64_t k = 0; k < topk; k++) y += load(rows + row_of[t * topk + k] * dim + i);
      store(to + i, y);
    }
    for (; i < dim; i++) {
      to[i] = 0.0f;
      for (int64_t k = 0; k < topk; k++) to[i] += get(rows + row_of[t * topk + k] * dim + i);
    }
  }
}

}  // namespace

// Sum each token's rows in the order of its choices.
extern "C" void moe_combine(const void* rows, const int64_t* source, float* out, int64_t tokens,
                            int64_t topk, int64_t dim, int64_t is_bf16) {
  std::vector<int64_t> row_of(tokens * topk);
  for (int64_t r = 0; r < tokens * topk; r++) row_of[source[r]] = r;
  const int64_t* at = row_of.data();
  parallel(tokens, topk * dim, [=](int64_t begin, int64_t end) {
    if (is_bf16)
      combine((const bf16*)rows, at, out, begin, end, topk, dim);
    else
      combine((const float*)rows, at, out, begin, end, topk, dim);
  });
}

PACKED(topk_gate)
PACKED(hash_gate)
PACKED(moe_order)
PACKED(moe_gather)
PACKED(moe_combine)
