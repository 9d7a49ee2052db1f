// Weights as a checkpoint stores them. Quantised ones are widened thirty-two channels at a time, the
// sixteen even ones before the odd ones; activations lie in that order too.
#pragma once

#include "simd.h"

constexpr int64_t CHANNELS = 2 * LANES;

// The upper half of the float that each e4m3 without its sign stands for.
struct E4M3Halves {
  uint16_t bits[128];

  constexpr E4M3Halves() : bits{} {
    for (int code = 0; code < 128; code++) {
      int exponent = code >> 3, fraction = code & 7;
      if (exponent == 0 && fraction) {  // subnormal: shifted until its first bit is the hidden one
        for (exponent = 1; fraction < 8; exponent--) fraction *= 2;
        fraction -= 8;
      }
      int half = (exponent + 120) << 7 | fraction << 4;
      bits[code] = uint16_t(code == 0 ? 0 : code == 127 ? 0x7FC0 : half);
    }
  }
};
constexpr E4M3Halves HALVES;

INLINE void from_e4m3(const uint8_t* p, f32x16& even, f32x16& odd) {
  i8x32 bytes;
  i16x32 codes, table[4];
  memcpy(&bytes, p, sizeof bytes);
  WIDEN("sxbw", bytes, codes);
  for (int i = 0; i < 4; i++) memcpy(&table[i], HALVES.bits + 32 * i, sizeof table[i]);
  i16x32 below = __builtin_shuffle(table[0], table[1], codes);  // by the six lowest bits
  i16x32 above = __builtin_shuffle(table[2], table[3], codes);
  i16x32 halves = ((codes & 64) != 0 ? above : below) | (codes & int16_t(0x8000));
  even = (f32x16)((u32x16)halves << 16);
  odd = (f32x16)((u32x16)halves & 0xFFFF0000u);
}

INLINE void from_e4m3(const uint8_t* p, Pair& even, Pair& odd) {
  u8x16 first, second;
  memcpy(&first, p, sizeof first);
  memcpy(&second, p + LANES, sizeof second);
  const u8x16 evens = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  from_e4m3(__builtin_shuffle(first, second, evens), even);
  from_e4m3(__builtin_shuffle(first, second, evens + 1), odd);
}

// Twice the values of sixteen bytes, so that all are whole numbers.
INLINE void doubled_e2m1(const uint8_t* p, f32x16& even, f32x16& odd) {
  const f32x16 values = {0, 1, 2, 3, 4, 6, 8, 12, -0.0f, -1, -2, -3, -4, -6, -8, -12};
  u8x16 bytes;
  memcpy(&bytes, p, sizeof bytes);
  i32x16 codes;
  WIDEN("zxbd", bytes, codes);
  even = __builtin_shuffle(values, codes);  // by the four lowest bits
  odd = __builtin_shuffle(values, codes >> 4);
}

INLINE void doubled_e2m1(const uint8_t* p, Pair& even, Pair& odd) {
  const i8x16 values = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  u8x16 bytes;
  memcpy(&bytes, p, sizeof bytes);
  widen(__builtin_shuffle(values, (i8x16)(bytes & 15)), even);
  widen(__builtin_shuffle(values, (i8x16)(bytes >> 4)), odd);
}

INLINE void powers_of_two(const uint8_t* e8m0, int64_t n, float factor, float* out) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    u8x16 bytes;
    memcpy(&bytes, e8m0 + i, sizeof bytes);
    u32x16 e = widen(bytes), bits = e << 23;
    bits = e == 0 ? u32x16{} + 0x00400000u : e == 255 ? u32x16{} + 0x7FC00000u : bits;
    store(out + i, (f32x16)bits * factor);
  }
  for (; i < n; i++) out[i] = power_of_two(e8m0[i]) * factor;
}

// Weights that need no widening, [n_experts, n, k].
template <typename T>
struct Plain {
  static constexpr bool IS_QUANTISED = false;
  const T* weight;
  int64_t n, k;

  const T* row(int64_t expert, int64_t r) const { return weight + (expert * n + r) * k; }
};

// e4m3 with a scale for `rows` x `group` values.
struct FP8 {
  static constexpr bool IS_QUANTISED = true;
  const uint8_t* weight;
  const void* scale;
  int64_t n, k, rows, group, n_scale_rows, scale_is_fp32;

  int64_t channels() const { return group; }

  const uint8_t* row(int64_t expert, int64_t r) const { return weight + (expert * n + r) * k; }

  template <typename V>
  INLINE void values(const uint8_t* row, int64_t channel, V& even, V& odd) {
    from_e4m3(row + channel, even, odd);
  }

  INLINE void scales(const FP8& w, int64_t expert, int64_t r, float* out) {
    int64_t n_groups = w.k / w.group, at = (expert * w.n_scale_rows + r / w.rows) * n_groups;
    if (w.scale_is_fp32)
      std::copy_n((const float*)w.scale + at, n_groups, out);
    else
      powers_of_two((const uint8_t*)w.scale + at, n_groups, 1.0f, out);
  }
};

// Two e2m1 a byte, the even channel low, an E8M0 scale for 32 channels.
struct FP4 {
  static constexpr bool IS_QUANTISED = true;
  const uint8_t* weight;
  const uint8_t* scale;
  int64_t n, k;

  static constexpr int64_t channels() { return CHANNELS; }

  const uint8_t* row(int64_t expert, int64_t r) const { return weight + (expert * n + r) * k / 2; }

  template <typename V>
  INLINE void values(const uint8_t* row, int64_t channel, V& even, V& odd) {
    doubled_e2m1(row + channel / 2, even, odd);
  }

  INLINE void scales(const FP4& w, int64_t expert, int64_t r, float* out) {
    powers_of_two(w.scale + (expert * w.n + r) * w.k / CHANNELS, w.k / CHANNELS, 0.5f, out);
  }
};

// Weight rows from r on, widened one behind the other; `scales` has room for those of a row.
template <typename V, typename W>
INLINE const float* widened(const W& w, int64_t expert, int64_t r, int64_t count, float* scales,
                            float* out) {
  for (int64_t j = 0; j < count; j++) {
    const uint8_t* row = w.row(expert, r + j);
    float* to = out + j * w.k;
    W::scales(w, expert, r + j, scales);
    for (int64_t i = 0; i < w.k; i += CHANNELS) {
      V even, odd;
      W::values(row, i, even, odd);
      store(to + i, even * scales[i / w.channels()]);
      store(to + i + LANES, odd * scales[i / w.channels()]);
    }
  }
  return out;
}

// One weight row with M rows of activations, widened in registers.
template <int M, typename W>
INLINE void products(const W& w, int64_t expert, int64_t r, const float* x, float* scales,
                     float* y) {
  const uint8_t* row = w.row(expert, r);
  f32x16 total[M] = {};
  W::scales(w, expert, r, scales);
  for (int64_t first = 0; first < w.k; first += w.channels(), scales++) {
    f32x16 even, odd, part[M];
    W::values(row, first, even, odd);
    for (int m = 0; m < M; m++)
      part[m] = load(x + m * w.k + first) * even + load(x + m * w.k + first + LANES) * odd;
    for (int64_t i = first + CHANNELS; i < first + w.channels(); i += CHANNELS) {
      W::values(row, i, even, odd);
      for (int m = 0; m < M; m++) {
        part[m] += load(x + m * w.k + i) * even;
        part[m] += load(x + m * w.k + i + LANES) * odd;
      }
    }
    for (int m = 0; m < M; m++) total[m] += part[m] * *scales;
  }
  for (int m = 0; m < M; m++) y[m] = sum(total[m]);
}
