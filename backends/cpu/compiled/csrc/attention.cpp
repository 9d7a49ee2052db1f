// Attention of single tokens to gathered rows, and the making of compressed ones.
#include "pages.h"

namespace {

template <typename T>
struct Attention {
  Pages<T> window, compressed;
  const int32_t* indices;  // [n_tokens, topk], or none: every row that is there
  int64_t topk, window_size, ratio, heads, dim;
  const float* sink;
  float scale;

  std::vector<const T*> rows_of(int64_t t, Token token) const {
    std::vector<const T*> rows;
    for (int64_t p = std::max<int64_t>(token.position - window_size + 1, 0); p <= token.position; p++)
      rows.push_back(window.row(token.request, p));
    if (!compressed.storage) return rows;
    int64_t seen = (token.position + 1) / ratio;
    if (!indices)
      for (int64_t r = 0; r < seen; r++) rows.push_back(compressed.row(token.request, r));
    else
      for (int64_t i = 0; i < topk; i++) {
        int64_t r = indices[t * topk + i];
        if (r >= 0 && r < seen) rows.push_back(compressed.row(token.request, r));
      }
    return rows;
  }
};

// Turn scores into probabilities, each rounded as Q stores it; return what their sum divides by.
template <typename Q>
INLINE float softmax(float* score, int64_t n, float scale, float sink) {
  f32x16 tops = splat(-INFINITY);
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    f32x16 s = load(score + i) * scale;
    tops = s > tops ? s : tops;
    store(score + i, s);
  }
  float top = -INFINITY, total = 0.0f;
  for (int64_t j = 0; j < LANES; j++) top = std::max(top, tops[j]);
  for (; i < n; i++) top = std::max(top, score[i] *= scale);
  i = 0;
  f32x16 sums = {};
  for (; i + LANES <= n; i += LANES) {
    f32x16 p = exp_of_negative(load(score + i) - top);
    sums += p;
    store(score + i, p);
  }
  for (; i < n; i++) total += score[i] = std::exp(score[i] - top);
  if (sizeof(Q) < sizeof(float))
    for (int64_t j = 0; j < n; j++) score[j] = rounded<Q>(score[j]);
  return sum(sums) + total + std::exp(sink - top);
}

// Attend from H heads of one token.
template <int H, typename Q, typename T>
INLINE void attend(const Q* q, const std::vector<const T*>& rows, const float* sink, float scale,
                   int64_t dim, float* wide, float* scores, Q* out) {
  int64_t n = int64_t(rows.size());
  float divisor[H];
  for (int h = 0; h < H; h++) widen(q + h * dim, dim, wide + h * dim);
  for (int64_t r = 0; r < n; r++) {
    float s[H];
    dots<H>(wide, dim, rows[r], dim, s);
    for (int h = 0; h < H; h++) scores[h * n + r] = s[h];
  }
  for (int h = 0; h < H; h++) divisor[h] = softmax<Q>(scores + h * n, n, scale, sink[h]);
  int64_t i = 0;
  for (; i + 2 * LANES <= dim; i += 2 * LANES) {
    f32x16 low[H] = {}, high[H] = {};
    for (int64_t r = 0; r < n; r++) {
      f32x16 a = load(rows[r] + i), b = load(rows[r] + i + LANES);
      for (int h = 0; h < H; h++) {
        low[h] += a * scores[h * n + r];
        high[h] += b * scores[h * n + r];
      }
    }
    for (int h = 0; h < H; h++) {
      store(out + h * dim + i, low[h] / divisor[h]);
      store(out + h * dim + i + LANES, high[h] / divisor[h]);
    }
  }
  for (; i < dim; i++)
    for (int h = 0; h < H; h++) {
      float y = 0.0f;
      for (int64_t r = 0; r < n; r++) y += get(rows[r] + i) * scores[h * n + r];
      put(out + h * dim + i, y / divisor[h]);
    }
}

constexpr int64_t HEADS = 4;  // of one token, which share a read of its rows

// Groups of heads of all tokens, numbered through: [begin, end).
template <typename Q, typename T>
CLONES void attend_all(const Attention<T>& a, const std::vector<Token>& tokens, const Q* q, Q* out,
                       int64_t begin, int64_t end) {
  int64_t groups = (a.heads + HEADS - 1) / HEADS, known = -1;
  std::vector<const T*> rows;
  std::vector<float> wide(HEADS * a.dim), scores;
  for (int64_t i = begin; i < end; i++) {
    int64_t t = i / groups, head = i % groups * HEADS;
    if (t != known) rows = a.rows_of(t, tokens[t]);
    known = t;
    scores.resize(HEADS * rows.size());
    int64_t at = (t * a.heads + head) * a.dim;
    const float* sink = a.sink + head;
    float *w = wide.data(), *s = scores.data();
    switch (std::min(HEADS, a.heads - head)) {
      case 1: attend<1>(q + at, rows, sink, a.scale, a.dim, w, s, out + at); break;
      case 2: attend<2>(q + at, rows, sink, a.scale, a.dim, w, s, out + at); break;
      case 3: attend<3>(q + at, rows, sink, a.scale, a.dim, w, s, out + at); break;
      default: attend<4>(q + at, rows, sink, a.scale, a.dim, w, s, out + at);
    }
  }
}

template <typename Q, typename T>
void sparse_attention(const Attention<T>& a, const std::vector<Token>& tokens, const void* q,
                      void* out) {
  int64_t groups = (a.heads + HEADS - 1) / HEADS;
  int64_t cost = HEADS * a.dim * (a.window_size + a.topk);
  parallel(int64_t(tokens.size()) * groups, cost, [&](int64_t begin, int64_t end) {
    attend_all(a, tokens, (const Q*)q, (Q*)out, begin, end);
  });
}

// Rows of scores [n_tokens, heads, n], of which a token sees those its mask names.
template <typename Q>
CLONES void masked_softmaxes(float* scores, const uint8_t* is_visible, const float* sink,
                             float scale, int64_t heads, int64_t n, float* divisor, int64_t begin,
                             int64_t end) {
  for (int64_t r = begin; r < end; r++) {
    float* score = scores + r * n;
    const uint8_t* sees = is_visible + r / heads * n;
    for (int64_t i = 0; i < n; i++) score[i] = sees[i] ? score[i] : -INFINITY;
    divisor[r] = softmax<Q>(score, n, scale, sink[r % heads]);
  }
}

// What one compressed row is made of, for each of its tokens.
struct Part {
  const float *kv, *score;
};

// out = sum_i kv_i softmax_i(score_i), per channel.
CLONES void pool(const std::vector<Part>& parts, int64_t n, float* out) {
  for (int64_t c = 0; c < n; c += LANES) {
    int64_t here = std::min(LANES, n - c);
    auto read = [&](const float* p) __attribute__((always_inline)) {
      if (here == LANES) return load(p + c);
      float x[LANES] = {};
      std::copy_n(p + c, here, x);
      return load(x);
    };
    f32x16 top = read(parts[0].score), total = {}, y = {};
    for (const Part& part : parts) {
      f32x16 s = read(part.score);
      top = s > top ? s : top;
    }
    for (const Part& part : parts) {
      f32x16 p = exp_of_negative(read(part.score) - top);
      total += p;
      y += p * read(part.kv);
    }
    float result[LANES];
    store(result, y / total);
    std::copy_n(result, here, out + c);
  }
}

}  // namespace

extern "C" {

void sparse_attn(const void* q, const void* window, const int32_t* window_table,
                 int64_t window_blocks, int64_t window_rows, const void* compressed,
                 const int32_t* table, int64_t blocks, int64_t rows, const int32_t* indices,
                 int64_t topk, const int32_t* seq_lens, const int32_t* cu_seqlens, int64_t batch,
                 const float* sink, float scale, int64_t window_size, int64_t ratio, void* out,
                 int64_t heads, int64_t dim, int64_t q_is_bf16, int64_t rows_are_bf16) {
  std::vector<Token> tokens = tokens_of(seq_lens, cu_seqlens, batch);
  auto run = [&](auto row) {
    using T = decltype(row);
    Pages<T> near{(const T*)window, window_table, window_blocks, window_rows, dim};
    Pages<T> far{(const T*)compressed, table, blocks, rows, dim};
    Attention<T> a{near, far, indices, topk, window_size, ratio, heads, dim, sink, scale};
    if (q_is_bf16)
      sparse_attention<bf16>(a, tokens, q, out);
    else
      sparse_attention<float>(a, tokens, q, out);
  };
  if (rows_are_bf16)
    run(bf16{});
  else
    run(float{});
}

// Make probabilities of the scores of the rows that each token sees, in place.
void masked_softmax(float* scores, const uint8_t* is_visible, const float* sink, float scale,
                    int64_t tokens, int64_t heads, int64_t n, float* divisor, int64_t q_is_bf16) {
  parallel(tokens * heads, 8 * n, [=](int64_t begin, int64_t end) {
    if (q_is_bf16)
      masked_softmaxes<bf16>(scores, is_visible, sink, scale, heads, n, divisor, begin, end);
    else
      masked_softmaxes<float>(scores, is_visible, sink, scale, heads, n, divisor, begin, end);
  });
}

// Pool the groups that a step completes into `pooled`, packed by request, and carry what later
// steps need in `state`, K | Z of token t in row t % state_rows. `score` comes without `ape`.
// Return how many rows there are.
int64_t compress_kv(const float* kv, float* score, const float* ape, float* state,
                 const int64_t* state_slots, const int32_t* seq_lens, const int32_t* cu_seqlens,
                 int64_t batch, int64_t ratio, int64_t head_dim, int64_t width, int64_t state_rows,
                 float* pooled) {
  std::vector<Part> parts;
  const float* first = pooled;
  for (int64_t request = 0; request < batch; request++) {
    Span s = span_of(seq_lens, cu_seqlens, request);
    float* own = state + state_slots[request] * state_rows * 2 * width;
    for (int64_t t = s.begin; t < s.end; t++) {
      const float* more = ape + (s.start + t - s.begin) % ratio * width;
      for (int64_t c = 0; c < width; c++) score[t * width + c] += more[c];
    }
    auto add_group = [&](int64_t group, int64_t channel) {
      for (int64_t p = group * ratio; p < (group + 1) * ratio; p++) {
        const float* carried = own + p % state_rows * 2 * width + channel;
        int64_t at = (s.begin + p - s.start) * width + channel;
        parts.push_back(p < s.start ? Part{carried, carried + width} : Part{kv + at, score + at});
      }
    };
    for (int64_t group = s.start / ratio; group < s.stop() / ratio; group++) {
      parts.clear();
      // The first half of the channels belongs to the next group, the second to its own.
      bool overlaps = width == 2 * head_dim;
      if (overlaps && group > 0) add_group(group - 1, 0);
      add_group(group, overlaps ? head_dim : 0);
      pool(parts, head_dim, pooled);
      pooled += head_dim;
    }
    for (int64_t t = std::max(s.begin, s.end - state_rows); t < s.end; t++) {
      float* to = own + (s.start + t - s.begin) % state_rows * 2 * width;
      std::copy_n(kv + t * width, width, to);
      std::copy_n(score + t * width, width, to + width);
    }
  }
  return (pooled - first) / head_dim;
}
}

PACKED(sparse_attn)
PACKED(masked_softmax)
PACKED(compress_kv)
