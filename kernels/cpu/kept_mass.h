// How much of attention a selection keeps: the scores of all positions, as attention.h has them, and of the selected ones.
// Threads take KV heads. Bound by reading K.
#pragma once
#include "attention.h"

namespace {

constexpr int64_t kHeadsAtOnce = 64;  // KV heads

struct Kept {
  const cpu::AttentionArgs& a;
  int64_t b, first;
  float* sums;  // of KV heads from the first on: of the kept shares of their query heads
};

// What of the weights of one split lies in selected units. `at` is the first of these that may reach into the split.
inline float kept_of(const float* p, const int32_t* units, int64_t num_units, int64_t at, int64_t U, int64_t split, int64_t end) {
  float sum = 0;
  for (; at < num_units && units[at] * U < end; ++at)
    for (int64_t i = std::max(units[at] * U, split); i < std::min((units[at] + 1) * U, end); ++i) sum += p[i - split];
  return sum;
}

template <typename Element>
float keep_tile(const cpu::AttentionArgs& a, const Tile& tile, Work<Element>& w) {
  const int64_t U = unit_tokens(a.S), num_units = a.num_selected[tile.b * a.G + tile.g];
  const int32_t* units = a.selected + (tile.b * a.G + tile.g) * a.X * (a.S / U);
  float kept[kPairs] = {};  // by total[r].max
  begin_tile(a, tile, w);
  for (int64_t split = 0, at = 0; split < tile.end; split += kSplit) {
    const int64_t end = std::min(split + kSplit, tile.end);
    score_split(a, tile, w, w.runs[0], find_runs(a, tile, w.runs[0], split, end));
    while (at < num_units && (units[at] + 1) * U <= split) ++at;
    for (int64_t r = 0; r < tile.count; ++r) {
      float* p = w.p + r * kSplit;
      const State one = weigh(p, a.softcap, 0, end - split);
      State& total = w.total[r];
      const float max = std::max(total.max, one.max), take = exp_poly(one.max - max);
      const float keep = total.sum == 0 ? 0 : exp_poly(total.max - max);
      kept[r] = kept[r] * keep + kept_of(p, units, num_units, at, U, split, end) * take;
      total = {max, total.sum * keep + one.sum * take};
    }
  }
  float sum = 0;
  for (int64_t r = 0; r < tile.count; ++r) sum += kept[r] / w.total[r].sum;
  return sum;
}

template <typename Element>
void keep_heads(const void* args, int64_t begin, int64_t end) {
  const Kept& job = *static_cast<const Kept*>(args);
  cpu::AttentionArgs all = job.a;
  all.selected = nullptr;  // tiles of the whole context
  const Tiles tiles(all);
  Work<Element> w;
  for (int64_t i = begin; i < end; ++i) {
    job.sums[i] = 0;
    for (int64_t j = 0; j < tiles.of(job.b); ++j)
      job.sums[i] += keep_tile(job.a, tiles.make(job.b, job.first + i, j), w);
  }
}

inline bool is_measured(const cpu::KeptMassArgs& k, int64_t b) {
  const int32_t* counts = k.of.num_selected + b * k.of.G;
  return k.measured[b] && std::all_of(counts, counts + k.of.G, [](int32_t count) { return count >= 0; });
}

}  // namespace

void cpu::VIVACE_ISA(kept_mass)(Pool& pool, const KeptMassArgs& k) {
  constexpr Task* kTasks[] = {keep_heads<float>, keep_heads<uint16_t>, keep_heads<int8_t>};  // in the order of KvType
  const AttentionArgs& a = k.of;
  for (int64_t b = 0; b < a.B; ++b) {
    for (int64_t i = 2 * b; i < 2 * b + 2; ++i) k.mass[i] = k.before ? k.before[i] : 0;
    if (!is_measured(k, b)) continue;
    float kept = 0, sums[kHeadsAtOnce];
    for (int64_t g = 0; g < a.G; g += kHeadsAtOnce) {
      const int64_t count = std::min(kHeadsAtOnce, a.G - g);
      const Kept job{a, b, g, sums};
      pool.for_range(count, 1, kTasks[a.kv_type], &job);
      for (int64_t i = 0; i < count; ++i) kept += sums[i];
    }
    k.mass[2 * b] += kept / float(a.H);
    k.mass[2 * b + 1] += 1;
  }
}
