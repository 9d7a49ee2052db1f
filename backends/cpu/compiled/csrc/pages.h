// The requests of a step, and the paged rows they see.
#pragma once

#include "simd.h"

// One request's part of a step: tokens [begin, end) of the batch, the first at position `start`.
struct Span {
  int64_t begin, end, start;

  int64_t stop() const { return start + end - begin; }
};

static inline Span span_of(const int32_t* seq_lens, const int32_t* cu_seqlens, int64_t request) {
  int64_t begin = cu_seqlens[request], end = cu_seqlens[request + 1];
  return {begin, end, seq_lens[request] - (end - begin)};
}

struct Token {
  int64_t request, position;
};

static inline std::vector<Token> tokens_of(const int32_t* seq_lens, const int32_t* cu_seqlens, int64_t batch) {
  std::vector<Token> tokens;
  for (int64_t r = 0; r < batch; r++) {
    Span s = span_of(seq_lens, cu_seqlens, r);
    for (int64_t t = s.begin; t < s.end; t++) tokens.push_back({r, s.start + t - s.begin});
  }
  return tokens;
}

// A paged cache of plain rows.
template <typename T>
struct Pages {
  const T* storage;
  const int32_t* table;
  int64_t n_blocks, block_rows, dim;
  // Of a power of two; a division takes twenty times as long.
  int shift = block_rows > 0 && !(block_rows & (block_rows - 1)) ? __builtin_ctzll(block_rows) : -1;

  const T* row(int64_t request, int64_t r) const {
    int64_t nth = shift >= 0 ? r >> shift : r / block_rows;
    int64_t block = table[request * n_blocks + nth];
    return storage + (block * block_rows + r - nth * block_rows) * dim;
  }
};
