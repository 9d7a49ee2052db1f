// Activations by groups of channels with one power of two each: e4m3 and packed e2m1.
#include "simd.h"

namespace {

constexpr float FP8_MAX = 448.0f, FP4_MAX = 6.0f;

// The smallest power of two that is not below x, by bits.
INLINE uint8_t ceil_to_e8m0(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return uint8_t((bits >> 23) + ((bits & 0x7FFFFF) != 0));
}

template <typename T>
INLINE float largest(const T* x, int64_t n) {
  f32x16 tops = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    f32x16 v = load(x + i);
    v = v < splat(0.0f) ? -v : v;
    tops = v > tops ? v : tops;
  }
  float top = 0.0f;
  for (int64_t j = 0; j < LANES; j++) top = std::max(top, tops[j]);
  for (; i < n; i++) top = std::max(top, std::abs(get(x + i)));
  return top;
}

// Saturate and round to the nearest e4m3, ties to even.
INLINE u32x16 to_e4m3(f32x16 x) {
  u32x16 sign = ((u32x16)x >> 24) & 0x80, magnitude = (u32x16)x & 0x7FFFFFFF;
  u32x16 is_nan = (u32x16)(magnitude > 0x7F800000u);
  f32x16 y = (f32x16)magnitude;
  y = y > splat(FP8_MAX) ? splat(FP8_MAX) : y;
  u32x16 bits = (u32x16)y;
  u32x16 normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3);
  // Below 2^-6 steps are 2^-9; adding 2^23 rounds to whole ones.
  u32x16 subnormal = (u32x16)(y * 512.0f + 8388608.0f) & 0xF;
  u32x16 code = y < splat(0x1p-6f) ? subnormal : normal;
  return ((code & ~is_nan) | (is_nan & 0x7F)) | sign;
}

// The product with fp32(1 / 448), not the quotient: 448 * 2^k then gives exactly 2^k.
template <typename T>
INLINE uint8_t fp8_scale(const T* x, int64_t n) {
  return ceil_to_e8m0(std::max(largest(x, n), 1e-4f) * (1.0f / FP8_MAX));
}

template <typename T>
INLINE uint8_t fp4_scale(const T* x, int64_t n) {
  return ceil_to_e8m0(std::max(largest(x, n), FP4_MAX * 0x1p-126f) / FP4_MAX);
}

template <typename T>
CLONES void quantise_fp8(const T* x, uint8_t* out, uint8_t* scale, int64_t begin, int64_t end,
                         int64_t n) {
  for (int64_t g = begin; g < end; g++) {
    scale[g] = fp8_scale(x + g * n, n);
    float one = power_of_two(scale[g]);
    for (int64_t i = g * n; i < (g + 1) * n; i += LANES) {
      u16x16 codes = __builtin_convertvector(to_e4m3(load(x + i) / one), u16x16);
      u8x16 bytes = __builtin_convertvector(codes, u8x16);
      memcpy(out + i, &bytes, sizeof bytes);
    }
  }
}

// Channels of a row that are rounded, then those that are kept.
template <typename T>
CLONES void round_trip_fp8(const T* x, T* out, int64_t begin, int64_t end, int64_t n, int64_t kept,
                           int64_t group) {
  for (int64_t r = begin; r < end; r++) {
    const T* row = x + r * n;
    T* to = out + r * n;
    for (int64_t g = 0; g < n - kept; g += group) {
      float one = power_of_two(fp8_scale(row + g, group));
      for (int64_t i = g; i < g + group; i += LANES)
        store(to + i, e4m3<f32x16, u32x16, i32x16>(to_e4m3(load(row + i) / one)) * one);
    }
    std::copy_n(row + n - kept, kept, to + n - kept);
  }
}

// The nearest e2m1 code, ties to the even one; the sign of zero stays.
INLINE uint8_t to_e2m1(float x) {
  float m = std::abs(x);
  uint8_t code = uint8_t((m > 0.25f) + (m >= 0.75f) + (m > 1.25f) + (m >= 1.75f) + (m > 2.5f) +
                         (m >= 3.5f) + (m > 5.0f));
  return uint8_t(code | (std::signbit(x) << 3));
}

template <typename T>
CLONES void quantise_fp4(const T* x, uint8_t* out, uint8_t* scale, int64_t begin, int64_t end,
                         int64_t n) {
  for (int64_t g = begin; g < end; g++) {
    scale[g] = fp4_scale(x + g * n, n);
    float one = power_of_two(scale[g]);
    for (int64_t i = g * n; i < (g + 1) * n; i += 2)
      out[i / 2] = uint8_t(to_e2m1(get(x + i) / one) | (to_e2m1(get(x + i + 1) / one) << 4));
  }
}

// The nearest e2m1 values: the steps whose middles lie below, ties to the even code.
INLINE f32x16 to_nearest_e2m1(f32x16 x) {
  f32x16 m = (f32x16)((u32x16)x & 0x7FFFFFFF);
  auto step = [](i32x16 is_above, float size) __attribute__((always_inline)) {
    return (f32x16)(is_above & (i32x16)splat(size));
  };
  f32x16 y = step(m > splat(0.25f), 0.5f) + step(m >= splat(0.75f), 0.5f) +
             step(m > splat(1.25f), 0.5f) + step(m >= splat(1.75f), 0.5f) +
             step(m > splat(2.5f), 1.0f) + step(m >= splat(3.5f), 1.0f) +
             step(m > splat(5.0f), 2.0f);
  return (f32x16)((u32x16)y | ((u32x16)x & 0x80000000u));
}

template <typename T>
CLONES void round_trip_fp4(const T* x, T* out, int64_t begin, int64_t end, int64_t n) {
  for (int64_t g = begin; g < end; g++) {
    float one = power_of_two(fp4_scale(x + g * n, n));
    for (int64_t i = g * n; i < (g + 1) * n; i += LANES)
      store(out + i, to_nearest_e2m1(load(x + i) / one) * one);
  }
}

// Sums and differences of channels 1, 2, 4, ... apart; n is a multiple of sixteen.
template <typename T>
CLONES void rotate(const T* x, T* out, int64_t begin, int64_t end, int64_t n) {
  std::vector<float> row(n);
  const f32x4 pairs = {1, -1, 1, -1}, fours = {1, 1, -1, -1};
  float scale = 1.0f / std::sqrt(float(n));
  for (int64_t r = begin; r < end; r++) {
    widen(x + r * n, n, row.data());
    for (int64_t i = 0; i < n; i += 4) {
      f32x4 v;
      load(&row[i], v);
      v = v * pairs + __builtin_shuffle(v, i32x4{1, 0, 3, 2});
      v = v * fours + __builtin_shuffle(v, i32x4{2, 3, 0, 1});
      memcpy(&row[i], &v, sizeof v);
    }
    for (int64_t apart = 4; apart < n; apart *= 2) {
      for (int64_t first = 0; first < n; first += 2 * apart) {
        for (int64_t i = first; i < first + apart; i += 4) {
          f32x4 a, b;
          load(&row[i], a);
          load(&row[i + apart], b);
          f32x4 above = a + b, below = a - b;
          memcpy(&row[i], &above, sizeof above);
          memcpy(&row[i + apart], &below, sizeof below);
        }
      }
    }
    for (int64_t i = 0; i < n; i += LANES) store(out + r * n + i, load(&row[i]) * scale);
  }
}

// Call f(begin, end, x, out) with arrays of their type.
template <typename F>
void by_type(const void* x, void* out, int64_t is_bf16, int64_t n, int64_t cost, F f) {
  parallel(n, cost, [=](int64_t begin, int64_t end) {
    if (is_bf16)
      f(begin, end, (const bf16*)x, (bf16*)out);
    else
      f(begin, end, (const float*)x, (float*)out);
  });
}

}  // namespace

extern "C" {

void fp8_round_trip(const void* x, void* out, int64_t rows, int64_t n, int64_t kept, int64_t group,
                    int64_t is_bf16) {
  by_type(x, out, is_bf16, rows, 8 * n, [=](int64_t begin, int64_t end, auto* from, auto* to) {
    round_trip_fp8(from, to, begin, end, n, kept, group);
  });
}

void fp4_round_trip(const void* x, void* out, int64_t groups, int64_t n, int64_t is_bf16) {
  by_type(x, out, is_bf16, groups, 8 * n, [=](int64_t begin, int64_t end, auto* from, auto* to) {
    round_trip_fp4(from, to, begin, end, n);
  });
}

void hadamard(const void* x, void* out, int64_t rows, int64_t n, int64_t is_bf16) {
  by_type(x, out, is_bf16, rows, 8 * n, [=](int64_t begin, int64_t end, auto* from, auto* to) {
    rotate(from, to, begin, end, n);
  });
}

void act_quant(const void* x, uint8_t* values, uint8_t* scale, int64_t groups, int64_t n,
               int64_t is_bf16) {
  parallel(groups, 8 * n, [=](int64_t begin, int64_t end) {
    if (is_bf16)
      quantise_fp8((const bf16*)x, values, scale, begin, end, n);
    else
      quantise_fp8((const float*)x, values, scale, begin, end, n);
  });
}

void fp4_act_quant(const void* x, uint8_t* packed, uint8_t* scale, int64_t groups, int64_t n,
                   int64_t is_bf16) {
  parallel(groups, 16 * n, [=](int64_t begin, int64_t end) {
    if (is_bf16)
      quantise_fp4((const bf16*)x, packed, scale, begin, end, n);
    else
      quantise_fp4((const float*)x, packed, scale, begin, end, n);
  });
}
}

PACKED(fp8_round_trip)
PACKED(fp4_round_trip)
PACKED(hadamard)
PACKED(act_quant)
PACKED(fp4_act_quant)
