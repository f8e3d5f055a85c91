// Which experts a token goes to, and the joining of what they made of it. Threads split tokens.
// Routing is bound by its exponentials in fp64, one per expert; joining by memory.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "math.h"
#include "ops.h"

namespace {

constexpr int64_t kMaxExperts = 1024;  // checked by kernels/moe_route/cpu.py
constexpr float kLowest = -__builtin_inff();

struct Router {
  float scores[kMaxExperts], ranks[kMaxExperts];
  bool is_out[kMaxExperts];  // chosen already, or in a group that is not
};

void score(float* scores, const float* logits, int64_t count, bool is_softmax) {
  if (!is_softmax) {
    for (int64_t e = 0; e < count; ++e) scores[e] = float(1.0 / (1.0 + std::exp(-double(logits[e]))));
    return;
  }
  const double max = *std::max_element(logits, logits + count);
  double sum = 0;
  for (int64_t e = 0; e < count; ++e) sum += std::exp(logits[e] - max);
  for (int64_t e = 0; e < count; ++e) scores[e] = float(std::exp(logits[e] - max) / sum);
}

// The best of those that are in, and the lower of equals. NaN may be chosen: any expert will do, so long as it is one.
int64_t take_best(const float* ranks, bool* is_out, int64_t count) {
  int64_t best = -1;
  for (int64_t e = 0; e < count; ++e)
    if (!is_out[e] && (best < 0 || ranks[e] > ranks[best])) best = e;
  is_out[best] = true;
  return best;
}

float worth(const float* ranks, int64_t count, bool has_bias) {
  float first = kLowest, second = kLowest;
  for (int64_t e = 0; e < count; ++e) {
    second = ranks[e] > first ? first : std::max(second, ranks[e]);
    first = std::max(first, ranks[e]);
  }
  return has_bias && count > 1 ? first + second : first;
}

void leave_groups_out(Router& r, const cpu::MoeRouteArgs& a) {
  const int64_t size = a.E / a.num_groups;
  float worths[kMaxExperts];
  bool is_taken[kMaxExperts] = {};
  for (int64_t g = 0; g < a.num_groups; ++g) worths[g] = worth(r.ranks + g * size, size, a.bias);
  for (int64_t i = 0; i < a.top_groups; ++i) take_best(worths, is_taken, a.num_groups);
  for (int64_t e = 0; e < a.E; ++e) r.is_out[e] = !is_taken[e / size];
}

void route_rows(const void* args, int64_t begin, int64_t end) {
  const auto& a = *static_cast<const cpu::MoeRouteArgs*>(args);
  Router r;
  for (int64_t t = begin; t < end; ++t) {
    const float* logits = a.logits + t * a.E;
    score(r.scores, logits, a.E, a.is_softmax);
    for (int64_t e = 0; e < a.E; ++e) r.ranks[e] = a.bias ? r.scores[e] + a.bias[e] : logits[e];
    std::memset(r.is_out, 0, size_t(a.E));
    if (a.top_groups < a.num_groups) leave_groups_out(r, a);
    float* weights = a.weights + t * a.K;
    int32_t* experts = a.experts + t * a.K;
    for (int64_t k = 0; k < a.K; ++k) experts[k] = int32_t(take_best(r.ranks, r.is_out, a.E));
    if (a.loads)
      for (int64_t k = 0; k < a.K; ++k) __atomic_fetch_add(a.loads + experts[k], 1, __ATOMIC_RELAXED);
    if (a.renormalize && a.is_softmax) {
      float chosen[kMaxExperts];
      for (int64_t k = 0; k < a.K; ++k) chosen[k] = logits[experts[k]];
      score(weights, chosen, a.K, true);
    } else {
      for (int64_t k = 0; k < a.K; ++k) weights[k] = r.scores[experts[k]];
    }
    if (a.renormalize && !a.is_softmax) {
      float sum = 0;
      for (int64_t k = 0; k < a.K; ++k) sum += weights[k];
      for (int64_t k = 0; k < a.K; ++k) weights[k] /= sum + 1e-20f;
    }
    for (int64_t k = 0; k < a.K; ++k) weights[k] *= a.scale;
  }
}

void combine_rows(const void* args, int64_t begin, int64_t end) {
  const auto& a = *static_cast<const cpu::MoeCombineArgs*>(args);
  for (int64_t t = begin; t < end; ++t) {
    float* __restrict out = a.out + t * a.M;
    std::memset(out, 0, size_t(a.M) * 4);
    for (int64_t k = 0; k < a.K; ++k) {
      const float weight = a.weights[t * a.K + k];
      const float* y = a.y + (t * a.K + k) * a.M;
      for (int64_t m = 0; m < a.M; ++m) out[m] += weight * y[m];
    }
    if (!a.shared) continue;
    const float gate = a.shared_gate ? sigmoid(a.shared_gate[t]) : 1.0f;
    const float* shared = a.shared + t * a.M;
    for (int64_t m = 0; m < a.M; ++m) out[m] += gate * shared[m];
  }
}

}  // namespace

namespace cpu {
void moe_route_portable(Pool& pool, const MoeRouteArgs& a) { pool.for_range(a.T, 4, route_rows, &a); }
void moe_combine_portable(Pool& pool, const MoeCombineArgs& a) { pool.for_range(a.T, 4, combine_rows, &a); }
}  // namespace cpu
