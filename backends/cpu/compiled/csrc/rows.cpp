// What is done to each row by itself: norms, rotation, the experts' activation, cache rows.
#include "simd.h"

namespace {

template <typename T>
INLINE void norm(const T* x, const float* weight, T* out, int64_t n, float eps) {
  f32x16 squares = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) squares += load(x + i) * load(x + i);
  float total = sum(squares);
  for (; i < n; i++) total += get(x + i) * get(x + i);
  float scale = 1.0f / std::sqrt(total / float(n) + eps);
  for (i = 0; i + LANES <= n; i += LANES) {
    f32x16 y = load(x + i) * scale;
    store(out + i, weight ? y * load(weight + i) : y);
  }
  for (; i < n; i++) {
    float y = get(x + i) * scale;
    put(out + i, weight ? y * weight[i] : y);
  }
}

template <typename T>
INLINE void rotate(const T* x, const float* cos, const float* sin, float sign, T* out, int64_t n,
                   int64_t pairs) {
  int64_t plain = n - 2 * pairs;
  memcpy(out, x, size_t(plain) * sizeof(T));
  for (int64_t i = 0; i < pairs; i++) {
    float a = get(x + plain + 2 * i), b = get(x + plain + 2 * i + 1);
    float c = cos[i], s = sin[i] * sign;
    put(out + plain + 2 * i, a * c - b * s);
    put(out + plain + 2 * i + 1, a * s + b * c);
  }
}

INLINE f32x16 silu(f32x16 g) {
  // e^-|g| never overflows; the sigmoid of the other sign is its complement.
  f32x16 e = exp_of_negative(g < splat(0.0f) ? g : -g);
  f32x16 small = e / (1.0f + e);
  return g * (g < splat(0.0f) ? small : 1.0f - small);
}

template <typename T>
INLINE void activate(const T* x, int64_t n, float limit, float weight, T* out) {
  f32x16 most = splat(limit);
  auto product = [=](f32x16 g, f32x16 u) __attribute__((always_inline)) {
    g = g > most ? most : g;
    u = u > most ? most : u;
    u = u < -most ? -most : u;
    return silu(g) * u * weight;
  };
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(out + i, product(load(x + i), load(x + n + i)));
  for (; i < n; i++) put(out + i, product(splat(get(x + i)), splat(get(x + n + i)))[0]);
}

template <typename T>
CLONES void norms(const T* x, const float* weight, T* out, int64_t begin, int64_t end, int64_t n,
                  float eps) {
  for (int64_t r = begin; r < end; r++) norm(x + r * n, weight, out + r * n, n, eps);
}

template <typename T>
CLONES void rotations(const T* x, const float* cos, const float* sin, float sign, T* out,
                      int64_t begin, int64_t end, int64_t heads, int64_t n, int64_t pairs) {
  for (int64_t r = begin; r < end; r++) {
    int64_t at = r / heads * pairs;
    rotate(x + r * n, cos + at, sin + at, sign, out + r * n, n, pairs);
  }
}

template <typename T>
CLONES void activations(const T* x, float limit, const float* weight, T* out, int64_t begin,
                        int64_t end, int64_t n) {
  for (int64_t r = begin; r < end; r++)
    activate(x + r * 2 * n, n, limit, weight ? weight[r] : 1.0f, out + r * n);
}

template <typename A, typename B>
CLONES void copies(const A* rows, const int64_t* slots, B* storage, int64_t begin, int64_t end,
                   int64_t n) {
  for (int64_t r = begin; r < end; r++) {
    if (slots[r] < 0) continue;
    B* out = storage + slots[r] * n;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(out + i, load(rows + r * n + i));
    for (; i < n; i++) put(out + i, get(rows + r * n + i));
  }
}

}  // namespace

#define BOTH(call)             \
  if (is_bf16) {               \
    using T = bf16;            \
    call;                      \
  } else {                     \
    using T = float;           \
    call;                      \
  }

extern "C" {

void rms_norm(const void* x, const float* weight, void* out, int64_t rows, int64_t n, float eps,
              int64_t is_bf16) {
  parallel(rows, 2 * n, [=](int64_t begin, int64_t end) {
    BOTH(norms((const T*)x, weight, (T*)out, begin, end, n, eps))
  });
}

void rope(const void* x, const float* cos, const float* sin, float sign, void* out, int64_t rows,
          int64_t heads, int64_t n, int64_t pairs, int64_t is_bf16) {
  parallel(rows, n, [=](int64_t begin, int64_t end) {
    BOTH(rotations((const T*)x, cos, sin, sign, (T*)out, begin, end, heads, n, pairs))
  });
}

void swiglu(const void* x, float limit, const float* weight, void* out, int64_t rows, int64_t n,
            int64_t is_bf16) {
  parallel(rows, 16 * n, [=](int64_t begin, int64_t end) {
    BOTH(activations((const T*)x, limit, weight, (T*)out, begin, end, n))
  });
}

void store_rows(const void* rows, const int64_t* slots, void* storage, int64_t n_rows, int64_t n,
                int64_t rows_are_bf16, int64_t is_bf16) {
  parallel(n_rows, n, [=](int64_t begin, int64_t end) {
    if (rows_are_bf16) {
      BOTH(copies((const bf16*)rows, slots, (T*)storage, begin, end, n))
    } else {
      BOTH(copies((const float*)rows, slots, (T*)storage, begin, end, n))
    }
  });
}
}

PACKED(rms_norm)
PACKED(rope)
PACKED(swiglu)
PACKED(store_rows)
