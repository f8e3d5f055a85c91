// Attention over the paged cache, one (row, query head) at a time.
//
// Positions are added up in splits of 256 counted from position 0: a split has its own maximum, sum and weighted values,
// and splits are joined in order. So a row's result depends on its own context alone: not on the other rows, not on where
// a chunk began, not on which blocks it has. Threads split (row, head); bound by reading K and V from cache or memory.
#include <algorithm>
#include <cstring>

#include "math.h"
#include "ops.h"

namespace {

constexpr int64_t kSplit = 256;  // kernels.attention.SPLIT_TOKENS
constexpr int64_t kMaxD = 1024;  // checked by kernels/attention/cpu.py

struct State {
  float max, sum;
  float acc[kMaxD];
};

// Positions begin..end-1 of one split, all of them visible to the row.
void split(State& s, const cpu::AttentionArgs& a, const float* q, const int32_t* table, int64_t g, int64_t begin,
           int64_t end) {
  float p[kSplit];
  const int64_t v_offset = a.G * a.S * a.D;
  const auto k_of = [&](int64_t position) {
    const int64_t block = table[position / a.S];
    return a.kv_cache + (((block * 2) * a.G + g) * a.S + position % a.S) * a.D;
  };
  float max = -__builtin_inff();
  for (int64_t i = begin; i < end; ++i) {
    const float score = dot(q, k_of(i), a.D) * a.scale;
    p[i - begin] = a.softcap > 0 ? a.softcap * tanh_poly(score / a.softcap) : score;
    max = std::max(max, p[i - begin]);
  }
  float sum = 0;
  for (int64_t i = 0; i < end - begin; ++i) p[i] = exp_poly(p[i] - max);
  for (int64_t i = 0; i < end - begin; ++i) sum += p[i];
  std::memset(s.acc, 0, size_t(a.D) * 4);
  int64_t i = begin;
  for (; i + 4 <= end; i += 4) {  // four at a time, added in their order: fewer trips of `acc` to memory
    const float *v0 = k_of(i) + v_offset, *v1 = k_of(i + 1) + v_offset, *v2 = k_of(i + 2) + v_offset,
                *v3 = k_of(i + 3) + v_offset, *w = p + (i - begin);
    float* __restrict acc = s.acc;
    for (int64_t d = 0; d < a.D; ++d)
      acc[d] = (((acc[d] + w[0] * v0[d]) + w[1] * v1[d]) + w[2] * v2[d]) + w[3] * v3[d];
  }
  for (; i < end; ++i) {
    const float* v = k_of(i) + v_offset;
    for (int64_t d = 0; d < a.D; ++d) s.acc[d] += p[i - begin] * v[d];
  }
  s.max = max;
  s.sum = sum;
}

void join(State& total, const State& next, int64_t D) {
  const float max = std::max(total.max, next.max);
  const float keep = exp_poly(total.max - max), take = exp_poly(next.max - max);
  total.sum = total.sum * keep + next.sum * take;
  for (int64_t d = 0; d < D; ++d) total.acc[d] = total.acc[d] * keep + next.acc[d] * take;
  total.max = max;
}

// A logit without a value.
void add_sink(State& total, float sink, int64_t D) {
  const float max = std::max(total.max, sink);
  const float keep = exp_poly(total.max - max);
  total.sum = total.sum * keep + exp_poly(sink - max);
  for (int64_t d = 0; d < D; ++d) total.acc[d] *= keep;
}

void items(const void* args, int64_t begin, int64_t end) {
  const auto& a = *static_cast<const cpu::AttentionArgs*>(args);
  State total, next;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t t = item / a.H, h = item % a.H;
    float* out = a.out + item * a.D;
    const int64_t b = std::upper_bound(a.query_starts, a.query_starts + a.B + 1, int32_t(t)) - a.query_starts - 1;
    if (b >= a.B) {  // a row of nobody
      std::memset(out, 0, size_t(a.D) * 4);
      continue;
    }
    const int64_t visible = a.context_lens[b] - (a.query_starts[b + 1] - t) + 1;
    const int32_t* table = a.block_tables + b * a.X;
    const float* q = a.q + item * a.D;
    const int64_t g = h / (a.H / a.G);
    const int64_t first = a.window > 0 ? std::max(int64_t(0), visible - a.window) : 0;
    int64_t next_split = (first / kSplit + 1) * kSplit;
    split(total, a, q, table, g, first, std::min(next_split, visible));
    for (; next_split < visible; next_split += kSplit) {
      split(next, a, q, table, g, next_split, std::min(next_split + kSplit, visible));
      join(total, next, a.D);
    }
    if (a.sinks) add_sink(total, a.sinks[h], a.D);
    for (int64_t d = 0; d < a.D; ++d) out[d] = total.acc[d] / total.sum;
  }
}

}  // namespace

void cpu::attention_portable(Pool& pool, const AttentionArgs& a) { pool.for_range(a.T * a.H, 4, items, &a); }
