// Weights from one format to another, a run of rows at a time: each byte is what codecs.py and
// lossless.py make, which a test compares. No threads: callers have one for each file.
#include "simd.h"

namespace {

constexpr int64_t GROUP = 32, BLOCK = 128;
constexpr int64_t PER_BLOCK = BLOCK / GROUP;
constexpr int64_t PACKED = GROUP / 2;  // bytes of a group of e2m1, two codes each, the low one first
constexpr int FP4_HEADROOM = 6, E2M1_TO_E4M3 = 6;

typedef float f32x8 __attribute__((vector_size(32)));
typedef double f64x8 __attribute__((vector_size(64)));

// The 32 codes of a group, in order.
INLINE void codes_of(const uint8_t* packed, u8x16 codes[2]) {
  const u8x16 first = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  u8x16 bytes;
  memcpy(&bytes, packed, sizeof bytes);
  u8x16 low = bytes & 15, high = bytes >> 4;
  codes[0] = __builtin_shuffle(low, high, first);
  codes[1] = __builtin_shuffle(low, high, first + 8);
}

// Codes as e4m3, for each exponent that code 1, a half, may have in it: from 1 on.
struct E4m3OfE2m1 {
  u8x16 of[16];

  E4m3OfE2m1() {
    for (int e = 0; e < 16; e++)
      for (int code = 0; code < 16; code++) {
        int m = code & 7, value = m == 0 ? 0 : (e << 3) + (m == 1 ? 0 : m << 2);
        of[e][code] = uint8_t(value | (code & 8) << 4);
      }
  }
};
const E4m3OfE2m1 E4M3;

INLINE void widen_group(const uint8_t* packed, u8x16 table, uint8_t* out) {
  u8x16 codes[2];
  codes_of(packed, codes);
  for (int half = 0; half < 2; half++) {
    u8x16 values = __builtin_shuffle(table, codes[half]);
    memcpy(out + 16 * half, &values, sizeof values);
  }
}

// The largest and the smallest scale of each column of groups, of up to BLOCK rows.
INLINE void extremes(const uint8_t* scale, int64_t rows, int64_t groups, uint8_t* most,
                     uint8_t* least) {
  memcpy(most, scale, groups);
  memcpy(least, scale, groups);
  for (int64_t r = 1; r < rows; r++)
    for (int64_t g = 0; g < groups; g++) {
      uint8_t s = scale[r * groups + g];
      most[g] = std::max(most[g], s);
      least[g] = std::min(least[g], s);
    }
}

CLONES int64_t blocks_of_fp8(const uint8_t* packed, const uint8_t* scale, uint8_t* out,
                             uint8_t* block_scale, int64_t rows, int64_t groups) {
  int64_t blocks = (groups + PER_BLOCK - 1) / PER_BLOCK;
  std::vector<uint8_t> most(groups), least(groups), shift(groups);
  for (int64_t first = 0; first < rows; first += BLOCK) {
    int64_t n = std::min(BLOCK, rows - first);
    extremes(scale + first * groups, n, groups, most.data(), least.data());
    for (int64_t b = 0; b < blocks; b++) {
      int64_t begin = b * PER_BLOCK, end = std::min(groups, begin + PER_BLOCK);
      int top = *std::max_element(&most[begin], &most[begin] + (end - begin));
      int low = *std::min_element(&least[begin], &least[begin] + (end - begin));
      int of_block = top - FP4_HEADROOM;
      // Below e4m3's lowest normal exponent, or where the block's scale would be, it must round.
      if (of_block < 0 || low - of_block + E2M1_TO_E4M3 < 1) return 0;
      block_scale[first / BLOCK * blocks + b] = uint8_t(of_block);
      for (int64_t g = begin; g < end; g++) shift[g] = uint8_t(of_block - E2M1_TO_E4M3);
    }
    for (int64_t r = first; r < first + n; r++)
      for (int64_t g = 0; g < groups; g++) {
        int64_t at = r * groups + g;
        widen_group(packed + at * PACKED, E4M3.of[uint8_t(scale[at] - shift[g]) & 15],
                    out + at * GROUP);
      }
  }
  return 1;
}

CLONES void groups_of_fp8(const uint8_t* packed, uint8_t* out, int64_t groups) {
  for (int64_t g = 0; g < groups; g++)
    widen_group(packed + g * PACKED, E4M3.of[E2M1_TO_E4M3], out + g * GROUP);
}

// How a weight is stored; compiled.py has the same numbers.
enum Kind : int64_t { FP4 = 0, FP8_E8M0 = 1, FP8_F32 = 2, MXFP8 = 3, IN_BF16 = 4, IN_F32 = 5 };

struct Weight {
  int64_t kind;
  const uint8_t* data;
  const void* scale;
  int64_t n_in;
};

INLINE void unpack_fp4(const uint8_t* packed, const uint8_t* scale, int64_t groups, float* out) {
  // The upper two bytes of each code's value in fp32; zero keeps its sign.
  const u8x16 first = {0, 0x3F, 0x3F, 0x3F, 0x40, 0x40, 0x40, 0x40,
                       0x80, 0xBF, 0xBF, 0xBF, 0xC0, 0xC0, 0xC0, 0xC0};
  const u8x16 second = {0, 0, 0x80, 0xC0, 0, 0x40, 0x80, 0xC0,
                        0, 0, 0x80, 0xC0, 0, 0x40, 0x80, 0xC0};
  for (int64_t g = 0; g < groups; g++) {
    u8x16 codes[2];
    codes_of(packed + g * PACKED, codes);
    f32x16 one = splat(power_of_two(scale[g]));
    for (int half = 0; half < 2; half++) {
      u32x16 bits = widen(__builtin_shuffle(first, codes[half])) << 24 |
                    widen(__builtin_shuffle(second, codes[half])) << 16;
      store(out + g * GROUP + 16 * half, (f32x16)bits * one);
    }
  }
}

INLINE void unpack_fp8(const uint8_t* row, const uint8_t* e8m0, const float* scale, int64_t width,
                       int64_t n, float* out) {
  for (int64_t at = 0, g = 0; at < n; at += width, g++) {
    f32x16 one = splat(e8m0 ? power_of_two(e8m0[g]) : scale[g]);
    for (int64_t i = at; i < std::min(n, at + width); i += LANES) {
      u8x16 bytes;
      memcpy(&bytes, row + i, sizeof bytes);
      store(out + i, from_e4m3(bytes) * one);
    }
  }
}

// The values of row r in fp32.
INLINE void unpack(const Weight& w, int64_t r, float* out) {
  int64_t n = w.n_in, of_block = r / BLOCK * ((n + BLOCK - 1) / BLOCK);
  const uint8_t* e8m0 = (const uint8_t*)w.scale;
  switch (w.kind) {
    case FP4:
      return unpack_fp4(w.data + r * n / 2, e8m0 + r * n / GROUP, n / GROUP, out);
    case FP8_E8M0:
      return unpack_fp8(w.data + r * n, e8m0 + of_block, nullptr, BLOCK, n, out);
    case FP8_F32:
      return unpack_fp8(w.data + r * n, nullptr, (const float*)w.scale + of_block, BLOCK, n, out);
    case MXFP8:
      return unpack_fp8(w.data + r * n, e8m0 + r * n / GROUP, nullptr, GROUP, n, out);
    case IN_BF16:
      return widen((const bf16*)w.data + r * n, n, out);
    default:
      memcpy(out, (const float*)w.data + r * n, n * sizeof(float));
  }
}

// Keep the upper half of each value; 0 where that would lose something, or it is no number.
CLONES int64_t upper_halves(Weight w, uint16_t* out, int64_t rows) {
  std::vector<float> row(w.n_in);
  for (int64_t r = 0; r < rows; r++) {
    unpack(w, r, row.data());
    u32x16 lost = {};
    for (int64_t i = 0; i < w.n_in; i += LANES) {
      u32x16 bits = (u32x16)load(&row[i]);
      lost |= bits & 0xFFFF;
      lost |= (u32x16)((bits & 0x7F800000) == 0x7F800000);
      u16x16 half = __builtin_convertvector(bits >> 16, u16x16);
      memcpy(out + r * w.n_in + i, &half, sizeof half);
    }
    uint32_t any = 0;
    for (int64_t j = 0; j < LANES; j++) any |= lost[j];
    if (any) return 0;
  }
  return 1;
}

INLINE float top_of(const float* x, int64_t n) {
  f32x16 tops = {};
  for (int64_t i = 0; i < n; i += LANES) {
    f32x16 v = (f32x16)((u32x16)load(x + i) & 0x7FFFFFFF);
    tops = v > tops ? v : tops;
  }
  float top = 0.0f;
  for (int64_t j = 0; j < LANES; j++) top = std::max(top, tops[j]);
  return top;
}

// Round to whole steps of `one`, ties to even, and say what those are worth.
INLINE void to_steps(const float* x, float one, float most, int64_t n, int8_t* steps, float* worth) {
  // Adding 1.5 * 2^23 leaves a whole number in the low bits of the mantissa.
  const float whole = 12582912.0f;
  for (int64_t i = 0; i < n; i += LANES) {
    f32x16 v = load(x + i) / one;
    v = v > splat(most) ? splat(most) : v;
    v = v < splat(-most) ? splat(-most) : v;
    v = (v + whole) - whole;
    i16x16 narrow = __builtin_convertvector(__builtin_convertvector(v, i32x16), i16x16);
    i8x16 bytes = __builtin_convertvector(narrow, i8x16);
    memcpy(steps + i, &bytes, sizeof bytes);
    store(worth + i, v * one);
  }
}

// What rounding did to one row. Squares are exact in fp64, and summed in it.
struct Errors {
  int64_t* n_changed;
  float* largest;
  double *of_errors, *of_values;
};

INLINE double total(f64x8 v) {
  double sum = 0;
  for (int j = 0; j < 8; j++) sum += v[j];
  return sum;
}

INLINE void compare(const float* x, const float* y, int64_t begin, int64_t end, int64_t r,
                    const Errors& into) {
  // Were `y` still in registers, its product and the difference could become one operation.
  asm volatile("" : : "r"(y) : "memory");
  i32x16 same = {};
  f32x16 tops = {};
  f64x8 errors = {}, values = {};
  for (int64_t i = begin; i < end; i += LANES) {
    f32x16 e = load(y + i) - load(x + i);
    same -= (i32x16)(e == splat(0.0f));
    f32x16 size = (f32x16)((u32x16)e & 0x7FFFFFFF);
    tops = size > tops ? size : tops;
    for (int half = 0; half < 2; half++) {
      f32x8 a, b;
      memcpy(&a, (const char*)&e + 32 * half, sizeof a);
      memcpy(&b, x + i + 8 * half, sizeof b);
      f64x8 c = __builtin_convertvector(a, f64x8), d = __builtin_convertvector(b, f64x8);
      errors += c * c;
      values += d * d;
    }
  }
  int64_t n_same = 0;
  float top = 0.0f;
  for (int64_t j = 0; j < LANES; j++) {
    n_same += same[j];
    top = std::max(top, tops[j]);
  }
  into.n_changed[r] = end - begin - n_same;
  into.largest[r] = top;
  into.of_errors[r] = total(errors);
  into.of_values[r] = total(values);
}

// INT8 a row; or INT4, two rows a byte, the even one low, and each row's sums of `n_sums` parts.
CLONES void whole_steps(Weight w, int64_t bits, int8_t* values, float* scale, float* sums,
                        int64_t n_sums, Errors into, int64_t rows, int64_t begin, int64_t end) {
  int64_t n = w.n_in, part = n / std::max(n_sums, int64_t(1));
  float most = bits == 8 ? 127.0f : 7.0f;
  std::vector<float> x(n), y(n);
  std::vector<int8_t> even(n), odd(n);
  for (int64_t r = 0; r < rows; r++) {
    unpack(w, r, x.data());
    float top = top_of(x.data(), n);
    scale[r] = top > 0 ? top / most : 1.0f;
    int8_t* steps = bits == 8 ? values + r * n : (r % 2 ? odd : even).data();
    to_steps(x.data(), scale[r], most, n, steps, y.data());
    compare(x.data(), y.data(), begin, end, r, into);
    if (bits == 8) continue;
    for (int64_t s = 0; s < n_sums; s++) {
      int32_t sum = 0;
      for (int64_t i = s * part; i < (s + 1) * part; i++) sum += steps[i];
      sums[r * n_sums + s] = float(sum);
    }
    if (r % 2)
      for (int64_t i = 0; i < n; i++)
        values[r / 2 * n + i] = int8_t((even[i] & 15) | uint8_t(odd[i]) << 4);
  }
}

}  // namespace

extern "C" {

int64_t fp4_to_fp8(const uint8_t* packed, const uint8_t* scale, uint8_t* out, uint8_t* block_scale,
                   int64_t rows, int64_t groups) {
  return blocks_of_fp8(packed, scale, out, block_scale, rows, groups);
}

int64_t fp4_to_mxfp8(const uint8_t* packed, uint8_t* out, int64_t groups) {
  groups_of_fp8(packed, out, groups);
  return 1;
}

int64_t to_bf16(int64_t kind, const uint8_t* data, const void* scale, int64_t n_in, uint16_t* out,
                int64_t rows) {
  return upper_halves({kind, data, scale, n_in}, out, rows);
}

int64_t to_integers(int64_t kind, const uint8_t* data, const void* scale, int64_t n_in,
                    int64_t bits, int8_t* values, float* steps, float* sums, int64_t n_sums,
                    int64_t* n_changed, float* largest, double* of_errors, double* of_values,
                    int64_t rows, int64_t begin, int64_t end) {
  whole_steps({kind, data, scale, n_in}, bits, values, steps, sums, n_sums,
              {n_changed, largest, of_errors, of_values}, rows, begin, end);
  return 1;
}
}
