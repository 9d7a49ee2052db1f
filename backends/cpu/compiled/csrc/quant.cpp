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

template <typename T>
CLONES void quantise_fp8(const T* x, uint8_t* out, uint8_t* scale, int64_t begin, int64_t end,
                         int64_t n) {
  for (int64_t g = begin; g < end; g++) {
    // The product with fp32(1 / 448), not the quotient: 448 * 2^k then gives exactly 2^k.
    scale[g] = ceil_to_e8m0(std::max(largest(x + g * n, n), 1e-4f) * (1.0f / FP8_MAX));
    float one = power_of_two(scale[g]);
    for (int64_t i = g * n; i < (g + 1) * n; i += LANES) {
      u16x16 codes = __builtin_convertvector(to_e4m3(load(x + i) / one), u16x16);
      u8x16 bytes = __builtin_convertvector(codes, u8x16);
      memcpy(out + i, &bytes, sizeof bytes);
    }
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
    scale[g] = ceil_to_e8m0(std::max(largest(x + g * n, n), FP4_MAX * 0x1p-126f) / FP4_MAX);
    float one = power_of_two(scale[g]);
    for (int64_t i = g * n; i < (g + 1) * n; i += 2)
      out[i / 2] = uint8_t(to_e2m1(get(x + i) / one) | (to_e2m1(get(x + i + 1) / one) << 4));
  }
}

}  // namespace

extern "C" {

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
