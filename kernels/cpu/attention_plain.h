// Attention one (row, query head) at a time, as the compiler vectorises it: the file that includes this names the instruction
// set. Threads split (row, head); bound by reading K and V from cache or memory.
#pragma once
#include "attention.h"

namespace {

// Positions begin..end-1 of one split, all of them visible to the row.
void split(State& s, const cpu::AttentionArgs& a, const float* q, const int32_t* table, int64_t g, int64_t begin,
           int64_t end) {
  float p[kSplit] = {};
  const int64_t v_offset = a.G * a.S * a.D;
  for (int64_t i = begin, next; i < end; i = next) {  // the part of a block that lies in the range
    next = std::min((i / a.S + 1) * a.S, end);
    const float* k = block_of(a, table, i, g) + i % a.S;
    float* scores = p + (i - begin);
    for (int64_t d = 0; d < a.D; ++d)
      for (int64_t j = 0; j < next - i; ++j) scores[j] += q[d] * k[d * a.S + j];
  }
  float max = -__builtin_inff();
  for (int64_t i = 0; i < end - begin; ++i) {
    const float score = p[i] * a.scale;
    p[i] = a.softcap > 0 ? a.softcap * tanh_poly(score / a.softcap) : score;
    max = std::max(max, p[i]);
  }
  float sum = 0;
  for (int64_t i = 0; i < end - begin; ++i) p[i] = exp_poly(p[i] - max);
  for (int64_t i = 0; i < end - begin; ++i) sum += p[i];
  std::memset(s.acc, 0, size_t(a.D) * 4);
  for (int64_t i = begin; i < end; ++i) {
    const float* v = block_of(a, table, i, g) + v_offset + i % a.S * a.D;
    float* __restrict acc = s.acc;
    const float weight = p[i - begin];
    for (int64_t d = 0; d < a.D; ++d) acc[d] += weight * v[d];
  }
  s.max = max;
  s.sum = sum;
}

void items(const void* args, int64_t begin, int64_t end) {
  const auto& a = *static_cast<const cpu::AttentionArgs*>(args);
  State total, next;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t t = item / a.H, h = item % a.H, b = request_of(a, t);
    float* out = a.out + item * a.D;
    if (b >= a.B) {  // a row of nobody
      std::memset(out, 0, size_t(a.D) * 4);
      continue;
    }
    const auto [first, visible] = range_of(a, b, t);
    const int32_t* table = a.block_tables + b * a.X;
    const float* q = a.q + item * a.D;
    const int64_t g = h / (a.H / a.G);
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

void cpu::VIVACE_ISA(attention)(Pool& pool, const AttentionArgs& a) { pool.for_range(a.T * a.H, 4, items, &a); }
