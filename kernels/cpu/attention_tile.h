// Attention of one tile: up to 24 pairs (row, query head) of one request that share a KV head: K and V of a
// split are read from the cache once for all of them.
//
// Positions are added up in splits of 256 counted from position 0: a split has its own maximum, sum and weighted values; splits
// are joined in order to groups of 8, groups to the result. Scores add up over d, values over positions, each in one chain; what
// a pair does not see weighs 0, and adding that changes nothing. So a row's result depends on its own context alone: not on the
// other rows, not on where a chunk began, not on which blocks it has, not on which thread had which group.
//
// Of a selection (kernels/selection.py) all of this holds for the positions of its units laid side by side.
#pragma once
#include <algorithm>
#include <utility>

#include "kv.h"
#include "math.h"
#include "ops.h"
#include "simd.h"

namespace {

constexpr int64_t kSplit = 256;  // kernels.attention.SPLIT_TOKENS
constexpr int64_t kGroup = 8 * kSplit;
constexpr int64_t kMaxD = 1024;  // checked by kernels/attention/cpu.py
constexpr int kPairs = 24;
constexpr int kRows = kWidth == 16 ? 12 : 6;     // of these, whose sums with two vectors of K stay in registers,
constexpr int kValueRows = 6;                    // or with so many vectors of V
constexpr int kColumns = kWidth == 16 ? 4 : 2;
constexpr int64_t kFewRuns = 2;
constexpr float kLowest = -__builtin_inff();

struct State {
  float max, sum;  // sum 0: of nothing
};

struct Tile {
  const int32_t* table;
  const int32_t* units;  // the selected ones; null: positions are those of the request
  int64_t b, g, first_pair, count, begin, end;  // the positions that any pair sees
};

// Up to kWidth positions of one block: `first..last-1` of the split.
template <typename Element>
struct Run {
  const Element *k, *v;
  const uint8_t *k_scales, *v_scales;  // of int8
  int64_t first, last;
};

// What a thread has of a tile.
template <typename Element>
struct Work {
  alignas(64) float p[kPairs * kSplit];  // scores, then weights
  alignas(64) float q[kMaxD * kPairs];   // with the scale in it
  alignas(64) float split_acc[kPairs * kMaxD];
  alignas(64) float group_acc[kPairs * kMaxD];
  alignas(64) float total_acc[kPairs * kMaxD];
  State split[kPairs], group[kPairs], total[kPairs];
  int64_t low[kPairs], high[kPairs];  // the positions that a pair sees
  alignas(64) float v_scales[kSplit];  // of int8
  Run<Element> runs[2][kSplit + 1];
};

inline Vec scales_at(const uint8_t* p, int64_t count) {
  Vec v = {};
  std::memcpy(&v, p, size_t(count) * 4);
  return v;
}

// q . K of two runs for R pairs. `ahead` is where K or V are read soon.
template <int R, typename Element>
void score(const cpu::AttentionArgs& a, const float* q, float* p, const Run<Element>* runs,
           const Element* const* ahead) {
  Vec sums[R][2];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = Vec{};
  const Element *k0 = runs[0].k, *k1 = runs[1].k, *next0 = ahead[0], *next1 = ahead[1];
  const int64_t count0 = runs[0].last - runs[0].first, count1 = runs[1].last - runs[1].first;
  const auto step = [&](int64_t d, Vec v0, Vec v1) __attribute__((always_inline)) {
    __builtin_prefetch(next0 + d * a.S);
    __builtin_prefetch(next1 + d * a.S);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const Vec one = broadcast(q[d * kPairs + r]);
      sums[r][0] = fma(one, v0, sums[r][0]);
      sums[r][1] = fma(one, v1, sums[r][1]);
    }
  };
  if (count0 == kWidth && count1 == kWidth) {
    for (int64_t d = 0; d < a.D; ++d) step(d, load_any(k0 + d * a.S), load_any(k1 + d * a.S));
  } else {
    for (int64_t d = 0; d < a.D; ++d)
      step(d, load_any_first(k0 + d * a.S, count0), load_any_first(k1 + d * a.S, count1));
  }
  if constexpr (Kv<Element>::kHasScales) {
    const Vec scale0 = scales_at(runs[0].k_scales, count0), scale1 = scales_at(runs[1].k_scales, count1);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) sums[r][0] *= scale0, sums[r][1] *= scale1;
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    store_first(p + r * kSplit + runs[0].first, sums[r][0], count0);
    store_first(p + r * kSplit + runs[1].first, sums[r][1], count1);
  }
}

// Runs whose values are added up at a time. Where all rows are met at once, in decode, they are few: then a row that has more
// vectors than registers hold comes from memory once.
template <typename Element>
struct Few {
  const Run<Element> *end, *last;  // of these, and of the split
  const Element* after;            // what is read after the split
  bool is_first;
};

// p . V over some runs for R pairs and C vectors of a head, of which `left` elements are there.
template <int R, int C, typename Element>
void values(const cpu::AttentionArgs& a, const float* p, float* acc, const Run<Element>* run, const Few<Element>& few,
            int64_t d) {
  Vec sums[R][C];
  const int64_t left = a.D - d;
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
      sums[r][c] = few.is_first ? Vec{} : load_first(acc + r * a.D + d + c * kWidth, c == C - 1 ? left - c * kWidth : kWidth);
  const auto rows = [&](auto load_last) __attribute__((always_inline)) {
    for (; run < few.end; ++run) {
      const Element* v = run->v + d;
      const Element* next = run + 2 < few.last ? run[2].v + d : few.after;
      for (int64_t i = run->first; i < run->last; ++i, v += a.D, next += a.D) {
        Vec row[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
          row[c] = c == C - 1 ? load_last(v + c * kWidth) : load_any(v + c * kWidth);
          __builtin_prefetch(next + c * kWidth);
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
          const Vec weight = broadcast(p[r * kSplit + i]);
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) sums[r][c] = fma(weight, row[c], sums[r][c]);
        }
      }
    }
  };
  if (left >= C * kWidth) {
    rows([](const Element* x) { return load_any(x); });
  } else {
    rows([left](const Element* x) { return load_any_first(x, left - (C - 1) * kWidth); });
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
      store_first(acc + r * a.D + d + c * kWidth, sums[r][c], c == C - 1 ? left - c * kWidth : kWidth);
}

template <int R, typename Element, int C = kColumns>
void values_of(const cpu::AttentionArgs& a, const float* p, float* acc, const Run<Element>* run,
               const Few<Element>& few, int64_t d) {
  if constexpr (C > 1) {
    if (a.D - d <= (C - 1) * kWidth) return values_of<R, Element, C - 1>(a, p, acc, run, few, d);
  }
  values<R, C>(a, p, acc, run, few, d);
}

template <typename Element, size_t... R>
inline auto score_for(int64_t rows, std::index_sequence<R...>) {
  static constexpr decltype(&score<1, Element>) kAll[] = {score<int(R) + 1, Element>...};
  return kAll[rows - 1];
}

template <typename Element, size_t... R>
inline auto values_for(int64_t rows, std::index_sequence<R...>) {
  static constexpr decltype(&values_of<1, Element>) kAll[] = {values_of<int(R) + 1, Element>...};
  return kAll[rows - 1];
}

// The runs of positions begin..end-1 of one split, and one more that is the last again. Returns how many there are.
template <typename Element>
int64_t find_runs(const cpu::AttentionArgs& a, const Tile& tile, Run<Element>* runs, int64_t begin, int64_t end) {
  const Kv<Element> kv{a.G, a.S, a.D};
  const uint8_t* cache = static_cast<const uint8_t*>(a.kv_cache);
  const int64_t side_by_side = tile.units ? unit_tokens(a.S) : a.S;
  int64_t count = 0;
  for (int64_t i = begin, next; i < end; i = next) {
    const int64_t within = i % side_by_side;
    const int64_t position = tile.units ? tile.units[i / side_by_side] * side_by_side + within : i;
    const int64_t offset = position % a.S;
    next = std::min({i - within + side_by_side, i - offset % kWidth + kWidth, end});
    const uint8_t* k = kv.plane(cache, tile.table[position / a.S], 0, tile.g);
    const uint8_t* v = kv.plane(cache, tile.table[position / a.S], 1, tile.g);
    const int64_t first = i % kSplit;
    runs[count++] = {reinterpret_cast<const Element*>(k) + offset, reinterpret_cast<const Element*>(v) + offset * a.D,
                     kv.scales(k) + offset * 4, kv.scales(v) + offset * 4, first, first + (next - i)};
  }
  if (count > 0) runs[count] = runs[count - 1];
  return count;
}

// From scores to weights of one pair: 0 outside low..high-1, which are places in the split.
State weigh(float* p, float softcap, int64_t low, int64_t high) {
  const int64_t from = low / kWidth * kWidth, to = (high + kWidth - 1) / kWidth * kWidth;
  const auto hide = [&](int64_t i) {
    const Ints place = lanes() + int32_t(i);
    store(p + i, (place >= int32_t(low)) & (place < int32_t(high)) ? load(p + i) : broadcast(kLowest));
  };
  hide(from);
  hide(to - kWidth);
  if (softcap > 0)
    for (int64_t i = from; i < to; ++i) p[i] = p[i] == kLowest ? kLowest : softcap * tanh_poly(p[i] / softcap);
  Vec most = load(p + from), sum = {};
  for (int64_t i = from + kWidth; i < to; i += kWidth) {
    const Vec score = load(p + i);
    most = most > score ? most : score;
  }
  const float max = greatest(most);
  for (int64_t i = from; i < to; i += kWidth) {
    const Vec weight = exp_of(load(p + i) - max);
    store(p + i, weight);
    sum += weight;
  }
  std::memset(p, 0, size_t(from) * 4);
  std::memset(p + to, 0, size_t(kSplit - to) * 4);
  return {max, add_all(sum)};
}

// Adds `next` to `total`.
inline void join(State& total, float* total_acc, const State& next, const float* next_acc, int64_t D) {
  if (next.sum == 0) return;
  if (total.sum == 0) {
    total = next;
    std::memcpy(total_acc, next_acc, size_t(D) * 4);
    return;
  }
  const float max = std::max(total.max, next.max);
  const float keep = exp_poly(total.max - max), take = exp_poly(next.max - max);
  for (int64_t d = 0; d < D; ++d) total_acc[d] = total_acc[d] * keep + next_acc[d] * take;
  total = {max, total.sum * keep + next.sum * take};
}

// The scores of a tile with one split: into w.p.
template <typename Element>
void score_split(const cpu::AttentionArgs& a, const Tile& tile, Work<Element>& w, const Run<Element>* runs,
                 int64_t num_runs) {
  for (int64_t i = 0; i < num_runs; i += 2) {
    for (int64_t r = 0, rows; r < tile.count; r += rows) {
      rows = tile.count - r > kRows && tile.count - r < 2 * kRows ? (tile.count - r + 1) / 2
                                                                  : std::min<int64_t>(tile.count - r, kRows);
      const Element* ahead[2];
      for (int64_t j = 0; j < 2; ++j) {
        const int64_t soon = i + j + 2;
        ahead[j] = soon < num_runs ? runs[soon].k : runs[std::min(soon - num_runs, num_runs - 1)].v;
      }
      score_for<Element>(rows, std::make_index_sequence<kRows>())(a, w.q + r, w.p + r * kSplit, runs + i, ahead);
    }
  }
}

// One split of a tile: into w.split and w.split_acc. `next` is the first run of the split after it.
template <typename Element>
void attend_split(const cpu::AttentionArgs& a, const Tile& tile, Work<Element>& w, const Run<Element>* runs,
                  int64_t num_runs, const Run<Element>& next, int64_t split) {
  score_split(a, tile, w, runs, num_runs);
  if constexpr (Kv<Element>::kHasScales) {
    std::memset(w.v_scales, 0, sizeof w.v_scales);
    for (int64_t i = 0; i < num_runs; ++i)
      std::memcpy(w.v_scales + runs[i].first, runs[i].v_scales, size_t(runs[i].last - runs[i].first) * 4);
  }
  for (int64_t r = 0; r < tile.count; ++r) {
    const int64_t low = std::max(w.low[r], split) - split, high = std::min(w.high[r], split + kSplit) - split;
    w.split[r] = {kLowest, 0};
    if (low < high)
      w.split[r] = weigh(w.p + r * kSplit, a.softcap, low, high);
    else
      std::memset(w.p + r * kSplit, 0, size_t(kSplit) * 4);
    if constexpr (Kv<Element>::kHasScales)
      for (int64_t i = 0; i < kSplit; ++i) w.p[r * kSplit + i] *= w.v_scales[i];
  }
  for (int64_t r = 0, rows; r < tile.count; r += rows) {
    rows = tile.count - r > kValueRows && tile.count - r < 2 * kValueRows
               ? (tile.count - r + 1) / 2
               : std::min<int64_t>(tile.count - r, kValueRows);
    const auto add_up = values_for<Element>(rows, std::make_index_sequence<kValueRows>());
    const int64_t together = tile.count > kValueRows ? num_runs : kFewRuns;
    for (int64_t i = 0; i < num_runs; i += together) {
      const Few<Element> few{runs + std::min(i + together, num_runs), runs + num_runs, next.k, i == 0};
      for (int64_t d = 0; d < a.D; d += kColumns * kWidth)
        add_up(a, w.p + r * kSplit, w.split_acc + r * a.D, runs + i, few, d);
    }
  }
}

// The positions begin..end-1 of one group: into w.group and w.group_acc.
template <typename Element>
void attend_group(const cpu::AttentionArgs& a, const Tile& tile, Work<Element>& w, int64_t begin, int64_t end) {
  for (int64_t r = 0; r < tile.count; ++r) w.group[r] = {kLowest, 0};
  int side = 0;
  int64_t split = begin / kSplit * kSplit, to = std::min(split + kSplit, end);
  int64_t num_runs = find_runs(a, tile, w.runs[0], begin, to);
  while (num_runs > 0) {
    const int64_t next_to = std::min(to + kSplit, end);
    const int64_t next_runs = find_runs(a, tile, w.runs[1 - side], to, next_to);
    const Run<Element>& next = next_runs > 0 ? w.runs[1 - side][0] : w.runs[side][0];
    attend_split(a, tile, w, w.runs[side], num_runs, next, split);
    for (int64_t r = 0; r < tile.count; ++r)
      join(w.group[r], w.group_acc + r * a.D, w.split[r], w.split_acc + r * a.D, a.D);
    side = 1 - side;
    split += kSplit;
    to = next_to;
    num_runs = next_runs;
  }
}

// Where a pair of a tile is in q and out.
inline int64_t row_of(const cpu::AttentionArgs& a, const Tile& tile, int64_t r) {
  const int64_t heads = a.H / a.G, pair = tile.first_pair + r;
  return (a.query_starts[tile.b] + pair / heads) * a.H + tile.g * heads + pair % heads;
}

template <typename Element>
void begin_tile(const cpu::AttentionArgs& a, const Tile& tile, Work<Element>& w) {
  for (int64_t r = 0; r < tile.count; ++r) {
    const int64_t row = row_of(a, tile, r);
    for (int64_t d = 0; d < a.D; ++d) w.q[d * kPairs + r] = a.q[row * a.D + d] * a.scale;
    w.high[r] = tile.units ? tile.end : a.context_lens[tile.b] - (a.query_starts[tile.b + 1] - row / a.H) + 1;
    w.low[r] = a.window > 0 ? std::max<int64_t>(0, w.high[r] - a.window) : 0;
    w.total[r] = {kLowest, 0};
  }
}

// A sink is a logit without a value.
template <typename Element>
void end_tile(const cpu::AttentionArgs& a, const Tile& tile, Work<Element>& w) {
  for (int64_t r = 0; r < tile.count; ++r) {
    const int64_t row = row_of(a, tile, r);
    const State& total = w.total[r];
    float keep = 1, sum = total.sum;
    if (a.sinks) {
      const float sink = a.sinks[row % a.H], max = std::max(total.max, sink);
      keep = exp_poly(total.max - max);
      sum = sum * keep + exp_poly(sink - max);
    }
    for (int64_t d = 0; d < a.D; ++d) a.out[row * a.D + d] = w.total_acc[r * a.D + d] * keep / sum;
  }
}

}  // namespace
