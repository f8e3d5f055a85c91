// Logprobs, a row of the vocabulary per thread. Bound by reading the row, which stays in cache, and by exponentials in fp64.
#pragma once
#include "best.h"
#include "ops.h"

namespace {

// max + ln of the sum of e^(logit - max).
double log_sum(const float* logits, int64_t V) {
  const float max = greatest_of(logits, V);
  const int64_t whole = V / kHalf * kHalf;
  Wide sums = {};
  for (int64_t v = 0; v < whole; v += kHalf) sums += exp_of(widen(logits + v) - double(max));
  double sum = 0;
  for (int j = 0; j < kHalf; ++j) sum += sums[j];
  for (int64_t v = whole; v < V; ++v) sum += std::exp(double(logits[v]) - double(max));
  return double(max) + std::log(sum);
}

// The best of `count` ids that come after `last` in the order of the best; -1 if all others are NaN.
template <typename IdAt>
int64_t best_after(const float* logits, int64_t last, int64_t count, IdAt id_at) {
  int64_t best = -1;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t v = id_at(i);
    const bool after = last < 0 || logits[v] < logits[last] || (logits[v] == logits[last] && v > last);
    if (after && (best < 0 || logits[v] > logits[best])) best = v;
  }
  return best;
}

void logprob_rows(const void* args, int64_t begin, int64_t end) {
  const auto& a = *static_cast<const cpu::LogprobsArgs*>(args);
  Candidates found;
  for (int64_t r = begin; r < end; ++r) {
    const float* logits = a.logits + r * a.V;
    const float chosen = logits[a.tokens[r]];
    const double sum = log_sum(logits, a.V);
    Ints above = {};
    for (int64_t v = 0; v < a.V; v += kWidth) above -= scores_at(logits, a.V, v) > broadcast(chosen);
    int32_t rank = 1;
    for (int i = 0; i < kWidth; ++i) rank += above[i];
    a.chosen[r] = float(double(chosen) - sum);
    a.ranks[r] = rank;
    if (a.K == 0) continue;
    gather(found, logits, a.V, bound_of(logits, a.V, a.K));
    const bool is_all = found.count > kMostCandidates || found.count < a.K;
    for (int64_t k = 0; k < a.K; ++k) {
      const int64_t last = k ? a.top_ids[r * a.K + k - 1] : -1;
      int64_t best = is_all ? best_after(logits, last, a.V, [](int64_t i) { return i; })
                            : best_after(logits, last, found.count, [&](int64_t i) { return found.ids[i]; });
      if (best < 0) best = 0;  // nothing but NaN is left: any id will do, so long as it is one
      a.top_ids[r * a.K + k] = int32_t(best);
      a.top_logprobs[r * a.K + k] = float(double(logits[best]) - sum);
    }
  }
}

}  // namespace

void cpu::VIVACE_ISA(logprobs)(Pool& pool, const LogprobsArgs& a) { pool.for_range(a.R, 1, logprob_rows, &a); }
