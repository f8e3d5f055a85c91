// Finds the best scores of a row without sorting it: a bound that few scores reach, those that do, and of these the threshold by
// radix selection on keys that order as the scores do, 8 bits a pass. A row of which too many reach the bound is selected from
// whole.
// Header-only and static, as simd.h is.
#pragma once
#include <cmath>

#include "simd.h"

namespace {

constexpr float kDropped = -__builtin_inff();
constexpr int64_t kChunks = 1024;
constexpr int64_t kMostCandidates = 1 << 15;
constexpr int kHalf = kWidth / 2;

struct Row {
  float* scores;
  int64_t V;
  float max;
};

// The ids of scores that may be among the best, ascending.
struct Candidates {
  int64_t count;  // above kMostCandidates: too many, and none of them is here
  int32_t ids[kMostCandidates + kWidth];
};

// The scores from v on, behind the row's end dropped ones.
inline Vec scores_at(const float* scores, int64_t V, int64_t v) {
  if (V - v >= kWidth) return load(scores + v);
  return lanes() < int32_t(V - v) ? load_first(scores + v, V - v) : broadcast(kDropped);
}

// Orders as the floats do; -0 and 0 are equal.
inline uint32_t key_of(float x) {
  x += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

inline float score_of(uint32_t key) {
  float score;
  const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
  std::memcpy(&score, &bits, 4);
  return score;
}

struct Threshold {
  float score;
  int64_t ties;  // how many of those equal to it are kept: the first
};

// The k-th best of `count` scores.
template <typename ScoreAt>
Threshold select_count(int64_t count, int64_t k, ScoreAt score_at) {
  uint32_t prefix = 0, mask = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    int64_t counts[256] = {};
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t key = key_of(score_at(i));
      if ((key & mask) == prefix) ++counts[(key >> shift) & 255];
    }
    int bucket = 255;
    for (; k > counts[bucket]; --bucket) k -= counts[bucket];
    prefix |= uint32_t(bucket) << shift;
    mask |= 255u << shift;
  }
  return {score_of(prefix), k};
}

// The score at which the best of `count` reach a mass of `missing`, a score's mass being e^(score - max), of which `masses_at`
// gives kHalf from i on.
template <typename ScoreAt, typename MassesAt>
Threshold select_mass(int64_t count, double missing, double max, ScoreAt score_at, MassesAt masses_at) {
  uint32_t prefix = 0, mask = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    double masses[256] = {};
    for (int64_t i = 0; i < count; i += kHalf) {
      const Wide some = masses_at(i);
      for (int64_t j = 0; j < kHalf && i + j < count; ++j) {
        const uint32_t key = key_of(score_at(i + j));
        if ((key & mask) == prefix) masses[(key >> shift) & 255] += some[j];
      }
    }
    int bucket = 255;
    for (; bucket > 0 && missing > masses[bucket]; --bucket) missing -= masses[bucket];
    // Rounding may leave something missing after the last bucket that holds anything: then that one is the last kept.
    while (bucket < 255 && masses[bucket] == 0) ++bucket;
    prefix |= uint32_t(bucket) << shift;
    mask |= 255u << shift;
  }
  const double each = exp_of(Wide{} + (double(score_of(prefix)) - max))[0];
  const double ties = each > 0 ? std::ceil(missing / each) : double(count);
  return {score_of(prefix), ties < 1 ? 1 : int64_t(std::fmin(ties, double(count)))};
}

inline float greatest_of(const float* scores, int64_t V) {
  Vec most = broadcast(kDropped);
  for (int64_t v = 0; v < V; v += kWidth) {
    const Vec score = scores_at(scores, V, v);
    most = score > most ? score : most;
  }
  return greatest(most);
}

// What at least k scores reach: the k-th of the best ones of chunks. Minus infinity if there are fewer chunks than that.
inline float bound_of(const float* scores, int64_t V, int64_t k) {
  float best[kChunks];
  int64_t size = (V + kChunks - 1) / kChunks;
  size = size < 4 * kWidth ? 4 * kWidth : size;
  const int64_t count = (V + size - 1) / size;
  if (k > count) return kDropped;
  for (int64_t i = 0; i < count; ++i)
    best[i] = greatest_of(scores + i * size, V - i * size < size ? V - i * size : size);
  return select_count(count, k, [&](int64_t i) { return best[i]; }).score;
}

// Collects the ids whose scores reach the bound.
inline void gather(Candidates& found, const float* scores, int64_t V, float bound) {
  found.count = 0;
  for (int64_t v = 0; v < V; v += kWidth) {
    const Ints reaches = scores_at(scores, V, v) >= broadcast(bound);
    if (!any(reaches)) continue;
#if defined(__AVX512F__)
    const __mmask16 mask = _mm512_movepi32_mask((__m512i)reaches);
    _mm512_storeu_si512(found.ids + found.count, _mm512_maskz_compress_epi32(mask, (__m512i)(lanes() + int32_t(v))));
    found.count += __builtin_popcount(mask);
#else
    for (int i = 0; i < kWidth; ++i)
      if (reaches[i]) found.ids[found.count++] = int32_t(v) + i;
#endif
    if (found.count > kMostCandidates) return;
  }
  while (found.count > 0 && found.ids[found.count - 1] >= V) --found.count;  // a bound of minus infinity: what is behind the end
}

}  // namespace
