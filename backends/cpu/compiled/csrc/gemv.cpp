// Products of few rows with a weight that is read once, in the format it is stored in.
#include "simd.h"

namespace {

constexpr int MAX_ROWS = 4;      // of one group whose sums are in registers at once
constexpr int PANEL = 3;         // weight rows; with MAX_ROWS their sums fill 24 registers of 32
constexpr int NARROW = 2;        // rows, where registers are sixteen and hold half as much
constexpr int64_t LINEAR = 8;    // rows up to which memory is slower than loads: one weight row
constexpr int64_t AHEAD = 512;   // weights asked for ahead of that one, as memory holds them
constexpr int64_t PASSING = 64;  // rows of activations that stay near too

// Weights that need no widening.
template <typename T>
struct Plain {
  const T* weight;
  int64_t n, k;

  template <typename V>
  INLINE const T* widened(const Plain& w, int64_t expert, int64_t r, int64_t, float*) {
    return w.weight + (expert * w.n + r) * w.k;
  }

  static constexpr bool IS_QUANTISED = false;
};

// e4m3 with a scale for `rows` x `group` values.
struct FP8 {
  const uint8_t* weight;
  const void* scale;
  int64_t n, k, rows, group, n_scale_rows, scale_is_fp32;
  static constexpr bool IS_QUANTISED = true;

  // Weight rows from r on, widened one behind the other.
  template <typename V>
  INLINE const float* widened(const FP8& w, int64_t expert, int64_t r, int64_t count, float* out) {
    int64_t n_groups = w.k / w.group;
    for (int64_t j = 0; j < count; j++) {
      const uint8_t* row = w.weight + (expert * w.n + r + j) * w.k;
      int64_t at = (expert * w.n_scale_rows + (r + j) / w.rows) * n_groups;
      for (int64_t g = 0; g < n_groups; g++) {
        float s = scale_of(w, at + g);
        for (int64_t i = g * w.group; i < (g + 1) * w.group; i += LANES) {
          V value;
          from_e4m3(row + i, value);
          store(out + j * w.k + i, value * s);
        }
      }
    }
    return out;
  }

  INLINE float scale_of(const FP8& w, int64_t at) {
    return w.scale_is_fp32 ? ((const float*)w.scale)[at]
                           : power_of_two(((const uint8_t*)w.scale)[at]);
  }

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
      float s = scale_of(w, at + g);
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
  static constexpr bool IS_QUANTISED = true;

  // Weight rows from r on, widened one behind the other, their channels as the activations'.
  template <typename V>
  INLINE const float* widened(const FP4& w, int64_t expert, int64_t r, int64_t count, float* out) {
    for (int64_t j = 0; j < count; j++, out += w.k) {
      const uint8_t* row = w.weight + (expert * w.n + r + j) * w.k / 2;
      const uint8_t* scale = w.scale + (expert * w.n + r + j) * w.k / 32;
      for (int64_t g = 0; g < w.k / 32; g++) {
        V even, odd;
        doubled(row + 16 * g, even, odd);
        float s = power_of_two(scale[g]) * 0.5f;
        store(out + LANES * g, even * s);
        store(out + w.k / 2 + LANES * g, odd * s);
      }
    }
    return out - count * w.k;
  }

  // Twice the values of sixteen bytes, so that all are whole numbers.
  template <typename V>
  INLINE void doubled(const uint8_t* p, V& even, V& odd) {
    const i8x16 codes = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    u8x16 bytes;
    memcpy(&bytes, p, sizeof bytes);
    widen(__builtin_shuffle(codes, (i8x16)(bytes & 15)), even);
    widen(__builtin_shuffle(codes, (i8x16)(bytes >> 4)), odd);
  }

  template <int M>
  INLINE void products(const FP4& w, int64_t expert, int64_t r, const float* x, float* y) {
    const uint8_t* row = w.weight + (expert * w.n + r) * w.k / 2;
    const uint8_t* scale = w.scale + (expert * w.n + r) * w.k / 32;
    f32x16 total[M] = {};
    for (int64_t g = 0; g < w.k / 32; g++) {
      f32x16 even, odd;
      doubled(row + 16 * g, even, odd);
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

std::vector<Group> split(const int64_t* group_sizes, int64_t n_experts) {
  std::vector<Group> groups;
  int64_t first = 0;
  for (int64_t e = 0; e < n_experts; e++) {
    int64_t parts = (group_sizes[e] + PASSING - 1) / PASSING;  // as alike as they can be
    for (int64_t left = group_sizes[e]; parts > 0; parts--) {
      int64_t rows = (left + parts - 1) / parts;
      groups.push_back({e, first, rows});
      first += rows, left -= rows;
    }
  }
  return groups;
}

// One weight row of a quantised format, widened in registers.
template <int M, typename W>
INLINE void row(const W& w, const float* x, float* out, const Group& g, int64_t r) {
  if constexpr (M > 1) {
    if (g.rows < M) return row<M - 1>(w, x, out, g, r);
  }
  float y[M];
  W::template products<M>(w, g.expert, r, x, y);
  for (int m = 0; m < M; m++) out[m * w.n] = y[m];
}

// A panel of weight rows stays near while rows of activations pass it in blocks, and each load of
// either serves several products.
template <typename V, int M, int N, typename T>
INLINE void tile(const float* x, const T* w, int64_t k, float* out, int64_t n, int64_t ahead) {
  V sums[2][M][N] = {};  // of even and of odd lines of lanes, as `dots` has them
  int64_t i = 0;
  for (; i + 2 * LANES <= k; i += 2 * LANES) {
    for (int half = 0; half < 2; half++) {
      int64_t at = i + half * LANES;
      V ws[N];
      for (int j = 0; j < N; j++) {
        load(w + j * k + at, ws[j]);
        if (ahead) __builtin_prefetch(w + j * k + at + ahead);
      }
      for (int m = 0; m < M; m++) {
        V xs;
        load(x + m * k + at, xs);
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

// M rows at a time, and those that are left.
template <typename V, int M, int N, typename T>
INLINE void panel(const float* x, const T* w, int64_t k, int64_t rows, float* out, int64_t n,
                  int64_t ahead) {
  for (; rows >= M; rows -= M, x += M * k, out += M * n, ahead = 0)
    tile<V, M, N>(x, w, k, out, n, ahead);
  if constexpr (M > 1) {
    if (rows) panel<V, M - 1, N>(x, w, k, rows, out, n, ahead);
  }
}

// Panels of all groups, numbered through: [begin, end).
template <typename V, int M, int N, typename W>
INLINE void panels(const W& w, const float* x, float* out, const Group* groups, int64_t begin,
                   int64_t end) {
  std::vector<float> wide(W::IS_QUANTISED ? N * w.k : 0);
  int64_t each = (w.n + N - 1) / N, k = w.k;
  for (int64_t i = begin; i < end; i++) {
    const Group& g = groups[i / each];
    int64_t r = i % each * N, last = std::min(r + N, w.n);
    const float* rows = x + g.first * k;
    float* to = out + g.first * w.n;
    if constexpr (W::IS_QUANTISED && std::is_same_v<V, f32x16>) {
      if (g.rows <= M) {
        for (; r < last; r++) row<M>(w, rows, to + r, g, r);
        continue;
      }
    }
    if (g.rows > (W::IS_QUANTISED ? M : LINEAR) && last - r == N) {
      const auto* weight = W::template widened<V>(w, g.expert, r, N, wide.data());
      panel<V, M, N>(rows, weight, k, g.rows, to + r, w.n, W::IS_QUANTISED ? 0 : N * k);
    } else {
      for (; r < last; r++) {
        const auto* weight = W::template widened<V>(w, g.expert, r, 1, wide.data());
        panel<V, M, 1>(rows, weight, k, g.rows, to + r, w.n, W::IS_QUANTISED ? 0 : AHEAD);
      }
    }
  }
}

template <typename W>
AVX512 void wide_panels(W w, const float* x, float* out, const Group* groups, int64_t begin,
                        int64_t end) {
  panels<f32x16, MAX_ROWS, PANEL>(w, x, out, groups, begin, end);
}

template <typename W>
CLONES void narrow_panels(W w, const float* x, float* out, const Group* groups, int64_t begin,
                          int64_t end) {
  panels<Pair, NARROW, 1>(w, x, out, groups, begin, end);
}

template <typename W>
void grouped(W w, const float* x, const int64_t* group_sizes, int64_t n_experts, float* out) {
  std::vector<Group> groups = split(group_sizes, n_experts);
  bool is_wide = has_avx512();
  int64_t rows = is_wide ? PANEL : 1, each = (w.n + rows - 1) / rows;
  const Group* all = groups.data();
  parallel(int64_t(groups.size()) * each, rows * w.k, [=](int64_t begin, int64_t end) {
    if (is_wide)
      wide_panels(w, x, out, all, begin, end);
    else
      narrow_panels(w, x, out, all, begin, end);
  });
}

}  // namespace

extern "C" {

int64_t has_wide_vectors() { return has_avx512(); }

void gemv_plain(const float* x, const void* weight, const int64_t* group_sizes, float* out,
                int64_t n_experts, int64_t n, int64_t k, int64_t weight_is_bf16) {
  if (weight_is_bf16)
    grouped(Plain<bf16>{(const bf16*)weight, n, k}, x, group_sizes, n_experts, out);
  else
    grouped(Plain<float>{(const float*)weight, n, k}, x, group_sizes, n_experts, out);
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
