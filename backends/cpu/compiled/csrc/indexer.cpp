// The lightning indexer of few tokens: the scores of all rows they see, and the choice among them.
#include "pages.h"

namespace {

constexpr int MOST_HEADS = 16;  // whose sums are in registers at once
constexpr int NARROW_HEADS = 4;
constexpr int64_t AHEAD = 2 * LANES;  // keys asked for before they are scored: pages lie anywhere
constexpr int64_t LINE = 64;

INLINE f32x4 load4(const float* p) {
  f32x4 v;
  memcpy(&v, p, sizeof v);
  return v;
}

INLINE f32x4 load4(const bf16* p) {
  u16x4 v;
  memcpy(&v, p, sizeof v);
  return (f32x4)(__builtin_convertvector(v, u32x4) << 16);
}

// Sixteen rows side by side: channel c of all of them at out + c * LANES.
template <typename Q>
INLINE void transpose(const Q* const* rows, int64_t dim, float* out) {
  int64_t c = 0;
  for (; c + 4 <= dim; c += 4) {
    for (int64_t r = 0; r < LANES; r += 4) {
      f32x4 v[4], half[4];
      for (int i = 0; i < 4; i++) v[i] = load4(rows[r + i] + c);
      const i32x4 low = {0, 4, 1, 5}, high = {2, 6, 3, 7}, first = {0, 1, 4, 5};
      half[0] = __builtin_shuffle(v[0], v[1], low);
      half[1] = __builtin_shuffle(v[2], v[3], low);
      half[2] = __builtin_shuffle(v[0], v[1], high);
      half[3] = __builtin_shuffle(v[2], v[3], high);
      for (int i = 0; i < 4; i++) {
        f32x4 column = __builtin_shuffle(half[i & 2], half[(i & 2) + 1], first + 2 * (i & 1));
        memcpy(out + (c + i) * LANES + r, &column, sizeof column);
      }
    }
  }
  for (; c < dim; c++)
    for (int64_t r = 0; r < LANES; r++) out[c * LANES + r] = get(rows[r] + c);
}

// As storing a value as Q and reading it again.
template <typename Q, typename F>
INLINE F rounded_lanes(F v) {
  if constexpr (std::is_same_v<Q, float>) {
    return v;
  } else if constexpr (std::is_same_v<F, Pair>) {
    return {rounded_lanes<Q>(v.low), rounded_lanes<Q>(v.high)};
  } else {
    using U = std::conditional_t<sizeof(F) == 64, u32x16, u32x8>;
    U u = (U)v;
    return (F)((u + 0x7FFF + ((u >> 16) & 1)) & 0xFFFF0000u);
  }
}

template <typename F>
INLINE F relu(F v) {
  if constexpr (std::is_same_v<F, Pair>)
    return {relu(v.low), relu(v.high)};
  else
    return v < F{} ? F{} : v;  // NaN stays
}

// Add relu(q_h . k) w_h of H heads for sixteen keys; every step is rounded as Q stores it.
template <typename Q, int H, typename V>
INLINE void add_heads(const float* q, const float* weights, const float* keys, int64_t dim,
                      V& total) {
  V s[H] = {};
  for (int64_t c = 0; c < dim; c++) {
    V k;
    load(keys + c * LANES, k);
    for (int h = 0; h < H; h++) s[h] += k * q[h * dim + c];
  }
  for (int h = 0; h < H; h++)
    total += rounded_lanes<Q>(relu(rounded_lanes<Q>(s[h])) * weights[h]);
}

// H heads at a time, and those that are left.
template <typename Q, int H, typename V>
INLINE void add_all_heads(const float* q, const float* weights, const float* keys, int64_t heads,
                          int64_t dim, V& total) {
  for (; heads >= H; heads -= H, q += H * dim, weights += H)
    add_heads<Q, H>(q, weights, keys, dim, total);
  if constexpr (H > 1) {
    if (heads) add_all_heads<Q, H / 2>(q, weights, keys, heads, dim, total);
  }
}

// Scores of keys [begin, end) of one request.
template <typename V, int H, typename Q>
INLINE void score_rows(const Pages<Q>& keys, const float* q, const float* weights, int64_t request,
                       int64_t heads, int64_t begin, int64_t end, float* out) {
  std::vector<float> near(keys.dim * LANES);
  for (int64_t first = begin; first < end; first += LANES) {
    int64_t here = std::min(LANES, end - first);
    const Q* rows[LANES];
    for (int64_t r = 0; r < LANES; r++) {
      rows[r] = keys.row(request, first + std::min(r, here - 1));
      const Q* later = keys.row(request, std::min(first + AHEAD + r, end - 1));
      for (int64_t c = 0; c < keys.dim; c += LINE / sizeof(Q)) __builtin_prefetch(later + c);
    }
    transpose(rows, keys.dim, near.data());
    V total = {};
    add_all_heads<Q, H>(q, weights, near.data(), heads, keys.dim, total);
    float scores[LANES];
    store(scores, rounded_lanes<Q>(total));
    for (int64_t r = 0; r < here; r++)  // torch's top-k takes NaN for the largest, too
      out[first + r] = std::isnan(scores[r]) ? INFINITY : scores[r];
  }
}

template <typename Q>
AVX512 void score_wide(const Pages<Q>& keys, const float* q, const float* weights, int64_t request,
                       int64_t heads, int64_t begin, int64_t end, float* out) {
  score_rows<f32x16, MOST_HEADS>(keys, q, weights, request, heads, begin, end, out);
}

template <typename Q>
CLONES void score_narrow(const Pages<Q>& keys, const float* q, const float* weights,
                         int64_t request, int64_t heads, int64_t begin, int64_t end, float* out) {
  score_rows<Pair, NARROW_HEADS>(keys, q, weights, request, heads, begin, end, out);
}

// Scores in the order of unsigned numbers.
INLINE uint32_t rank_of(float score) {
  uint32_t bits;
  memcpy(&bits, &score, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The topk-th highest of n scores: its first bits by counting, the others among those that share them.
float threshold_of(const float* score, int64_t n, int64_t topk) {
  constexpr int BITS = 12;
  std::vector<int32_t> counts(1 << BITS);
  for (int64_t r = 0; r < n; r++) counts[rank_of(score[r]) >> (32 - BITS)]++;
  int64_t left = topk;
  uint32_t bin = (1 << BITS) - 1;
  for (; counts[bin] < left; bin--) left -= counts[bin];
  std::vector<float> alike;
  alike.reserve(counts[bin]);
  for (int64_t r = 0; r < n; r++)
    if (rank_of(score[r]) >> (32 - BITS) == bin) alike.push_back(score[r]);
  std::nth_element(alike.begin(), alike.begin() + left - 1, alike.end(), std::greater<float>());
  return alike[left - 1];
}

// The `topk` rows of highest score, ascending, ties to the lower row; -1 behind them.
void choose(const float* score, int64_t n, int64_t topk, int32_t* ids) {
  int64_t found = 0;
  if (n <= topk) {
    for (; found < n; found++) ids[found] = int32_t(found);
  } else {
    float threshold = threshold_of(score, n, topk);
    int64_t above = std::count_if(score, score + n, [=](float s) { return s > threshold; });
    int64_t vacant = topk - above;
    for (int64_t r = 0; r < n; r++)
      if (score[r] > threshold || (score[r] == threshold && vacant-- > 0)) ids[found++] = int32_t(r);
  }
  std::fill(ids + found, ids + topk, -1);
}

template <typename Q>
void select_rows(const Pages<Q>& keys, const std::vector<Token>& tokens, const Q* q,
                 const Q* weights, int64_t heads, int64_t ratio, int64_t topk, int32_t* ids) {
  int64_t n_tokens = int64_t(tokens.size()), width = heads * keys.dim;
  std::vector<float> wide(n_tokens * width), wide_weights(n_tokens * heads);
  widen(q, n_tokens * width, wide.data());
  widen(weights, n_tokens * heads, wide_weights.data());
  std::vector<float> scores;
  for (int64_t t = 0; t < n_tokens; t++) {
    int64_t seen = (tokens[t].position + 1) / ratio;
    scores.resize(seen);
    const float *own = wide.data() + t * width, *w = wide_weights.data() + t * heads;
    float* out = scores.data();
    parallel((seen + LANES - 1) / LANES, LANES * width, [&](int64_t begin, int64_t end) {
      int64_t first = begin * LANES, last = std::min(end * LANES, seen);
      auto score = has_avx512() ? score_wide<Q> : score_narrow<Q>;
      score(keys, own, w, tokens[t].request, heads, first, last, out);
    });
    choose(out, seen, topk, ids + t * topk);
  }
}

}  // namespace

extern "C" {

void index_select(const void* q, const void* weights, const void* storage, const int32_t* table,
                  int64_t blocks, int64_t rows, const int32_t* seq_lens, const int32_t* cu_seqlens,
                  int64_t batch, int64_t heads, int64_t dim, int64_t ratio, int64_t topk,
                  int32_t* ids, int64_t is_bf16) {
  std::vector<Token> tokens = tokens_of(seq_lens, cu_seqlens, batch);
  if (is_bf16)
    select_rows(Pages<bf16>{(const bf16*)storage, table, blocks, rows, dim}, tokens, (const bf16*)q,
                (const bf16*)weights, heads, ratio, topk, ids);
  else
    select_rows(Pages<float>{(const float*)storage, table, blocks, rows, dim}, tokens,
                (const float*)q, (const float*)weights, heads, ratio, topk, ids);
}
}

PACKED(index_select)
