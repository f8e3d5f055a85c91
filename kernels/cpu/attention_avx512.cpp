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
  Range range[kPairs];
  float* out[kPairs];
  int64_t head[kPairs];
};

struct Scores {
  alignas(64) float p[kPairs][kSplit];  // by position in the split
  float q[kMaxD][kPairs];               // of the tile, with the scale in it
};

inline __mmask16 first_lanes(int64_t count) { return __mmask16(count >= 16 ? 0xffff : (1u << count) - 1); }

// q . K of up to 16 positions of a block, from position i on, for R pairs.
template <int R>
void score(const cpu::AttentionArgs& a, Scores& s, const float* k, int64_t place, __mmask16 lanes) {
  __m512 sums[R];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) sums[r] = _mm512_setzero_ps();
  for (int64_t d = 0; d < a.D; ++d) {
    const __m512 column = _mm512_maskz_loadu_ps(lanes, k + d * a.S);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) sums[r] = _mm512_fmadd_ps(_mm512_set1_ps(s.q[d][r]), column, sums[r]);
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) _mm512_mask_storeu_ps(s.p[r] + place, lanes, sums[r]);
}

using Score = void(const cpu::AttentionArgs&, Scores&, const float*, int64_t, __mmask16);
constexpr Score* kScore[kPairs + 1] = {nullptr,  score<1>, score<2>, score<3>,  score<4>,  score<5>, score<6>,
                                       score<7>, score<8>, score<9>, score<10>, score<11>, score<12>};

// Scores of positions begin..end-1 for all pairs; a pair that does not see one gets what is there.
void scores(const Tile& tile, Scores& s, int64_t begin, int64_t end) {
  const cpu::AttentionArgs& a = tile.a;
  for (int64_t i = begin, next; i < end; i = next) {
    next = std::min({(i / a.S + 1) * a.S, end, i + kVector});
    const float* k = block_of(a, tile.table, i, tile.g) + i % a.S;
    kScore[tile.count](a, s, k, i % kSplit, first_lanes(next - i));
  }
}

// e^x as math.h has it, 16 at a time.
inline __m512 exp16(__m512 x) {
  const __m512 round = _mm512_set1_ps(12582912.0f);
  const __m512 clamped = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
  const __m512 shifted = _mm512_fmadd_ps(clamped, _mm512_set1_ps(1.44269504088896341f), round);
  const __m512 n = _mm512_sub_ps(shifted, round);
  const __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f),
                                   _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), clamped));
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(p, r), r, r), _mm512_set1_ps(1.0f));
  const __m512i power = _mm512_slli_epi32(_mm512_add_epi32(_mm512_castps_si512(shifted), _mm512_set1_epi32(127)), 23);
  const __mmask16 is_more = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);  // a NaN stays one
  return _mm512_maskz_mul_ps(is_more, p, _mm512_castsi512_ps(power));
}

// From scores to weights: 0 outside begin..end-1, which are places in the split.
void weigh(const cpu::AttentionArgs& a, float* p, State& state, int64_t begin, int64_t end) {
  const int64_t from = begin / kVector * kVector, to = (end + kVector - 1) / kVector * kVector;
  const __m512 none = _mm512_set1_ps(-__builtin_inff());
  const auto seen = [&](int64_t i) { return __mmask16(first_lanes(end - i) & ~(i < begin ? (1u << (begin - i)) - 1 : 0)); };
  __m512 most = none;
  for (int64_t i = from; i < to; i += kVector) {
    if (a.softcap > 0)
      for (int64_t j = i; j < i + kVector; ++j) p[j] = a.softcap * tanh_poly(p[j] / a.softcap);
    const __m512 score = _mm512_mask_loadu_ps(none, seen(i), p + i);
    _mm512_store_ps(p + i, score);
    most = _mm512_max_ps(most, score);
  }
  const float max = _mm512_reduce_max_ps(most);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = from; i < to; i += kVector) {
    const __m512 weight = exp16(_mm512_sub_ps(_mm512_load_ps(p + i), _mm512_set1_ps(max)));
    _mm512_store_ps(p + i, weight);
    sum = _mm512_add_ps(sum, weight);
  }
  for (int64_t i = 0; i < from; i += kVector) _mm512_store_ps(p + i, _mm512_setzero_ps());
  for (int64_t i = to; i < kSplit; i += kVector) _mm512_store_ps(p + i, _mm512_setzero_ps());
  state.max = max;
  state.sum = _mm512_reduce_add_ps(sum);
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

using Values = void(const Tile&, const Scores&, State*, int, int64_t, int64_t);
constexpr Values* kValues[kValuePairs + 1] = {nullptr,      values_of<1>, values_of<2>, values_of<3>,
                                              values_of<4>, values_of<5>, values_of<6>};

void attend(const Tile& tile, const float* const* rows) {
  const cpu::AttentionArgs& a = tile.a;
  Scores s;
  for (int r = 0; r < tile.count; ++r)
    for (int64_t d = 0; d < a.D; ++d) s.q[d][r] = rows[r][d] * a.scale;
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
    const int half = tile.count > kValuePairs ? (tile.count + 1) / 2 : tile.count;
    kValues[half](tile, s, next, 0, from, to);
    if (half < tile.count) kValues[tile.count - half](tile, s, next, half, from, to);
    for (int r = 0; r < tile.count; ++r) {
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
        Tile tile{a, a.block_tables + b * a.X, g, int(std::min<int64_t>(kPairs, pairs - place * kPairs)), {}, {}, {}};
        const float* rows[kPairs];
        for (int r = 0; r < tile.count; ++r) {
          const int64_t pair = place * kPairs + r, t = first + pair / heads, h = g * heads + pair % heads;
          rows[r] = a.q + (t * a.H + h) * a.D;
          tile.out[r] = a.out + (t * a.H + h) * a.D;
          tile.range[r] = range_of(a, b, t);
          tile.head[r] = h;
        }
        attend(tile, rows);
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
