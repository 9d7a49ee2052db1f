// Manifold-constrained hyper-connections: what goes into a sublayer, and how it comes back.
#include "simd.h"

namespace {

constexpr int64_t MAX_HC = 8;

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

void normalise(float* comb, int64_t hc, int64_t step, int64_t other, float eps) {
  for (int64_t i = 0; i < hc; i++) {
    float total = eps;
    for (int64_t j = 0; j < hc; j++) total += comb[i * other + j * step];
    for (int64_t j = 0; j < hc; j++) comb[i * other + j * step] /= total;
  }
}

// Softmax over each row, then rows and columns in turns until both sum to one.
void sinkhorn(float* comb, int64_t hc, int64_t iters, float eps) {
  for (int64_t i = 0; i < hc; i++) {
    float* row = comb + i * hc;
    float top = *std::max_element(row, row + hc), total = 0.0f;
    for (int64_t j = 0; j < hc; j++) total += row[j] = std::exp(row[j] - top);
    for (int64_t j = 0; j < hc; j++) row[j] = row[j] / total + eps;
  }
  normalise(comb, hc, hc, 1, eps);
  for (int64_t n = 1; n < iters; n++) {
    normalise(comb, hc, 1, hc, eps);
    normalise(comb, hc, hc, 1, eps);
  }
}

// out = sum_j factor[j] * rows[j]
template <typename T>
INLINE void mix(const T* rows, const float* factor, int64_t hc, int64_t dim, T* out) {
  int64_t i = 0;
  for (; i + LANES <= dim; i += LANES) {
    f32x16 y = {};
    for (int64_t j = 0; j < hc; j++) y += factor[j] * load(rows + j * dim + i);
    store(out + i, y);
  }
  for (; i < dim; i++) {
    float y = 0.0f;
    for (int64_t j = 0; j < hc; j++) y += factor[j] * get(rows + j * dim + i);
    put(out + i, y);
  }
}

// Products of each token's streams with `fn`, or those that are there already without it, divided by
// the streams' root mean square.
template <typename T>
CLONES void mixing_logits(const T* x, const float* fn, float* out, int64_t begin, int64_t end,
                          int64_t n_out, int64_t n, float eps) {
  std::vector<float> wide(n);
  for (int64_t t = begin; t < end; t++) {
    widen(x + t * n, n, wide.data());
    float scale = 1.0f / std::sqrt(dot(wide.data(), wide.data(), n) / float(n) + eps);
    for (int64_t r = 0; r < n_out; r++) {
      float product = fn ? dot(wide.data(), fn + r * n, n) : out[t * n_out + r];
      out[t * n_out + r] = product * scale;
    }
  }
}

template <typename T>
CLONES void splits(const T* x, const float* logits, const float* scale, const float* base, T* y,
                   float* post, float* comb, int64_t begin, int64_t end, int64_t hc, int64_t dim,
                   int64_t iters, float eps) {
  for (int64_t t = begin; t < end; t++) {
    const float* logit = logits + t * hc * (2 + hc);
    float pre[MAX_HC];
    for (int64_t k = 0; k < hc; k++) {
      pre[k] = sigmoid(logit[k] * scale[0] + base[k]) + eps;
      post[t * hc + k] = 2.0f * sigmoid(logit[hc + k] * scale[1] + base[hc + k]);
    }
    float* own = comb + t * hc * hc;
    for (int64_t k = 0; k < hc * hc; k++)
      own[k] = logit[2 * hc + k] * scale[2] + base[2 * hc + k];
    sinkhorn(own, hc, iters, eps);
    mix(x + t * hc * dim, pre, hc, dim, y + t * dim);
  }
}

template <typename T>
CLONES void posts(const T* x, const T* residual, const float* post, const float* comb, T* out,
                  int64_t begin, int64_t end, int64_t hc, int64_t dim) {
  for (int64_t t = begin; t < end; t++) {
    const T *own = x + t * dim, *streams = residual + t * hc * dim;
    const float *p = post + t * hc, *c = comb + t * hc * hc;
    for (int64_t k = 0; k < hc; k++) {
      T* to = out + (t * hc + k) * dim;
      int64_t i = 0;
      for (; i + LANES <= dim; i += LANES) {
        f32x16 mixed = {};
        for (int64_t j = 0; j < hc; j++) mixed += c[j * hc + k] * load(streams + j * dim + i);
        store(to + i, p[k] * load(own + i) + mixed);
      }
      for (; i < dim; i++) {
        float mixed = 0.0f;
        for (int64_t j = 0; j < hc; j++) mixed += c[j * hc + k] * get(streams + j * dim + i);
        put(to + i, p[k] * get(own + i) + mixed);
      }
    }
  }
}

}  // namespace

extern "C" {

// With `fn` the products are computed here, else `logits` has them.
void hc_pre(const void* x, const float* fn, float* logits, const float* scale, const float* base,
            void* y, float* post, float* comb, int64_t tokens, int64_t hc, int64_t dim,
            int64_t iters, float norm_eps, float hc_eps, int64_t is_bf16) {
  int64_t n_out = hc * (2 + hc);
  auto run = [=](auto element, int64_t begin, int64_t end) {
    using T = decltype(element);
    const T* streams = (const T*)x;
    mixing_logits(streams, fn, logits, begin, end, n_out, hc * dim, norm_eps);
    splits(streams, logits, scale, base, (T*)y, post, comb, begin, end, hc, dim, iters, hc_eps);
  };
  parallel(tokens, n_out * hc * dim, [=](int64_t begin, int64_t end) {
    if (is_bf16)
      run(bf16{}, begin, end);
    else
      run(float{}, begin, end);
  });
}

void hc_head(const void* x, const float* fn, const float* scale, const float* base, void* y,
             int64_t tokens, int64_t hc, int64_t dim, float norm_eps, float hc_eps,
             int64_t is_bf16) {
  auto run = [=](auto element, int64_t begin, int64_t end) {
    using T = decltype(element);
    const T* streams = (const T*)x;
    for (int64_t t = begin; t < end; t++) {
      float factor[MAX_HC];
      mixing_logits(streams + t * hc * dim, fn, factor, 0, 1, hc, hc * dim, norm_eps);
      for (int64_t k = 0; k < hc; k++) factor[k] = sigmoid(factor[k] * *scale + base[k]) + hc_eps;
      mix(streams + t * hc * dim, factor, hc, dim, (T*)y + t * dim);
    }
  };
  parallel(tokens, hc * hc * dim, [=](int64_t begin, int64_t end) {
    if (is_bf16)
      run(bf16{}, begin, end);
    else
      run(float{}, begin, end);
  });
}

void hc_post(const void* x, const void* residual, const float* post, const float* comb, void* out,
             int64_t tokens, int64_t hc, int64_t dim, int64_t is_bf16) {
  parallel(tokens, hc * hc * dim, [=](int64_t begin, int64_t end) {
    if (is_bf16)
      posts((const bf16*)x, (const bf16*)residual, post, comb, (bf16*)out, begin, end, hc, dim);
    else
      posts((const float*)x, (const float*)residual, post, comb, (float*)out, begin, end, hc, dim);
  });
}
}

PACKED(hc_pre)
PACKED(hc_head)
PACKED(hc_post)
