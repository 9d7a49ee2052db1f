// Sixteen floats at a time, on whatever the machine has: compilers lower these vectors to AVX-512,
// AVX2, NEON or SSE. Sums keep one order everywhere, so results do not depend on the machine's
// width; only the contraction of products and sums is left to it.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "calls.h"

// Compiled once for each of these, chosen when the library is loaded.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
// For what needs 32 registers of sixteen floats; KEEP holds a value in one, where the compiler
// would load it anew for each product. WIDEN is the one instruction for what it makes five to nine of.
#define AVX512 __attribute__((target("arch=x86-64-v4")))
#define KEEP(v) asm("" : "+v"(v))
#define WIDEN(how, bytes, v) asm("vpmov" how " %1, %0" : "=v"(v) : "v"(bytes))
static inline bool has_avx512() {
#ifdef NO_AVX512  // what machines without it run, tried on those that have it
  return false;
#endif
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
#else
#define CLONES
#define AVX512
#define KEEP(v)
#define WIDEN(how, bytes, v) v = __builtin_convertvector(bytes, decltype(v))
static inline bool has_avx512() { return false; }
#endif
#define INLINE static inline __attribute__((always_inline))

constexpr int64_t LANES = 16;
typedef float f32x16 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x4 __attribute__((vector_size(16)));
typedef uint32_t u32x4 __attribute__((vector_size(16)));
typedef uint16_t u16x4 __attribute__((vector_size(8)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int16_t i16x16 __attribute__((vector_size(32)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef uint8_t u8x8 __attribute__((vector_size(8)));
typedef int8_t i8x8 __attribute__((vector_size(8)));
typedef int16_t i16x32 __attribute__((vector_size(64)));
typedef int8_t i8x32 __attribute__((vector_size(32)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef int8_t i8x16 __attribute__((vector_size(16)));

struct bf16 {
  uint16_t bits;
};

INLINE f32x16 splat(float x) { return f32x16{} + x; }

// In steps of twice the width, which compilers have instructions for.
INLINE u32x16 widen(u8x16 v) {
  return __builtin_convertvector(__builtin_convertvector(v, u16x16), u32x16);
}

INLINE f32x16 load(const float* p) {
  f32x16 v;
  memcpy(&v, p, sizeof v);
  return v;
}

INLINE f32x16 load(const bf16* p) {
  u16x16 v;
  memcpy(&v, p, sizeof v);
  return (f32x16)(__builtin_convertvector(v, u32x16) << 16);
}

INLINE void store(float* p, f32x16 v) { memcpy(p, &v, sizeof v); }

// Round to nearest, ties to even, as torch does.
INLINE void store(bf16* p, f32x16 v) {
  u32x16 u = (u32x16)v;
  u = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
  u16x16 h = __builtin_convertvector(u, u16x16);
  memcpy(p, &h, sizeof h);
}

INLINE float get(const float* p) { return *p; }

INLINE float get(const bf16* p) {
  uint32_t u = uint32_t(p->bits) << 16;
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

INLINE void put(float* p, float x) { *p = x; }

INLINE void put(bf16* p, float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  p->bits = uint16_t((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
}

// What storing a value as T and reading it again gives.
template <typename T>
INLINE float rounded(float x) {
  T t;
  put(&t, x);
  return get(&t);
}

// The same sixteen floats in two registers of eight: where no register holds sixteen, compilers keep
// an f32x16 that a loop adds to in memory.
struct Pair {
  f32x8 low, high;
};

INLINE Pair operator*(Pair a, Pair b) { return {a.low * b.low, a.high * b.high}; }
INLINE Pair operator*(Pair a, float b) { return {a.low * b, a.high * b}; }
INLINE Pair operator+(Pair a, Pair b) { return {a.low + b.low, a.high + b.high}; }

INLINE void operator+=(Pair& a, Pair b) {
  a.low += b.low;
  a.high += b.high;
}

INLINE void load(const float* p, f32x16& v) { v = load(p); }
INLINE void load(const bf16* p, f32x16& v) { v = load(p); }

INLINE void load(const float* p, f32x4& v) { memcpy(&v, p, sizeof v); }

INLINE void load(const bf16* p, f32x4& v) {
  u16x4 half;
  memcpy(&half, p, sizeof half);
  v = (f32x4)(__builtin_convertvector(half, u32x4) << 16);
}

INLINE void load(const float* p, Pair& v) {
  memcpy(&v.low, p, sizeof v.low);
  memcpy(&v.high, p + 8, sizeof v.high);
}

INLINE void load(const bf16* p, Pair& v) {
  u16x8 low, high;
  memcpy(&low, p, sizeof low);
  memcpy(&high, p + 8, sizeof high);
  v.low = (f32x8)(__builtin_convertvector(low, u32x8) << 16);
  v.high = (f32x8)(__builtin_convertvector(high, u32x8) << 16);
}

INLINE void store(float* p, Pair v) {
  memcpy(p, &v.low, sizeof v.low);
  memcpy(p + 8, &v.high, sizeof v.high);
}

INLINE void widen(i8x16 bytes, Pair& v) {
  i8x8 half[2];
  memcpy(half, &bytes, sizeof half);
  v.low = __builtin_convertvector(__builtin_convertvector(half[0], i32x8), f32x8);
  v.high = __builtin_convertvector(__builtin_convertvector(half[1], i32x8), f32x8);
}

// Lanes that are half the width apart are added, then those of what is left.
INLINE float sum(Pair v) {
  v.low += v.high;
  f32x4 v4[2];
  memcpy(v4, &v.low, sizeof v4);
  v4[0] += v4[1];
  return (v4[0][0] + v4[0][2]) + (v4[0][1] + v4[0][3]);
}

INLINE float sum(f32x16 v) {
  Pair halves;
  memcpy(&halves, &v, sizeof v);
  return sum(halves);
}

// sum_i a[i] b[i], for M rows of `a` against one of `b`, which is read once.
template <int M, typename B>
INLINE void dots(const float* a, int64_t a_stride, const B* b, int64_t n, float* out) {
  f32x16 even[M] = {}, odd[M] = {};
  int64_t i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES) {
    f32x16 b0 = load(b + i), b1 = load(b + i + LANES);
    for (int m = 0; m < M; m++) {
      even[m] += load(a + m * a_stride + i) * b0;
      odd[m] += load(a + m * a_stride + i + LANES) * b1;
    }
  }
  for (int m = 0; m < M; m++) {
    float total = sum(even[m] + odd[m]);
    for (int64_t j = i; j < n; j++) total += a[m * a_stride + j] * get(b + j);
    out[m] = total;
  }
}

template <typename B>
INLINE float dot(const float* a, const B* b, int64_t n) {
  float total;
  dots<1>(a, 0, b, n, &total);
  return total;
}

template <typename T>
INLINE void widen(const T* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(out + i, load(x + i));
  for (; i < n; i++) out[i] = get(x + i);
}

// e^x for x <= 0, to 2e-7 of its value; below -87 it is 0.
INLINE f32x16 exp_of_negative(f32x16 x) {
  f32x16 is_small = (f32x16)(x < splat(-87.0f));
  x = x < splat(-87.0f) ? splat(-87.0f) : x;
  // x = k ln 2 + r; adding 1.5 * 2^23 rounds k to a whole number in the low bits.
  f32x16 k = x * 1.44269504f + 12582912.0f;
  i32x16 exponent = (i32x16)k << 23;
  k -= 12582912.0f;
  f32x16 r = x - k * 0.693359375f;
  r -= k * -2.12194440e-4f;
  f32x16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  f32x16 y = (f32x16)((i32x16)p + exponent);
  return (f32x16)((i32x16)y & ~(i32x16)is_small);
}

// An E8M0 byte: 0xFF is NaN, 0 is 2^-127, a subnormal float.
INLINE float power_of_two(uint8_t e8m0) {
  uint32_t bits = e8m0 == 0 ? 0x00400000u : e8m0 == 255 ? 0x7FC00000u : uint32_t(e8m0) << 23;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

template <typename F, typename U, typename I>
INLINE F e4m3(U bits) {
  U sign = (bits & 0x80) << 24, magnitude = bits & 0x7F;
  F normal = (F)((magnitude << 20) + (120u << 23));
  F subnormal = __builtin_convertvector((I)magnitude, F) * 0x1p-9f;
  F y = (F)(magnitude < 8 ? (U)subnormal : (U)normal);
  y = (F)(magnitude == 0x7F ? U{} + 0x7FC00000u : (U)y);
  return (F)((U)y | sign);
}

INLINE f32x16 from_e4m3(u8x16 bytes) { return e4m3<f32x16, u32x16, i32x16>(widen(bytes)); }

INLINE void from_e4m3(u8x16 bytes, Pair& v) {
  u8x8 half[2];
  memcpy(half, &bytes, sizeof half);
  v.low = e4m3<f32x8, u32x8, i32x8>(__builtin_convertvector(half[0], u32x8));
  v.high = e4m3<f32x8, u32x8, i32x8>(__builtin_convertvector(half[1], u32x8));
}

// Call f(begin, end) for parts of [0, n), on several threads if `n * cost` operations are worth it.
template <typename F>
inline void parallel(int64_t n, int64_t cost, F f) {
  constexpr int64_t WORTH = 32768;
  if (n < 2 || n * cost < WORTH || omp_get_max_threads() < 2 || omp_in_parallel()) {
    f(int64_t(0), n);
    return;
  }
#pragma omp parallel
  {
    int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    int64_t begin = n * thread / threads, end = n * (thread + 1) / threads;
    if (begin < end) f(begin, end);
  }
}
