// The lightning indexer: scores of all rows that tokens see, and the choice among them.
#include "pages.h"

namespace {

constexpr int MOST_HEADS = 16;  // whose sums are in registers at once
constexpr int NARROW_HEADS = 4;
constexpr int64_t AHEAD = 2 * LANES;  // keys asked for before they are scored: pages lie anywhere
constexpr int64_t LINE = 64;
constexpr int64_t TILE = 16;  // tokens of one request that share a look at its keys
constexpr int64_t NEAR_SCORES = 1 << 17;  // of a tile, which stay near
constexpr int64_t FEW = 64;  // tokens; of more, threads take tiles

// Sixteen rows side by side: channel c of all of them at out + c * LANES.
template <typename Q>
INLINE void transpose(const Q* const* rows, int64_t dim, float* out) {
  int64_t c = 0;
  for (; c + 4 <= dim; c += 4) {
    for (int64_t r = 0; r < LANES; r += 4) {
      f32x4 v[4], half[4];
      for (int i = 0; i < 4; i++) load(rows[r + i] + c, v[i]);
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

// NaN as the highest score: torch's top-k takes it for the largest, too.
template <typename F>
INLINE F nan_highest(F v) {
  if constexpr (std::is_same_v<F, Pair>)
    return {nan_highest(v.low), nan_highest(v.high)};
  else
    return v == v ? v : F{} + INFINITY;
}

// Tokens of one request, and what the indexer asks for them: q [n, heads, dim], weights [n, heads].
struct Queries {
  const Token* tokens;
  int64_t n, heads, ratio;
  const float *q, *weights;

  int64_t seen(int64_t t) const { return (tokens[t].position + 1) / ratio; }
};

// Scores of keys [begin, end) at out + token * stride, sixteen at a time: those behind the last key
// that a token sees mean nothing.
template <typename V, int H, typename Q>
INLINE void score_rows(const Pages<Q>& keys, const Queries& asked, int64_t begin, int64_t end,
                       float* out, int64_t stride) {
  std::vector<float> near(keys.dim * LANES);
  int64_t request = asked.tokens[0].request, width = asked.heads * keys.dim;
  for (int64_t first = begin; first < end; first += LANES) {
    const Q* rows[LANES];
    for (int64_t r = 0; r < LANES; r++) {
      rows[r] = keys.row(request, std::min(first + r, end - 1));
      const Q* later = keys.row(request, std::min(first + AHEAD + r, end - 1));
      for (int64_t c = 0; c < keys.dim; c += LINE / sizeof(Q)) __builtin_prefetch(later + c);
    }
    transpose(rows, keys.dim, near.data());
    for (int64_t t = 0; t < asked.n; t++) {
      if (first >= asked.seen(t)) continue;
      V total = {};
      add_all_heads<Q, H>(asked.q + t * width, asked.weights + t * asked.heads, near.data(),
                          asked.heads, keys.dim, total);
      store(out + t * stride + first, nan_highest(rounded_lanes<Q>(total)));
    }
  }
}

template <typename Q>
AVX512 void score_wide(const Pages<Q>& keys, const Queries& asked, int64_t begin, int64_t end,
                       float* out, int64_t stride) {
  score_rows<f32x16, MOST_HEADS>(keys, asked, begin, end, out, stride);
}

template <typename Q>
CLONES void score_narrow(const Pages<Q>& keys, const Queries& asked, int64_t begin, int64_t end,
                         float* out, int64_t stride) {
  score_rows<Pair, NARROW_HEADS>(keys, asked, begin, end, out, stride);
}

template <typename Q>
void score(const Pages<Q>& keys, const Queries& asked, int64_t begin, int64_t end, float* out,
           int64_t stride) {
  (has_avx512() ? score_wide<Q> : score_narrow<Q>)(keys, asked, begin, end, out, stride);
}

// Scores in the order of unsigned numbers.
INLINE uint32_t rank_of(float score) {
  uint32_t bits;
  memcpy(&bits, &score, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The topk-th highest of n scores: its first bits by counting, the others among those that share
// them.
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

// Requests' tokens, in tiles that share a look at the keys.
struct Tile {
  int64_t begin, end;
};

std::vector<Tile> tiles_of(const std::vector<Token>& tokens, int64_t most) {
  std::vector<Tile> tiles;
  for (int64_t t = 0; t < int64_t(tokens.size()); t++) {
    bool goes_on = !tiles.empty() && tiles.back().end - tiles.back().begin < most &&
                   tokens[tiles.back().begin].request == tokens[t].request;
    if (goes_on)
      tiles.back().end++;
    else
      tiles.push_back({t, t + 1});
  }
  return tiles;
}

// Many tokens, by tiles; few, by parts of the keys that each one sees.
template <typename Q>
void select_rows(const Pages<Q>& keys, const std::vector<Token>& tokens, const Q* q,
                 const Q* weights, int64_t heads, int64_t ratio, int64_t topk, int32_t* ids) {
  int64_t n_tokens = int64_t(tokens.size()), width = heads * keys.dim, longest = 0;
  for (const Token& token : tokens) longest = std::max(longest, (token.position + 1) / ratio);
  int64_t stride = (longest + LANES - 1) / LANES * LANES;
  int64_t most = std::clamp<int64_t>(NEAR_SCORES / std::max<int64_t>(stride, 1), 1, TILE);
  std::vector<Tile> tiles = tiles_of(tokens, most);
  int64_t n_tiles = int64_t(tiles.size());
  bool are_many = n_tokens > FEW;
  auto choose_for = [&](const Tile& tile) {
    int64_t n = tile.end - tile.begin;
    std::vector<float> wide(n * width), wide_weights(n * heads), scores(n * stride);
    widen(q + tile.begin * width, n * width, wide.data());
    widen(weights + tile.begin * heads, n * heads, wide_weights.data());
    Queries asked{&tokens[tile.begin], n, heads, ratio, wide.data(), wide_weights.data()};
    int64_t seen = asked.seen(n - 1);
    float* out = scores.data();
    if (are_many)
      score(keys, asked, 0, seen, out, stride);
    else
      parallel((seen + LANES - 1) / LANES, n * LANES * width, [&](int64_t begin, int64_t end) {
        score(keys, asked, begin * LANES, std::min(end * LANES, seen), out, stride);
      });
    for (int64_t t = 0; t < n; t++)
      choose(out + t * stride, asked.seen(t), topk, ids + (tile.begin + t) * topk);
  };
  if (!are_many) {
    for (const Tile& tile : tiles) choose_for(tile);
    return;
  }
  // Later tokens see more keys: early and late tiles take turns, so that halves take as long.
  parallel(n_tiles, most * longest * width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) choose_for(tiles[i % 2 ? n_tiles - 1 - i / 2 : i / 2]);
  });
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
