// Sampling, a row of the vocabulary per thread. Bound by reading and writing the row, and by the hash behind the noise.
//
// Noise is looked at where it can matter only: with u the draw of a token, score + g(u) > best needs 1 - u < e^(score - best),
// which is tested in fp32, with a margin; the few that pass are compared in fp64. Masses are added up in fp64.
#pragma once
#include "best.h"
#include "ops.h"

namespace {

typedef uint64_t Hashes __attribute__((vector_size(4 * kWidth)));
typedef int32_t HalfInts __attribute__((vector_size(2 * kWidth)));

// What top-k dropped weighs nothing. In fp64, as the contract says: rounding to fp32 could move where top-p cuts.
inline Wide masses(const float* scores, float max) { return exp_of(widen(scores) - double(max)); }

// Keeps scores above the threshold, and the first of those equal to it.
void keep_best(const Row& row, Threshold least, const Candidates& found) {
  for (int64_t v = 0; v < row.V; v += kWidth) {
    const Vec score = scores_at(row.scores, row.V, v);
    store_first(row.scores + v, score >= broadcast(least.score) ? score : broadcast(kDropped), row.V - v);
  }
  const bool is_all = found.count > kMostCandidates;
  for (int64_t i = 0, count = is_all ? row.V : found.count; i < count; ++i) {
    float& score = row.scores[is_all ? i : found.ids[i]];
    if (score == least.score && least.ties-- <= 0) score = kDropped;
  }
}

void keep_top_k(const Row& row, int64_t k, Candidates& found) {
  gather(found, row.scores, row.V, bound_of(row.scores, row.V, k));
  const float* scores = row.scores;
  const bool is_all = found.count > kMostCandidates || found.count < k;  // fewer: the others are NaN
  if (is_all) found.count = kMostCandidates + 1;
  keep_best(row,
            is_all ? select_count(row.V, k, [=](int64_t i) { return scores[i]; })
                   : select_count(found.count, k, [&](int64_t i) { return scores[found.ids[i]]; }),
            found);
}

// Below max - ln(V / ((1 - p) total)), all scores together weigh less than what the best p leave: none of these is kept.
void keep_top_p(const Row& row, double p, Candidates& found) {
  if (!(row.max > kDropped)) return;
  const int64_t whole = row.V / kHalf * kHalf;
  Wide sums = {};
  for (int64_t v = 0; v < whole; v += kHalf) {
    if (v % kWidth == 0 && !any(scores_at(row.scores, row.V, v) > broadcast(kDropped))) v += kHalf;  // by top-k
    else sums += masses(row.scores + v, row.max);
  }
  float rest[kHalf];
  for (int64_t j = 0; j < kHalf; ++j) rest[j] = whole + j < row.V ? row.scores[whole + j] : kDropped;
  sums += masses(rest, row.max);
  double total = 0;
  for (int j = 0; j < kHalf; ++j) total += sums[j];
  const double reach = std::log(double(row.V) / ((1 - p) * total));
  gather(found, row.scores, row.V, float(double(row.max) - std::fmax(reach, 0.0) * 1.001 - std::fabs(row.max) * 1e-6));
  if (found.count > kMostCandidates) {
    const auto masses_at = [&](int64_t i) { return masses(i < whole ? row.scores + i : rest, row.max); };
    return keep_best(row, select_mass(row.V, p * total, row.max, [&](int64_t i) { return row.scores[i]; }, masses_at), found);
  }
  alignas(64) float scores[kMostCandidates + kWidth];
  alignas(64) double weights[kMostCandidates + kWidth];
  for (int64_t i = 0; i < found.count; ++i) scores[i] = row.scores[found.ids[i]];
  for (int64_t i = found.count; i < found.count + kHalf; ++i) scores[i] = kDropped;
  for (int64_t i = 0; i < found.count; i += kHalf) {
    const Wide some = masses(scores + i, row.max);
    std::memcpy(weights + i, &some, sizeof some);
  }
  const auto weights_at = [&](int64_t i) {
    Wide some;
    std::memcpy(&some, weights + i, sizeof some);
    return some;
  };
  keep_best(row, select_mass(found.count, p * total, row.max, [&](int64_t i) { return scores[i]; }, weights_at), found);
}

// Near the limit the comparison is of fp64.
void keep_min_p(const Row& row, float p) {
  const float limit = float(std::log(double(p))), margin = 1e-3f;
  for (int64_t v = 0; v < row.V; v += kWidth) {
    const Vec score = scores_at(row.scores, row.V, v), below = score - row.max;
    const Ints is_low = below < broadcast(limit + margin);
    if (!any(is_low)) continue;
    store_first(row.scores + v, is_low & (below < broadcast(limit - margin)) ? broadcast(kDropped) : score, row.V - v);
    if (!any(is_low & (below >= broadcast(limit - margin)))) continue;
    for (int64_t i = v; i < row.V && i < v + kWidth; ++i)
      if (row.scores[i] < row.max && std::exp(double(row.scores[i]) - double(row.max)) < double(p))
        row.scores[i] = kDropped;
  }
}

template <typename T>
inline T mix(T z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

constexpr uint64_t kTokenStep = 0xD1B54A32D192ED03u;

inline double gumbel(uint64_t stream, int64_t token) {
  const uint64_t x = mix(stream + uint64_t(token) * kTokenStep);
  return -std::log(-std::log((double(x >> 11) + 0.5) * 0x1p-53));
}

// At most 1 - u of kWidth tokens, of which the top 24 bits of u are looked at.
inline Vec below_one(const Hashes& low, const Hashes& high) {
  const HalfInts parts[2] = {__builtin_convertvector(mix(low) >> 40, HalfInts),
                             __builtin_convertvector(mix(high) >> 40, HalfInts)};
  Ints top;
  std::memcpy(&top, parts, sizeof top);
  return __builtin_convertvector(0xffffff - top, Vec) * 0x1p-24f;
}

// The first of the greatest scores; 0 if all are dropped.
int64_t first_best(const Row& row, float max) {
  if (!(max > kDropped)) return 0;
  for (int64_t v = 0; v < row.V; v += kWidth) {
    const Ints is_best = scores_at(row.scores, row.V, v) == broadcast(max);
    if (!any(is_best)) continue;
    for (int i = 0; i < kWidth; ++i)
      if (is_best[i]) return v + i;
  }
  return 0;
}

int32_t draw(const Row& row, uint64_t seed, int32_t position) {
  const uint64_t stream = mix(seed + uint64_t(int64_t(position)) * 0x9E3779B97F4A7C15u);
  int64_t token = first_best(row, row.max);
  if (!(row.max > kDropped)) return int32_t(token);
  double best = double(row.max) + gumbel(stream, token);
  Vec least = broadcast(float(best - std::fabs(best) * 2e-7));  // no more than `best`
  Hashes low, high;
  for (int i = 0; i < kHalf; ++i) {
    low[i] = stream + uint64_t(i) * kTokenStep;
    high[i] = stream + uint64_t(i + kHalf) * kTokenStep;
  }
  for (int64_t v = 0; v < row.V; v += kWidth, low += kWidth * kTokenStep, high += kWidth * kTokenStep) {
    const Vec score = scores_at(row.scores, row.V, v);
    if (!any(score > broadcast(kDropped))) continue;
    const Ints may_win = below_one(low, high) < exp_of(score - least) * 1.001f;
    if (!any(may_win)) continue;
    for (int i = 0; i < kWidth; ++i) {
      if (!may_win[i]) continue;
      const double value = double(score[i]) + gumbel(stream, v + i);
      if (value > best || (value == best && v + i < token)) best = value, token = v + i;
    }
    least = broadcast(float(best - std::fabs(best) * 2e-7));
  }
  return int32_t(token);
}

void adjust(const cpu::SampleArgs& a, int64_t r, float* scores) {
  for (int32_t i = a.penalty_starts[r]; i < a.penalty_starts[r + 1]; ++i) {
    float score = scores[a.penalty_ids[i]];
    score = score > 0 ? score / a.repetition[r] : score * a.repetition[r];
    score -= a.frequency[r] * float(a.penalty_counts[i]);
    scores[a.penalty_ids[i]] = a.penalty_counts[i] > 0 ? score - a.presence[r] : score;
  }
  for (int32_t i = a.bias_starts[r]; i < a.bias_starts[r + 1]; ++i) scores[a.bias_ids[i]] += a.bias_values[i];
}

void sample_rows(const void* args, int64_t begin, int64_t end) {
  const auto& a = *static_cast<const cpu::SampleArgs*>(args);
  Candidates found;
  for (int64_t r = begin; r < end; ++r) {
    Row row{a.scores + r * a.V, a.V, kDropped};
    std::memcpy(row.scores, a.logits + r * a.V, size_t(a.V) * 4);
    adjust(a, r, row.scores);
    const float temperature = a.temperature[r];
    if (temperature == 0) {
      a.tokens[r] = int32_t(first_best(row, greatest_of(row.scores, a.V)));
      continue;
    }
    Vec most = broadcast(kDropped);
    for (int64_t v = 0; v < a.V; v += kWidth) {
      const Vec score = scores_at(row.scores, a.V, v) / temperature;
      store_first(row.scores + v, score, a.V - v);
      most = score > most ? score : most;
    }
    row.max = greatest(most);
    if (a.top_k[r] > 0 && a.top_k[r] < a.V) keep_top_k(row, a.top_k[r], found);
    if (a.top_p[r] < 1) keep_top_p(row, double(a.top_p[r]), found);
    if (a.min_p[r] > 0) keep_min_p(row, a.min_p[r]);
    a.tokens[r] = draw(row, a.seeds[r], a.positions[r]);
  }
}

}  // namespace

void cpu::VIVACE_ISA(sample)(Pool& pool, const SampleArgs& a) { pool.for_range(a.R, 1, sample_rows, &a); }
