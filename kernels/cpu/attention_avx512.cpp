// Attention over the paged cache, 12 (row, query head) pairs of one request and KV head at a time: K and V of a split are read
// from the cache once for all of them. Threads split tiles of pairs.
//
// Bound by FMA in prefill, by reading K and V in decode. A pair's order of additions does not depend on its tile: scores add up
// over d, values over positions, each in one chain; what a pair does not see has the weight 0, and adding it changes nothing.
#include <immintrin.h>

#include "attention.h"

namespace {

constexpr int kPairs = 12;
constexpr int kValuePairs = 6;    // 24 sums of values, 4 of V
constexpr int64_t kVector = 16;
constexpr int64_t kPiece = 4 * kVector;  // of a head, whose sums stay in registers

struct Tile {
  const cpu::AttentionArgs& a;
  const int32_t* table;
  int64_t g;
  int count;
  const float* q[kPairs];
  Range range[kPairs];
  float* out[kPairs];
  int64_t head[kPairs];
};

struct Scores {
  alignas(64) float p[kPairs][kSplit];  // by position in the split
};

inline __mmask16 first_lanes(int64_t count) { return __mmask16(count >= 16 ? 0xffff : (1u << count) - 1); }

// q . K of up to 16 positions of a block, from position i on, for R pairs.
template <int R>
void score(const Tile& tile, Scores& s, int first, const float* k, int64_t place, __mmask16 lanes) {
  const cpu::AttentionArgs& a = tile.a;
  __m512 sums[R];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) sums[r] = _mm512_setzero_ps();
  for (int64_t d = 0; d < a.D; ++d) {
    const __m512 column = _mm512_maskz_loadu_ps(lanes, k + d * a.S);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) sums[r] = _mm512_fmadd_ps(_mm512_set1_ps(tile.q[first + r][d]), column, sums[r]);
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) _mm512_mask_storeu_ps(s.p[first + r] + place, lanes, sums[r]);
}

// Scores of positions begin..end-1 for all pairs; a pair that does not see one gets what is there.
void scores(const Tile& tile, Scores& s, int64_t begin, int64_t end) {
  const cpu::AttentionArgs& a = tile.a;
  for (int64_t i = begin, next; i < end; i = next) {
    next = std::min({(i / a.S + 1) * a.S, end, i + kVector});
    const float* k = block_of(a, tile.table, i, tile.g) + i % a.S;
    const __mmask16 lanes = first_lanes(next - i);
    int r = 0;
    if (tile.count == kPairs) score<kPairs>(tile, s, 0, k, i % kSplit, lanes), r = kPairs;
    for (; r + 4 <= tile.count; r += 4) score<4>(tile, s, r, k, i % kSplit, lanes);
    for (; r < tile.count; ++r) score<1>(tile, s, r, k, i % kSplit, lanes);
  }
}

// From scores to weights: 0 outside begin..end-1, which are places in the split.
void weigh(const cpu::AttentionArgs& a, float* p, State& state, int64_t begin, int64_t end) {
  const float none = -__builtin_inff();
  std::fill(p, p + begin, none);
  std::fill(p + end, p + kSplit, none);
  const int64_t from = begin / kVector * kVector, to = (end + kVector - 1) / kVector * kVector;
  __m512 most = _mm512_set1_ps(none);
  for (int64_t i = from; i < to; i += kVector) {
    for (int64_t j = i; j < i + kVector; ++j) {
      const float scaled = p[j] * a.scale;
      p[j] = a.softcap > 0 ? a.softcap * tanh_poly(scaled / a.softcap) : scaled;
    }
    if (a.softcap > 0) {  // which would make a number of what is not seen
      std::fill(p + i, p + std::max(i, std::min(i + kVector, begin)), none);
      std::fill(p + std::min(i + kVector, std::max(i, end)), p + i + kVector, none);
    }
    most = _mm512_max_ps(most, _mm512_load_ps(p + i));
  }
  state.max = _mm512_reduce_max_ps(most);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = from; i < to; i += kVector) {
    for (int64_t j = i; j < i + kVector; ++j) p[j] = exp_poly(p[j] - state.max);
    sum = _mm512_add_ps(sum, _mm512_load_ps(p + i));
  }
  state.sum = _mm512_reduce_add_ps(sum);
  std::fill(p, p + from, 0.0f);
  std::fill(p + to, p + kSplit, 0.0f);
}

// p . V over positions begin..end-1 for R pairs and C vectors of a head, the last one masked.
template <int R, int C>
void values(const Tile& tile, const Scores& s, State* states, int first, int64_t d, __mmask16 last, int64_t begin,
            int64_t end) {
  const cpu::AttentionArgs& a = tile.a;
  const int64_t v_offset = a.G * a.S * a.D + d;
  __m512 sums[R][C];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sums[r][c] = _mm512_setzero_ps();
  for (int64_t i = begin, next; i < end; i = next) {
    next = std::min((i / a.S + 1) * a.S, end);
    const float* v = block_of(a, tile.table, i, tile.g) + v_offset + i % a.S * a.D;
    for (int64_t j = i; j < next; ++j, v += a.D) {
      __m512 row[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) row[c] = _mm512_maskz_loadu_ps(c == C - 1 ? last : 0xffff, v + c * kVector);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const __m512 weight = _mm512_set1_ps(s.p[first + r][j % kSplit]);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) sums[r][c] = _mm512_fmadd_ps(weight, row[c], sums[r][c]);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
      _mm512_mask_storeu_ps(states[first + r].acc + d + c * kVector, c == C - 1 ? last : 0xffff, sums[r][c]);
}

template <int R>
void values_of(const Tile& tile, const Scores& s, State* states, int first, int64_t begin, int64_t end) {
  for (int64_t d = 0; d < tile.a.D; d += kPiece) {
    const int64_t left = std::min(tile.a.D - d, kPiece);
    const __mmask16 last = first_lanes((left - 1) % kVector + 1);
    switch ((left - 1) / kVector) {
      case 0: values<R, 1>(tile, s, states, first, d, last, begin, end); break;
      case 1: values<R, 2>(tile, s, states, first, d, last, begin, end); break;
      case 2: values<R, 3>(tile, s, states, first, d, last, begin, end); break;
      default: values<R, 4>(tile, s, states, first, d, last, begin, end);
    }
  }
}

void attend(const Tile& tile) {
  const cpu::AttentionArgs& a = tile.a;
  Scores s;
  State total[kPairs], next[kPairs];
  bool has_any[kPairs] = {};
  int64_t begin = tile.range[0].first, end = 0;
  for (int r = 0; r < tile.count; ++r) {
    begin = std::min(begin, tile.range[r].first);
    end = std::max(end, tile.range[r].visible);
  }
  for (int64_t split = begin / kSplit * kSplit; split < end; split += kSplit) {
    const int64_t from = std::max(begin, split), to = std::min(end, split + kSplit);
    scores(tile, s, from, to);
    for (int r = 0; r < tile.count; ++r) {
      const int64_t low = std::max(tile.range[r].first, split), high = std::min(tile.range[r].visible, to);
      if (low < high)
        weigh(a, s.p[r], next[r], low - split, high - split);
      else
        std::fill(s.p[r], s.p[r] + kSplit, 0.0f);
    }
    int r = 0;
    for (; r + kValuePairs <= tile.count; r += kValuePairs) values_of<kValuePairs>(tile, s, next, r, from, to);
    for (; r + 2 <= tile.count; r += 2) values_of<2>(tile, s, next, r, from, to);
    for (; r < tile.count; ++r) values_of<1>(tile, s, next, r, from, to);
    for (r = 0; r < tile.count; ++r) {
      if (std::max(tile.range[r].first, split) >= std::min(tile.range[r].visible, to)) continue;
      if (has_any[r]) {
        join(total[r], next[r], a.D);
        continue;
      }
      total[r].max = next[r].max;
      total[r].sum = next[r].sum;
      std::memcpy(total[r].acc, next[r].acc, size_t(a.D) * 4);
      has_any[r] = true;
    }
  }
  for (int r = 0; r < tile.count; ++r) {
    if (a.sinks) add_sink(total[r], a.sinks[tile.head[r]], a.D);
    for (int64_t d = 0; d < a.D; ++d) tile.out[r][d] = total[r].acc[d] / total[r].sum;
  }
}

// Item i is one KV head's pairs, 12 at a time, of a stretch of rows; `begin..end-1` of all stretches.
void items(const void* args, int64_t begin, int64_t end) {
  const auto& a = *static_cast<const cpu::AttentionArgs*>(args);
  const int64_t heads = a.H / a.G;
  int64_t item = 0;
  for (int64_t b = 0; b < a.B; ++b) {
    const int64_t first = a.query_starts[b], pairs = (a.query_starts[b + 1] - first) * heads;
    const int64_t tiles = (pairs + kPairs - 1) / kPairs;
    for (int64_t g = 0; g < a.G; ++g)
      for (int64_t i = 0; i < tiles; ++i, ++item) {
        if (item < begin || item >= end) continue;
        // The later rows see more: early and late tiles take turns, so that threads get as much of both.
        const int64_t place = i % 2 == 0 ? i / 2 : tiles - 1 - i / 2;
        Tile tile{a, a.block_tables + b * a.X, g, int(std::min<int64_t>(kPairs, pairs - place * kPairs)), {}, {}, {}, {}};
        for (int r = 0; r < tile.count; ++r) {
          const int64_t pair = place * kPairs + r, t = first + pair / heads, h = g * heads + pair % heads;
          tile.q[r] = a.q + (t * a.H + h) * a.D;
          tile.out[r] = a.out + (t * a.H + h) * a.D;
          tile.range[r] = range_of(a, b, t);
          tile.head[r] = h;
        }
        attend(tile);
      }
  }
}

}  // namespace

void cpu::attention_avx512(Pool& pool, const AttentionArgs& a) {
  const int64_t heads = a.H / a.G;
  int64_t count = 0;
  for (int64_t b = 0; b < a.B; ++b)
    count += a.G * ((int64_t(a.query_starts[b + 1] - a.query_starts[b]) * heads + kPairs - 1) / kPairs);
  const int64_t used = a.B > 0 ? a.query_starts[a.B] : 0;
  std::memset(a.out + used * a.H * a.D, 0, size_t((a.T - used) * a.H * a.D) * 4);  // rows of nobody
  pool.for_range(count, 1, items, &a);
}
