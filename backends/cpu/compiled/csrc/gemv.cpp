// Products of few rows with a weight that is read once, in the format it is stored in.
#include "simd.h"

namespace {

constexpr int MAX_ROWS = 4;  // of one group whose sums are in registers at once

// e4m3 with a scale for `rows` x `group` values.
struct FP8 {
  const uint8_t* weight;
  const void* scale;
  int64_t n, k, rows, group, n_scale_rows, scale_is_fp32;

  template <int M>
  INLINE void products(const FP8& w, int64_t expert, int64_t r, const float* x, float* y) {
    const uint8_t* row = w.weight + (expert * w.n + r) * w.k;
    int64_t n_groups = w.k / w.group;
    int64_t at = (expert * w.n_scale_rows + r / w.rows) * n_groups;
    f32x16 total[M] = {};
    for (int64_t g = 0; g < n_groups; g++) {
      f32x16 part[M] = {};
      for (int64_t i = g * w.group; i < (g + 1) * w.group; i += LANES) {
        f32x16 value = from_e4m3(row + i);
        for (int m = 0; m < M; m++) part[m] += load(x + m * w.k + i) * value;
      }
      float s = w.scale_is_fp32 ? ((const float*)w.scale)[at + g]
                                : power_of_two(((const uint8_t*)w.scale)[at + g]);
      for (int m = 0; m < M; m++) total[m] += part[m] * s;
    }
    for (int m = 0; m < M; m++) y[m] = sum(total[m]);
  }
};

// Two e2m1 a byte, the even channel low, an E8M0 scale for 32 channels. Activations come with the
// even channels of all before the odd ones.
struct FP4 {
  const uint8_t* weight;
  const uint8_t* scale;
  int64_t n, k;

  template <int M>
  INLINE void products(const FP4& w, int64_t expert, int64_t r, const float* x, float* y) {
    // Twice the value of each code, so that all are whole numbers.
    const i8x16 doubled = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    const uint8_t* row = w.weight + (expert * w.n + r) * w.k / 2;
    const uint8_t* scale = w.scale + (expert * w.n + r) * w.k / 32;
    f32x16 total[M] = {};
    for (int64_t g = 0; g < w.k / 32; g++) {
      u8x16 bytes;
      memcpy(&bytes, row + 16 * g, sizeof bytes);
      i8x16 low = __builtin_shuffle(doubled, (i8x16)(bytes & 15));
      i8x16 high = __builtin_shuffle(doubled, (i8x16)(bytes >> 4));
      f32x16 even = widen(low), odd = widen(high);
      float s = power_of_two(scale[g]) * 0.5f;
      for (int m = 0; m < M; m++) {
        const float* own = x + m * w.k + LANES * g;
        total[m] += (load(own) * even + load(own + w.k / 2) * odd) * s;
      }
    }
    for (int m = 0; m < M; m++) y[m] = sum(total[m]);
  }
};

struct Group {
  int64_t expert, first, rows;
};

std::vector<Group> split(const int64_t* group_sizes, int64_t n_experts, int64_t most) {
  std::vector<Group> groups;
  int64_t first = 0;
  for (int64_t e = 0; e < n_experts; e++) {
    for (int64_t left = group_sizes[e]; left > 0; left -= most) {
      int64_t rows = std::min(left, most);
      groups.push_back({e, first, rows});
      first += rows;
    }
  }
  return groups;
}

template <int M, typename W>
INLINE void multiply(const W& w, const float* x, float* out, const Group& g, int64_t r) {
  float y[M];
  W::template products<M>(w, g.expert, r, x + g.first * w.k, y);
  for (int m = 0; m < M; m++) out[(g.first + m) * w.n + r] = y[m];
}

// Output channels of all groups, numbered through: [begin, end).
template <typename W>
CLONES void channels(W w, const float* x, float* out, const Group* groups, int64_t begin,
                     int64_t end) {
  for (int64_t i = begin; i < end; i++) {
    const Group& g = groups[i / w.n];
    int64_t r = i % w.n;
    switch (g.rows) {
      case 1: multiply<1>(w, x, out, g, r); break;
      case 2: multiply<2>(w, x, out, g, r); break;
      case 3: multiply<3>(w, x, out, g, r); break;
      default: multiply<4>(w, x, out, g, r);
    }
  }
}

template <typename W>
void grouped(W w, const float* x, const int64_t* group_sizes, int64_t n_experts, float* out) {
  std::vector<Group> groups = split(group_sizes, n_experts, MAX_ROWS);
  const Group* all = groups.data();
  parallel(int64_t(groups.size()) * w.n, w.k,
           [=](int64_t begin, int64_t end) { channels(w, x, out, all, begin, end); });
}

// Weights that need no decoding: a panel of weight rows stays near while rows of activations pass
// it in blocks, and each load of either serves several products.
constexpr int PANEL = 3;         // weight rows; with MAX_ROWS their sums fill 24 registers of 32
constexpr int64_t LINEAR = 8;    // rows up to which memory is slower than loads: one weight row
constexpr int64_t AHEAD = 512;   // weights asked for ahead of that one, as memory holds them
constexpr int64_t PASSING = 64;  // rows of activations that stay near too

template <int M, int N, typename T>
INLINE void tile(const float* x, const T* w, int64_t k, float* out, int64_t n, int64_t ahead) {
  f32x16 sums[2][M][N] = {};  // of even and of odd lines of lanes, as `dots` has them
  int64_t i = 0;
  for (; i + 2 * LANES <= k; i += 2 * LANES) {
    for (int half = 0; half < 2; half++) {
      int64_t at = i + half * LANES;
      f32x16 ws[N];
      for (int j = 0; j < N; j++) {
        ws[j] = load(w + j * k + at);
        if (ahead) __builtin_prefetch(w + j * k + at + ahead);
      }
      for (int m = 0; m < M; m++) {
        f32x16 xs = load(x + m * k + at);
        if constexpr (N > 1) KEEP(xs);
        for (int j = 0; j < N; j++) sums[half][m][j] += xs * ws[j];
      }
    }
  }
  for (int m = 0; m < M; m++) {
    for (int j = 0; j < N; j++) {
      float total = sum(sums[0][m][j] + sums[1][m][j]);
      for (int64_t l = i; l < k; l++) total += x[m * k + l] * get(w + j * k + l);
      out[m * n + j] = total;
    }
  }
}

template <int N, typename T>
INLINE void panel(const float* x, const T* w, int64_t k, int64_t rows, float* out, int64_t n) {
  int64_t m = 0, ahead = N == 1 ? AHEAD : N * k;
  for (; m + MAX_ROWS <= rows; m += MAX_ROWS, ahead = 0)
    tile<MAX_ROWS, N>(x + m * k, w, k, out + m * n, n, ahead);
  switch (rows - m) {
    case 3: tile<3, N>(x + m * k, w, k, out + m * n, n, ahead); break;
    case 2: tile<2, N>(x + m * k, w, k, out + m * n, n, ahead); break;
    case 1: tile<1, N>(x + m * k, w, k, out + m * n, n, ahead); break;
  }
}

// Panels of all groups, numbered through: [begin, end).
template <int N, typename T>
INLINE void panels(const float* x, const T* w, int64_t n, int64_t k, float* out,
                   const Group* groups, int64_t begin, int64_t end) {
  int64_t each = (n + N - 1) / N;
  for (int64_t i = begin; i < end; i++) {
    const Group& g = groups[i / each];
    int64_t r = i % each * N;
    const T* weight = w + (g.expert * n + r) * k;
    const float* rows = x + g.first * k;
    float* to = out + g.first * n + r;
    if (g.rows > LINEAR && r + N <= n) {
      panel<N>(rows, weight, k, g.rows, to, n);
    } else {
      int64_t last = std::min(r + N, n);
      for (; r < last; r++, weight += k, to++) panel<1>(rows, weight, k, g.rows, to, n);
    }
  }
}

template <typename T>
AVX512 void wide_panels(const float* x, const T* w, int64_t n, int64_t k, float* out,
                        const Group* groups, int64_t begin, int64_t end) {
  panels<PANEL>(x, w, n, k, out, groups, begin, end);
}

template <typename T>
CLONES void rows(const float* x, const T* w, int64_t n, int64_t k, float* out, const Group* groups,
                 int64_t begin, int64_t end) {
  panels<1>(x, w, n, k, out, groups, begin, end);
}

template <typename T>
void plain(const float* x, const T* w, const int64_t* group_sizes, float* out, int64_t n_experts,
           int64_t n, int64_t k) {
  std::vector<Group> groups = split(group_sizes, n_experts, PASSING);
  bool is_wide = has_avx512();
  int64_t each = is_wide ? (n + PANEL - 1) / PANEL : n, cost = is_wide ? PANEL * k : k;
  const Group* all = groups.data();
  parallel(int64_t(groups.size()) * each, cost, [=](int64_t begin, int64_t end) {
    if (is_wide)
      wide_panels(x, w, n, k, out, all, begin, end);
    else
      rows(x, w, n, k, out, all, begin, end);
  });
}

}  // namespace

extern "C" {

void gemv_plain(const float* x, const void* weight, const int64_t* group_sizes, float* out,
                int64_t n_experts, int64_t n, int64_t k, int64_t weight_is_bf16) {
  if (weight_is_bf16)
    plain(x, (const bf16*)weight, group_sizes, out, n_experts, n, k);
  else
    plain(x, (const float*)weight, group_sizes, out, n_experts, n, k);
}

void gemv_fp8(const float* x, const uint8_t* weight, const void* scale, const int64_t* group_sizes,
              float* out, int64_t n_experts, int64_t n, int64_t k, int64_t rows, int64_t group,
              int64_t n_scale_rows, int64_t scale_is_fp32) {
  grouped(FP8{weight, scale, n, k, rows, group, n_scale_rows, scale_is_fp32}, x, group_sizes,
          n_experts, out);
}

void gemv_fp4(const float* x, const uint8_t* weight, const uint8_t* scale,
              const int64_t* group_sizes, float* out, int64_t n_experts, int64_t n, int64_t k) {
  grouped(FP4{weight, scale, n, k}, x, group_sizes, n_experts, out);
}

// e4m3 values with a scale for each group of channels, as floats; with `is_split` the even channels
// of a row before its odd ones.
void widen_fp8(const uint8_t* values, const uint8_t* scale, float* out, int64_t rows, int64_t k,
               int64_t group, int64_t is_split) {
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t i = 0; i < k; i += LANES) {
      float wide[LANES];
      store(wide, from_e4m3(values + r * k + i) * power_of_two(scale[(r * k + i) / group]));
      for (int64_t j = 0; j < LANES; j++) {
        int64_t at = is_split ? (j % 2) * k / 2 + (i + j) / 2 : i + j;
        out[r * k + at] = wide[j];
      }
    }
  }
}
}
