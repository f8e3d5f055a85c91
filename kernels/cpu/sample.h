// Sampling and logprobs, a row of the vocabulary per thread. No sorting: thresholds are found by radix selection on keys
// that order as the scores do, 8 bits a pass. Probabilities are added up in fp64, in the order of the ids.
// For each instruction set as the compiler vectorises it: the file that includes this names it.
#pragma once
#include <cmath>
#include <cstring>

#include "ops.h"

namespace {

constexpr float kDropped = -__builtin_inff();

// Orders as the floats do; -0 and 0 are equal.
inline uint32_t key_of(float x) {
  x += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct Row {
  float* scores;
  int64_t V;
  float max;
};

// Keeps scores above the key `threshold`, and the first `ties` of those equal to it.
void keep_best(const Row& row, uint32_t threshold, int64_t ties) {
  for (int64_t v = 0; v < row.V; ++v) {
    const uint32_t key = key_of(row.scores[v]);
    if (key > threshold || (key == threshold && ties-- > 0)) continue;
    row.scores[v] = kDropped;
  }
}

void keep_top_k(const Row& row, int64_t k) {
  uint32_t prefix = 0, mask = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    int64_t counts[256] = {};
    for (int64_t v = 0; v < row.V; ++v) {
      const uint32_t key = key_of(row.scores[v]);
      if ((key & mask) == prefix) ++counts[(key >> shift) & 255];
    }
    int bucket = 255;
    for (; k > counts[bucket]; --bucket) k -= counts[bucket];
    prefix |= uint32_t(bucket) << shift;
    mask |= 255u << shift;
  }
  keep_best(row, prefix, k);
}

// In fp64, as the contract says: rounding to fp32 could move where top-p cuts. What top-k dropped is most of a row, and
// libm is slow at infinities.
inline double mass(float score, float max) {
  return score == kDropped ? 0 : std::exp(double(score) - double(max));
}

void keep_top_p(const Row& row, double p) {
  double total = 0;
  for (int64_t v = 0; v < row.V; ++v) total += mass(row.scores[v], row.max);
  double missing = p * total;
  uint32_t prefix = 0, mask = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    double masses[256] = {};
    for (int64_t v = 0; v < row.V; ++v) {
      const uint32_t key = key_of(row.scores[v]);
      if ((key & mask) == prefix) masses[(key >> shift) & 255] += mass(row.scores[v], row.max);
    }
    int bucket = 255;
    for (; bucket > 0 && missing > masses[bucket]; --bucket) missing -= masses[bucket];
    // Rounding may leave something missing after the last bucket that holds anything: then that one is the last kept.
    while (bucket < 255 && masses[bucket] == 0) ++bucket;
    prefix |= uint32_t(bucket) << shift;
    mask |= 255u << shift;
  }
  float score = 0;
  const uint32_t bits = prefix & 0x80000000u ? prefix & 0x7fffffffu : ~prefix;
  std::memcpy(&score, &bits, 4);
  const double each = mass(score, row.max);
  const double ties = each > 0 ? std::ceil(missing / each) : double(row.V);
  keep_best(row, prefix, ties < 1 ? 1 : int64_t(std::fmin(ties, double(row.V))));
}

void keep_min_p(const Row& row, float p) {
  for (int64_t v = 0; v < row.V; ++v)
    if (row.scores[v] < row.max && mass(row.scores[v], row.max) < double(p)) row.scores[v] = kDropped;
}

inline uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

inline double gumbel(uint64_t stream, int64_t token) {
  const uint64_t x = mix(stream + uint64_t(token) * 0xD1B54A32D192ED03u);
  return -std::log(-std::log((double(x >> 11) + 0.5) * 0x1p-53));
}

int32_t draw(const Row& row, uint64_t seed, int32_t position, bool greedy) {
  const uint64_t stream = mix(seed + uint64_t(int64_t(position)) * 0x9E3779B97F4A7C15u);
  double best = -__builtin_inf();
  int64_t token = 0;
  for (int64_t v = 0; v < row.V; ++v) {
    if (row.scores[v] == kDropped) continue;
    const double score = double(row.scores[v]) + (greedy ? 0.0 : gumbel(stream, v));
    if (score > best) best = score, token = v;
  }
  return int32_t(token);
}

void penalize(const cpu::SampleArgs& a, int64_t r, float* scores) {
  for (int32_t i = a.penalty_starts[r]; i < a.penalty_starts[r + 1]; ++i) {
    float score = scores[a.penalty_ids[i]];
    score = score > 0 ? score / a.repetition[r] : score * a.repetition[r];
    score -= a.frequency[r] * float(a.penalty_counts[i]);
    scores[a.penalty_ids[i]] = a.penalty_counts[i] > 0 ? score - a.presence[r] : score;
  }
}

void sample_rows(const void* args, int64_t begin, int64_t end) {
  const auto& a = *static_cast<const cpu::SampleArgs*>(args);
  for (int64_t r = begin; r < end; ++r) {
    Row row{a.scores + r * a.V, a.V, kDropped};
    std::memcpy(row.scores, a.logits + r * a.V, size_t(a.V) * 4);
    penalize(a, r, row.scores);
    for (int32_t i = a.bias_starts[r]; i < a.bias_starts[r + 1]; ++i) row.scores[a.bias_ids[i]] += a.bias_values[i];
    const float temperature = a.temperature[r];
    if (temperature > 0) {
      for (int64_t v = 0; v < a.V; ++v) {
        row.scores[v] /= temperature;
        row.max = row.scores[v] > row.max ? row.scores[v] : row.max;
      }
      if (a.top_k[r] > 0 && a.top_k[r] < a.V) keep_top_k(row, a.top_k[r]);
      if (a.top_p[r] < 1) keep_top_p(row, double(a.top_p[r]));
      if (a.min_p[r] > 0) keep_min_p(row, a.min_p[r]);
    }
    a.tokens[r] = draw(row, a.seeds[r], a.positions[r], temperature == 0);
  }
}

void logprob_rows(const void* args, int64_t begin, int64_t end) {
  const auto& a = *static_cast<const cpu::LogprobsArgs*>(args);
  for (int64_t r = begin; r < end; ++r) {
    const float* logits = a.logits + r * a.V;
    const float chosen = logits[a.tokens[r]];
    float max = kDropped;
    int32_t above = 0;
    for (int64_t v = 0; v < a.V; ++v) {
      max = logits[v] > max ? logits[v] : max;
      above += logits[v] > chosen;
    }
    double sum = 0;
    for (int64_t v = 0; v < a.V; ++v) sum += std::exp(double(logits[v]) - double(max));
    const double log_sum = double(max) + std::log(sum);
    a.chosen[r] = float(double(chosen) - log_sum);
    a.ranks[r] = above + 1;
    for (int64_t k = 0; k < a.K; ++k) {  // the best of those that come after the one before
      const int64_t last = k ? a.top_ids[r * a.K + k - 1] : -1;
      int64_t best = -1;
      for (int64_t v = 0; v < a.V; ++v) {
        const bool after = last < 0 || logits[v] < logits[last] || (logits[v] == logits[last] && v > last);
        if (after && (best < 0 || logits[v] > logits[best])) best = v;
      }
      if (best < 0) best = 0;  // nothing but NaN is left: any id will do, so long as it is one
      a.top_ids[r * a.K + k] = int32_t(best);
      a.top_logprobs[r * a.K + k] = float(double(logits[best]) - log_sum);
    }
  }
}

}  // namespace

namespace cpu {
void VIVACE_ISA(sample)(Pool& pool, const SampleArgs& a) { pool.for_range(a.R, 1, sample_rows, &a); }
void VIVACE_ISA(logprobs)(Pool& pool, const LogprobsArgs& a) { pool.for_range(a.R, 1, logprob_rows, &a); }
}  // namespace cpu
