// Attention over the paged cache: what its instruction sets share.
//
// Positions are added up in splits of 256 counted from position 0: a split has its own maximum, sum and weighted values,
// and splits are joined in order. So a row's result depends on its own context alone: not on the other rows, not on where
// a chunk began, not on which blocks it has.
#pragma once
#include <algorithm>
#include <cstring>

#include "math.h"
#include "ops.h"

namespace {

constexpr int64_t kSplit = 256;  // kernels.attention.SPLIT_TOKENS
constexpr int64_t kMaxD = 1024;  // checked by kernels/attention/cpu.py

// A row of q and what has been added up for it.
struct State {
  float max, sum;
  float acc[kMaxD];
};

inline void join(State& total, const State& next, int64_t D) {
  const float max = std::max(total.max, next.max);
  const float keep = exp_poly(total.max - max), take = exp_poly(next.max - max);
  total.sum = total.sum * keep + next.sum * take;
  for (int64_t d = 0; d < D; ++d) total.acc[d] = total.acc[d] * keep + next.acc[d] * take;
  total.max = max;
}

// A logit without a value.
inline void add_sink(State& total, float sink, int64_t D) {
  const float max = std::max(total.max, sink);
  const float keep = exp_poly(total.max - max);
  total.sum = total.sum * keep + exp_poly(sink - max);
  for (int64_t d = 0; d < D; ++d) total.acc[d] *= keep;
}

// The positions that a row sees: first .. visible - 1.
struct Range {
  int64_t first, visible;
};

inline Range range_of(const cpu::AttentionArgs& a, int64_t b, int64_t t) {
  const int64_t visible = a.context_lens[b] - (a.query_starts[b + 1] - t) + 1;
  return {a.window > 0 ? std::max(int64_t(0), visible - a.window) : 0, visible};
}

// The request that a row is of; B for a row of nobody.
inline int64_t request_of(const cpu::AttentionArgs& a, int64_t t) {
  return std::upper_bound(a.query_starts, a.query_starts + a.B + 1, int32_t(t)) - a.query_starts - 1;
}

// K of a block, [D, S]; V, [S, D], lies `v_offset` behind it.
inline const float* block_of(const cpu::AttentionArgs& a, const int32_t* table, int64_t position, int64_t g) {
  return a.kv_cache + (int64_t(table[position / a.S]) * 2 * a.G + g) * a.S * a.D;
}

}  // namespace
