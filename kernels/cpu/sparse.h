// What selects the units of block-sparse decode: their metadata, scores, and the choice. kernels/selection.py says what a unit is.
//
// Threads take units of the cache, or (request, KV head), each of which is one thread's: the same bits whatever their number.
// A score reads a unit's metadata, 4 D bytes, once for up to eight query heads: bound by memory. A step without sparse requests
// wakes no thread.
#pragma once
#include <algorithm>
#include <cmath>

#include "kv.h"
#include "ops.h"
#include "simd.h"

namespace {

constexpr int64_t kSinkUnits = 1, kRecentUnits = 4;  // kernels/selection.py
constexpr int64_t kMaxD = 1024;                      // checked by kernels/block_score/cpu.py
constexpr int64_t kMostWidth = 2 * kMaxD;            // of mean and deviation
constexpr int kMostHeads = 8;                        // query heads that are scored at a time
constexpr int64_t kChunk = 1 << 13;                  // units whose scores are kept between the passes over them

// Whether a request selects in this layer.
template <typename Args>
bool is_sparse(const Args& a, int64_t b) {
  const int64_t U = unit_tokens(a.S), num_units = (a.context_lens[b] + U - 1) / U;
  return a.layer >= a.dense_layers[b] && a.budgets[b] > 0 && a.budgets[b] < num_units;
}

template <typename Args>
int64_t count_sparse(const Args& a) {
  int64_t count = 0;
  for (int64_t b = 0; b < a.B; ++b) count += is_sparse(a, b);
  return count;
}

// Calls `visit` with request and KV head for items begin..end-1, of which each sparse request has G.
template <typename Args, typename Visit>
void each_head(const Args& a, int64_t begin, int64_t end, Visit visit) {
  for (int64_t b = 0, first = 0; b < a.B && first < end; ++b) {
    if (!is_sparse(a, b)) continue;
    for (int64_t g = std::max<int64_t>(0, begin - first); g < std::min(a.G, end - first); ++g) visit(b, g);
    first += a.G;
  }
}

// Mean and deviation of one channel over a unit: `k` are its U elements.
template <typename Element>
void summarize(const Element* k, const uint8_t* scales, int64_t U, float* mean, float* std) {
  const auto at = [&](int64_t i) {
    Vec v = load_any_first(k + i, U - i);
    if constexpr (Kv<Element>::kHasScales) {
      Vec scale = {};
      std::memcpy(&scale, scales + i * 4, size_t(std::min<int64_t>(U - i, kWidth)) * 4);
      v *= scale;
    }
    return v;
  };
  Vec sum = {}, squares = {};
  for (int64_t i = 0; i < U; i += kWidth) sum += at(i);
  *mean = add_all(sum) / float(U);
  for (int64_t i = 0; i < U; i += kWidth) {
    const Vec off = at(i) - *mean;
    squares += lanes() < int32_t(U - i) ? off * off : Vec{};
  }
  *std = std::sqrt(add_all(squares) / float(U));
}

template <typename Element>
void update_units(const void* args, int64_t begin, int64_t end) {
  const auto& a = *static_cast<const cpu::BlockMetaUpdateArgs*>(args);
  const Kv<Element> kv{a.G, a.S, a.D};
  const uint8_t* cache = static_cast<const uint8_t*>(a.kv_cache);
  const int64_t U = unit_tokens(a.S);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t unit = a.units[i];
    if (unit < 0) continue;
    const int64_t first = unit * U % a.S;
    for (int64_t g = 0; g < a.G; ++g) {
      const uint8_t* plane = kv.plane(cache, unit * U / a.S, 0, g);
      const Element* k = reinterpret_cast<const Element*>(plane) + first;
      const uint8_t* scales = kv.scales(plane) + first * 4;
      uint16_t* meta = a.meta + (unit * a.G + g) * 2 * a.D;
      for (int64_t d = 0; d < a.D; ++d) {
        float mean, std;
        summarize(k + d * a.S, scales, U, &mean, &std);
        to_element(meta[d], mean, 1);
        to_element(meta[a.D + d], std, 1);
      }
    }
  }
}

// Products of R rows of q with U units, both `width` elements: out[r * kChunk + u]. `ahead` is what is read soon.
template <int R, int U>
void score_units(const float* q, const uint16_t* const* units, const uint16_t* const* ahead, int64_t width, float* out) {
  Vec sums[R * U];
#pragma GCC unroll 16
  for (int i = 0; i < R * U; ++i) sums[i] = Vec{};
  const auto step = [&](int64_t d, auto load_unit) __attribute__((always_inline)) {
    Vec of_unit[U];
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      of_unit[u] = load_unit(units[u] + d);
      __builtin_prefetch(ahead[u] + d);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec row = load(q + r * kMostWidth + d);
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) sums[r * U + u] = fma(row, of_unit[u], sums[r * U + u]);
    }
  };
  int64_t d = 0;
  for (; d + kWidth <= width; d += kWidth) step(d, [](const uint16_t* p) { return load_any(p); });
  if (d < width) step(d, [&](const uint16_t* p) { return load_any_first(p, width - d); });
  float all[R * U];
  add_each<R * U>(sums, all);
  for (int r = 0; r < R; ++r)
    for (int u = 0; u < U; ++u) out[r * kChunk + u] = all[r * U + u];
}

// Log of the sum of e^s, as it grows.
struct LogSum {
  float max = -__builtin_inff();
  double sum = 0;

  void add(const float* s, int64_t count) {
    float most = max;
    for (int64_t i = 0; i < count; ++i) most = s[i] > most ? s[i] : most;
    Vec part = {};
    for (int64_t i = 0; i < count; i += kWidth) {
      const Vec one = exp_of(load_first(s + i, count - i) - most);
      part += lanes() < int32_t(std::min<int64_t>(count - i, kWidth)) ? one : Vec{};
    }
    sum = (sum == 0 ? 0 : sum * std::exp(double(max) - double(most))) + double(add_all(part));
    max = most;
  }

  float log() const { return float(double(max) + std::log(sum)); }
};

// A request's query heads of one KV head, at most kMostHeads at a time.
struct Scorer {
  static constexpr int kUnits = kWidth == 16 ? 4 : 2;  // as many sums as registers hold, with half the units for more heads

  Scorer(const cpu::BlockScoreArgs& args, int64_t request, int64_t head)
      : a(args), b(request), g(head), rows(0), num_units(args.context_lens[request] / unit_tokens(args.S)) {}

  static constexpr int64_t kAhead = 16;  // units, from one that is scored to one that is fetched

  const cpu::BlockScoreArgs& a;
  int64_t b, g, rows, num_units;
  alignas(64) float q[kMostHeads * kMostWidth];  // q, then |q|, with the scale in it, then zeros for a whole vector
  alignas(64) float s[kMostHeads * kChunk];

  void load_rows(int64_t first) {
    for (int64_t r = 0; r < rows; ++r) {
      const float* row = a.q + ((a.query_starts[b + 1] - 1) * a.H + first + r) * a.D;
      float* to = q + r * kMostWidth;
      for (int64_t d = 0; d < a.D; ++d) {
        to[d] = row[d] * a.scale;
        to[a.D + d] = std::fabs(to[d]);
      }
      for (int64_t d = 2 * a.D; d % kWidth; ++d) to[d] = 0;
    }
  }

  const uint16_t* unit(int64_t j) const {
    const int64_t Z = a.S / unit_tokens(a.S);
    const int64_t place = a.block_tables[b * a.X + j / Z] * Z + j % Z;
    return a.meta + (place * a.G + g) * 2 * a.D;
  }

  template <int R, int U>
  static void fill_rows(Scorer& it, int64_t begin, int64_t end) {
    const uint16_t *now[U], *ahead[U];
    for (int64_t j = begin; j < end; j += U) {  // of the last units some may be scored twice: kChunk is a multiple of U
      for (int u = 0; u < U; ++u) {
        now[u] = it.unit(std::min(j + u, end - 1));
        ahead[u] = it.unit(std::min(j + u + kAhead, end - 1));
      }
      score_units<R, U>(it.q, now, ahead, 2 * it.a.D, it.s + (j - begin));
    }
  }

  // The scores of units begin..end-1 into s.
  void fill(int64_t begin, int64_t end) {
    constexpr void (*kFill[])(Scorer&, int64_t, int64_t) = {
        fill_rows<1, kUnits>,     fill_rows<2, kUnits>,     fill_rows<3, kUnits>,     fill_rows<4, kUnits>,
        fill_rows<5, kUnits / 2>, fill_rows<6, kUnits / 2>, fill_rows<7, kUnits / 2>, fill_rows<8, kUnits / 2>};
    kFill[rows - 1](*this, begin, end);
  }

  // Into `scores` what these rows have above their logsumexp, or the greater of it and what is there.
  void run(float* scores, bool is_first) {
    LogSum sums[kMostHeads];
    for (int64_t begin = 0; begin < num_units; begin += kChunk) {
      const int64_t count = std::min(kChunk, num_units - begin);
      fill(begin, begin + count);
      for (int64_t r = 0; r < rows; ++r) sums[r].add(s + r * kChunk, count);
    }
    for (int64_t begin = 0; begin < num_units; begin += kChunk) {
      const int64_t count = std::min(kChunk, num_units - begin);
      if (num_units > kChunk) fill(begin, begin + count);
      for (int64_t r = 0; r < rows; ++r) {
        const float log = sums[r].log(), *of_row = s + r * kChunk;
        float* to = scores + begin;
        for (int64_t j = 0; j < count; ++j) {
          const float one = of_row[j] - log;
          to[j] = (is_first && r == 0) || one > to[j] || one != one ? one : to[j];
        }
      }
    }
  }
};

void score_heads(const void* args, int64_t begin, int64_t end) {
  const auto& a = *static_cast<const cpu::BlockScoreArgs*>(args);
  const int64_t U = unit_tokens(a.S), length = a.X * (a.S / U), heads = a.H / a.G;
  each_head(a, begin, end, [&](int64_t b, int64_t g) {
    float* scores = a.scores + (b * a.G + g) * length;
    Scorer scorer(a, b, g);
    for (int64_t first = 0; first < heads; first += scorer.rows) {
      scorer.rows = std::min<int64_t>(kMostHeads, heads - first);
      scorer.load_rows(g * heads + first);
      scorer.run(scores, first == 0);
    }
    std::fill(scores + scorer.num_units, scores + length, -__builtin_inff());
  });
}

// The scores by which units are chosen, as keys in their order.
inline int32_t key_of(float x) {
  const int32_t bits = int32_t(bits_of(x));
  return bits < 0 ? int32_t(0x80000000u - uint32_t(bits)) : bits;
}

inline float score_of(int32_t key) { return float_of(key < 0 ? 0x80000000u - uint32_t(key) : uint32_t(key)); }

inline int64_t count_from(const float* scores, int64_t count, float least) {
  int32_t found = 0;
  for (int64_t i = 0; i < count; ++i) found += scores[i] >= least;
  return found;
}

// Writes the k best of `count` units, ascending, as numbers from `first` on. What is not a number is the least.
inline void choose(const float* scores, int64_t count, int64_t k, int64_t first, int32_t* out) {
  constexpr float kInf = __builtin_inff();
  int64_t low = key_of(-kInf), high = int64_t(key_of(kInf)) + 1;  // `low` and all above it are k or more, `high` fewer
  int64_t from_low = count_from(scores, count, -kInf);
  const bool has_enough = from_low >= k;
  while (has_enough && high - low > 1 && from_low > k) {
    const int64_t middle = low + (high - low) / 2;
    const int64_t from_middle = count_from(scores, count, score_of(int32_t(middle)));
    if (from_middle >= k)
      low = middle, from_low = from_middle;
    else
      high = middle;
  }
  const float least = score_of(int32_t(low));
  // Surely chosen are those above `least`; of those at it, the first. Without enough numbers, that is all of them, and the first
  // of those that are none.
  int64_t ties = k;
  for (int64_t i = 0; i < count; ++i) ties -= has_enough ? scores[i] > least : scores[i] >= least;
  for (int64_t i = 0, found = 0; found < k; ++i) {
    const bool is_above = has_enough ? scores[i] > least : scores[i] >= least;
    const bool is_at = !is_above && (has_enough ? scores[i] >= least : true) && ties > 0;
    ties -= is_at;
    if (is_above || is_at) out[found++] = int32_t(first + i);
  }
}

void choose_heads(const void* args, int64_t begin, int64_t end) {
  const auto& a = *static_cast<const cpu::BlockTopkArgs*>(args);
  const int64_t U = unit_tokens(a.S), length = a.X * (a.S / U);
  each_head(a, begin, end, [&](int64_t b, int64_t g) {
    const int64_t row = b * a.G + g, budget = a.budgets[b], num_units = (a.context_lens[b] + U - 1) / U;
    const int64_t between = budget - kSinkUnits - kRecentUnits;
    int32_t* out = a.selected + row * length;
    for (int64_t i = 0; i < kSinkUnits; ++i) out[i] = int32_t(i);
    choose(a.scores + row * length + kSinkUnits, num_units - kSinkUnits - kRecentUnits, between, kSinkUnits, out + kSinkUnits);
    for (int64_t i = 0; i < kRecentUnits; ++i) out[budget - kRecentUnits + i] = int32_t(num_units - kRecentUnits + i);
    a.num_selected[row] = int32_t(budget);
  });
}

}  // namespace

void cpu::VIVACE_ISA(block_meta_update)(Pool& pool, const BlockMetaUpdateArgs& a) {
  constexpr Task* kTasks[] = {update_units<float>, update_units<uint16_t>, update_units<int8_t>};  // in the order of KvType
  pool.for_range(a.count, 1, kTasks[a.kv_type], &a);
}

void cpu::VIVACE_ISA(block_score)(Pool& pool, const BlockScoreArgs& a) {
  pool.for_range(count_sparse(a) * a.G, 1, score_heads, &a);
}

void cpu::VIVACE_ISA(block_topk)(Pool& pool, const BlockTopkArgs& a) {
  std::fill(a.num_selected, a.num_selected + a.B * a.G, -1);
  pool.for_range(count_sparse(a) * a.G, 1, choose_heads, &a);
}
