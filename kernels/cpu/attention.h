// Attention over the paged cache. A tile (attention_tile.h) is up to 24 pairs (row, query head) of one request that share a KV head.
//
// Threads take tiles, or of few tiles the groups of splits. Bound by FMA in prefill, by reading K and V in decode.
#pragma once
#include <atomic>

#include "attention_tile.h"

namespace {

constexpr int64_t kScratch = 1 << 18;  // floats on the stack for the groups of few tiles
constexpr int64_t kSmall = 1 << 18;    // multiplications that one thread does sooner than two have met

// All tiles in order of their numbers; the later rows of a request, which see the most, come first.
struct Tiles {
  explicit Tiles(const cpu::AttentionArgs& args) : a(args), heads(args.H / args.G) {}

  int64_t of(int64_t b) const { return ((a.query_starts[b + 1] - a.query_starts[b]) * heads + kPairs - 1) / kPairs; }

  Tile make(int64_t b, int64_t g, int64_t i) const {
    const int64_t rows = a.query_starts[b + 1] - a.query_starts[b], place = (of(b) - 1 - i) * kPairs;
    const int64_t count = std::min<int64_t>(rows * heads - place, kPairs), seen = a.context_lens[b] - rows + 1;
    const int64_t begin = a.window > 0 ? std::max<int64_t>(0, seen + place / heads - a.window) : 0;
    const int32_t* table = a.block_tables + b * a.X;
    const int64_t num_units = a.selected ? a.num_selected[b * a.G + g] : -1;
    if (num_units < 0) return {table, nullptr, b, g, place, count, begin, seen + (place + count - 1) / heads};
    const int64_t U = unit_tokens(a.S);
    const int32_t* units = a.selected + (b * a.G + g) * a.X * (a.S / U);
    const int64_t missing = num_units > 0 ? std::max<int64_t>(0, (units[num_units - 1] + 1) * U - a.context_lens[b]) : 0;
    return {table, units, b, g, place, count, 0, num_units * U - missing};  // the last unit may end past the context
  }

  const cpu::AttentionArgs& a;
  int64_t heads;
};

inline int64_t groups_of(const Tile& tile) { return (tile.end + kGroup - 1) / kGroup - tile.begin / kGroup; }

struct Job {
  const cpu::AttentionArgs& a;
  float* scratch;  // of each tile's groups, or null: a tile's groups are one thread's
  std::atomic<int64_t>* next;
  int64_t count;  // of items
};

struct Item {
  Tile tile;
  int64_t group;   // of the tile; unused without scratch
  float* partial;  // [count, 2 + D]
};

// Calls `visit` for each item from number `from` on until it says no.
template <typename Visit>
void each_item(const Job& job, Visit visit) {
  const Tiles tiles(job.a);
  float* partial = job.scratch;
  int64_t number = 0;
  for (int64_t b = 0; b < job.a.B; ++b)
    for (int64_t i = 0, count = tiles.of(b); i < count; ++i)
      for (int64_t g = 0; g < job.a.G; ++g) {
        const Tile tile = tiles.make(b, g, i);
        const int64_t groups = job.scratch ? groups_of(tile) : 1;
        for (int64_t group = 0; group < groups; ++group, ++number) {
          visit(number, Item{tile, group, partial});
          if (job.scratch) partial += tile.count * (2 + job.a.D);
        }
      }
}

template <typename Element>
void attend_item(const cpu::AttentionArgs& a, const Item& item, Work<Element>& w) {
  const Tile& tile = item.tile;
  begin_tile(a, tile, w);
  const int64_t first = tile.begin / kGroup + item.group, last = item.partial ? first + 1 : (tile.end + kGroup - 1) / kGroup;
  for (int64_t group = first; group < last; ++group) {
    attend_group(a, tile, w, std::max(tile.begin, group * kGroup), std::min(tile.end, (group + 1) * kGroup));
    for (int64_t r = 0; r < tile.count; ++r) {
      if (!item.partial) {
        join(w.total[r], w.total_acc + r * a.D, w.group[r], w.group_acc + r * a.D, a.D);
        continue;
      }
      float* partial = item.partial + r * (2 + a.D);
      partial[0] = w.group[r].max;
      partial[1] = w.group[r].sum;
      std::memcpy(partial + 2, w.group_acc + r * a.D, size_t(a.D) * 4);
    }
  }
  if (!item.partial) end_tile(a, tile, w);
}

// Each thread takes the next item that nobody has: contexts differ in length.
template <typename Element>
void take_items(const void* args, int64_t, int64_t) {
  const Job& job = *static_cast<const Job*>(args);
  int64_t mine = job.next->fetch_add(1, std::memory_order_relaxed);
  if (mine >= job.count) return;
  Work<Element> w;
  each_item(job, [&](int64_t number, const Item& item) {
    if (number != mine) return;
    attend_item(job.a, item, w);
    mine = job.next->fetch_add(1, std::memory_order_relaxed);
  });
}

// What the groups of a tile make together.
template <typename Element>
void join_groups(const Job& job) {
  const cpu::AttentionArgs& a = job.a;
  Work<Element> w;
  each_item(job, [&](int64_t, const Item& item) {
    if (item.group == 0) begin_tile(a, item.tile, w);
    for (int64_t r = 0; r < item.tile.count; ++r) {
      const float* partial = item.partial + r * (2 + a.D);
      join(w.total[r], w.total_acc + r * a.D, {partial[0], partial[1]}, partial + 2, a.D);
    }
    if (item.group == groups_of(item.tile) - 1) end_tile(a, item.tile, w);
  });
}

template <typename Element>
void attend(cpu::Pool& pool, const cpu::AttentionArgs& a) {
  const int64_t used = a.B > 0 ? a.query_starts[a.B] : 0;
  if (a.T > used) std::memset(a.out + used * a.H * a.D, 0, size_t((a.T - used) * a.H * a.D) * 4);  // rows of nobody
  std::atomic<int64_t> next{0};
  int64_t num_tiles = 0, num_groups = 0, floats = 0, work = 0;
  each_item({a, nullptr, &next, 0}, [&](int64_t, const Item& item) {
    const Tile& tile = item.tile;
    ++num_tiles;
    num_groups += groups_of(tile);
    floats += groups_of(tile) * tile.count * (2 + a.D);
    work += tile.count * (tile.end - tile.begin) * a.D;
  });
  float scratch[kScratch];
  const bool is_by_group = num_tiles < 32 && num_groups > num_tiles && floats <= kScratch;
  const int64_t count = is_by_group ? num_groups : num_tiles;
  const Job job{a, is_by_group ? scratch : nullptr, &next, count};
  pool.for_range(count, work < kSmall ? count : 1, take_items<Element>, &job);
  if (is_by_group) join_groups<Element>(job);
}

}  // namespace

void cpu::VIVACE_ISA(attention)(Pool& pool, const AttentionArgs& a) {
  constexpr void (*kAttend[])(Pool&, const AttentionArgs&) = {attend<float>, attend<uint16_t>, attend<int8_t>};
  kAttend[a.kv_type](pool, a);  // in the order of KvType
}
