// Products of few rows with a weight that is read once, in the format it is stored in.
#include <memory>

#include "weights.h"

namespace {

constexpr int MAX_ROWS = 4;      // of one group whose sums are in registers at once
constexpr int PANEL = 3;         // weight rows; with MAX_ROWS their sums fill 24 registers of 32
constexpr int NARROW = 2;        // rows, where registers are sixteen and hold half as much
constexpr int64_t LINEAR = 8;    // rows up to which memory is slower than loads: one weight row
constexpr int64_t AHEAD = 512;   // weights asked for ahead of that one, as memory holds them
constexpr int64_t PASSING = 64;  // rows of activations that stay near too

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
INLINE void row(const W& w, const float* x, float* scales, float* out, const Group& g, int64_t r) {
  if constexpr (M > 1) {
    if (g.rows < M) return row<M - 1>(w, x, scales, out, g, r);
  }
  float y[M];
  products<M>(w, g.expert, r, x, scales, y);
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
  int64_t each = (w.n + N - 1) / N, k = w.k;
  std::vector<float> wide(W::IS_QUANTISED ? N * k : 0), scales(W::IS_QUANTISED ? k / CHANNELS : 0);
  for (int64_t i = begin; i < end; i++) {
    const Group& g = groups[i / each];
    int64_t r = i % each * N, last = std::min(r + N, w.n);
    const float* rows = x + g.first * k;
    float* to = out + g.first * w.n;
    if constexpr (W::IS_QUANTISED) {
      if (std::is_same_v<V, f32x16> && g.rows <= M) {
        for (; r < last; r++) row<M>(w, rows, scales.data(), to + r, g, r);
      } else if (last - r == N) {
        const float* weight = widened<V>(w, g.expert, r, N, scales.data(), wide.data());
        panel<V, M, N>(rows, weight, k, g.rows, to + r, w.n, 0);
      } else {
        for (; r < last; r++) {
          const float* weight = widened<V>(w, g.expert, r, 1, scales.data(), wide.data());
          panel<V, M, 1>(rows, weight, k, g.rows, to + r, w.n, 0);
        }
      }
    } else if (g.rows > LINEAR && last - r == N) {
      panel<V, M, N>(rows, w.row(g.expert, r), k, g.rows, to + r, w.n, N * k);
    } else {
      for (; r < last; r++)
        panel<V, M, 1>(rows, w.row(g.expert, r), k, g.rows, to + r, w.n, AHEAD);
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

AVX512 void wide_rows(FP8 x, int64_t begin, int64_t end, float* out) {
  std::vector<float> scales(x.k / CHANNELS);
  widened<f32x16>(x, 0, begin, end - begin, scales.data(), out + begin * x.k);
}

CLONES void narrow_rows(FP8 x, int64_t begin, int64_t end, float* out) {
  std::vector<float> scales(x.k / CHANNELS);
  widened<Pair>(x, 0, begin, end - begin, scales.data(), out + begin * x.k);
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

CLONES void widen_part(const bf16* x, int64_t begin, int64_t end, float* out) {
  widen(x + begin, end - begin, out + begin);
}

CLONES void round_part(const float* y, int64_t begin, int64_t end, bf16* out) {
  int64_t i = begin;
  for (; i + LANES <= end; i += LANES) store(out + i, load(y + i));
  for (; i < end; i++) put(out + i, y[i]);
}

// Memory whose contents are all written before they are read.
std::unique_ptr<float[]> room(int64_t n) { return std::unique_ptr<float[]>(new float[n]); }

// Activations in fp32, in `own` if they come in another format.
const float* widened_rows(const void* x, int64_t n, int64_t is_bf16,
                          std::unique_ptr<float[]>& own) {
  if (!is_bf16) return (const float*)x;
  own = room(n);
  float* to = own.get();
  parallel(n, 1, [=](int64_t begin, int64_t end) { widen_part((const bf16*)x, begin, end, to); });
  return to;
}

// Multiply into `out` [n_rows, n], which may be of bf16.
template <typename W>
void multiply(W w, const float* x, const int64_t* group_sizes, int64_t n_experts, int64_t n_rows,
              void* out, int64_t is_bf16) {
  if (!is_bf16) return grouped(w, x, group_sizes, n_experts, (float*)out);
  std::unique_ptr<float[]> wide = room(n_rows * w.n);
  float* y = wide.get();
  grouped(w, x, group_sizes, n_experts, y);
  parallel(n_rows * w.n, 1,
           [=](int64_t begin, int64_t end) { round_part(y, begin, end, (bf16*)out); });
}

// e4m3 activations with a scale for each group of channels, as floats in the weights' order.
std::unique_ptr<float[]> widened_fp8(const uint8_t* values, const uint8_t* scale, int64_t rows,
                                     int64_t k, int64_t group) {
  FP8 x{values, scale, rows, k, 1, group, rows, 0};
  std::unique_ptr<float[]> wide = room(rows * k);
  float* out = wide.get();
  bool is_wide = has_avx512();
  parallel(rows, k, [=](int64_t begin, int64_t end) {
    if (is_wide)
      wide_rows(x, begin, end, out);
    else
      narrow_rows(x, begin, end, out);
  });
  return wide;
}

}  // namespace

extern "C" {

int64_t has_wide_vectors() { return has_avx512(); }

void make_calls(const Packed* functions, const int64_t* const* arguments, int64_t n) {
  for (int64_t i = 0; i < n; i++) functions[i](arguments[i]);
}

// Rows of activations [n_rows, k], those of one expert behind those of another.
void gemv_plain(const void* x, const void* weight, const int64_t* group_sizes, void* out,
                int64_t n_rows, int64_t n_experts, int64_t n, int64_t k, int64_t x_is_bf16,
                int64_t weight_is_bf16, int64_t out_is_bf16) {
  std::unique_ptr<float[]> own;
  const float* wide = widened_rows(x, n_rows * k, x_is_bf16, own);
  if (weight_is_bf16)
    multiply(Plain<bf16>{(const bf16*)weight, n, k}, wide, group_sizes, n_experts, n_rows, out,
             out_is_bf16);
  else
    multiply(Plain<float>{(const float*)weight, n, k}, wide, group_sizes, n_experts, n_rows, out,
             out_is_bf16);
}

void gemv_fp8(const uint8_t* x, const uint8_t* x_scale, const uint8_t* weight, const void* scale,
              const int64_t* group_sizes, void* out, int64_t n_rows, int64_t n_experts, int64_t n,
              int64_t k, int64_t x_group, int64_t rows, int64_t group, int64_t n_scale_rows,
              int64_t scale_is_fp32, int64_t out_is_bf16) {
  std::unique_ptr<float[]> wide = widened_fp8(x, x_scale, n_rows, k, x_group);
  multiply(FP8{weight, scale, n, k, rows, group, n_scale_rows, scale_is_fp32}, wide.get(),
           group_sizes, n_experts, n_rows, out, out_is_bf16);
}

void gemv_fp4(const uint8_t* x, const uint8_t* x_scale, const uint8_t* weight,
              const uint8_t* scale, const int64_t* group_sizes, void* out, int64_t n_rows,
              int64_t n_experts, int64_t n, int64_t k, int64_t x_group, int64_t out_is_bf16) {
  std::unique_ptr<float[]> wide = widened_fp8(x, x_scale, n_rows, k, x_group);
  multiply(FP4{weight, scale, n, k}, wide.get(), group_sizes, n_experts, n_rows, out, out_is_bf16);
}
}

PACKED(gemv_plain)
PACKED(gemv_fp8)
PACKED(gemv_fp4)
