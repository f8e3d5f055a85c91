// y = x W^T + bias of quantized rows by an int4 matrix in groups (packed.h), or by that of an expert. Threads split the tiles.
//
//   y[n] = scale * (sum over groups, in order, of d[n, group] * (int32 sum of q * w)  -  zero * sum[n]) + bias[n]
//
// The int32 sums are exact, and every other step is one rounding, so that all instruction sets give the same bits.
// Few rows are bound by reading W. From kPanelFrom rows on, multiplying is the bound: a block of a tile is unpacked to bytes
// once, into the thread's stack (36 KB, and 16 KB of sums), and all rows pass by it.
//
// `Sums` is an instruction set's:
//   template <int R> static void rows(out, q, stride, m, tile) gives out[R][32] = the sums over groups, fp32.
// and, where kPanelFrom is not 0,
//   static void unpack(panel, at, m, block): the groups of a block, whose bytes are at `at`;
//   template <int R> static void add(out, q, stride, panel, m, block, ahead): adds the block's groups to out[R][32], or begins
//     with them if they are the first. Meanwhile it prefetches `ahead`, a cache line for each four inputs.
#pragma once
#include "packed.h"
#include "quantized_rows.h"

namespace {

constexpr int64_t kBlockInputs = 1024;  // a whole number of groups of 32, 64 or 128
constexpr int64_t kChunk = 128;         // rows whose sums wait on the stack, 16 KB, while the blocks of a long K pass

// As an int8 matrix has it: [inputs / 4][32][4].
struct Panel {
  alignas(64) int8_t w[kBlockInputs * kTile];
  alignas(64) float scales[kBlockInputs / 32][kTile];
};

struct Block {
  int64_t first, end;  // groups
};

// What to prefetch: nothing new where the step is 0.
struct Ahead {
  const uint8_t* at;
  int64_t step;
};

// Four bytes of a row, of which `left` are left: none, if that is negative.
inline uint32_t word_of(const uint8_t* q, int64_t left) {
  uint32_t four = 0;
  if (left >= 4)
    std::memcpy(&four, q, 4);
  else if (left > 0)
    std::memcpy(&four, q, size_t(left));
  return four;
}

template <class Sums>
struct LinearInt4 {
  // The results of `count` rows from t on. `bias` may be null.
  static void write(const QuantizedRows& rows, const Int4Matrix& m, const float* bias, int64_t tile, int64_t t,
                    const float (*sums)[kTile], int64_t count) {
    const int64_t first = tile * kTile, num_outputs = std::min(kTile, m.N - first);
    const float* columns = m.sums() + first;
    for (int64_t r = 0; r < count; ++r) {
      const float scale = rows.params[2 * (t + r)], zero = rows.params[2 * (t + r) + 1];
      float* out = rows.result(t + r) + first;
      for (int64_t n = 0; n < num_outputs; ++n) {
        const float y = (sums[r][n] - zero * columns[n]) * scale;
        out[n] = bias ? y + bias[first + n] : y;
      }
    }
  }

  template <int R>
  static void step(const QuantizedRows& rows, const Int4Matrix& m, const float* bias, int64_t tile, int64_t t) {
    alignas(64) float sums[R][kTile];
    Sums::template rows<R>(sums, rows.q + t * m.K, m.K, m, tile);
    write(rows, m, bias, tile, t, sums, R);
  }

  // Rows t.. of `count`, R at a time, then fewer.
  template <int R>
  static void add(float (*sums)[kTile], const uint8_t* q, int64_t t, int64_t count, const Panel& panel, const Int4Matrix& m,
                  Block block, const uint8_t* next) {
    const uint8_t* x = q + block.first * m.group;
    for (; t + R <= count; t += R) {
      const Ahead ahead = {next, t == 0 ? 64 : 0};
      Sums::template add<R>(sums + t, x + t * m.K, m.K, panel, m, block, ahead);
    }
    if constexpr (R > 1) add<R / 2>(sums, q, t, count, panel, m, block, next);
  }

  static void by_panels(const QuantizedRows& rows, const Int4Matrix& m, const float* bias, int64_t tile) {
    Panel panel;
    alignas(64) float sums[kChunk][kTile];
    const int64_t groups = m.groups(), most = kBlockInputs / m.group;
    for (int64_t t = 0; t < rows.count; t += kChunk) {
      const int64_t count = std::min(kChunk, rows.count - t);
      for (int64_t g = 0; g < groups; g += most) {
        const Block block = {g, std::min(g + most, groups)};
        const uint8_t* at = m.tile(tile) + g * m.group_bytes(0);
        if (t == 0 || groups > most) Sums::unpack(panel, at, m, block);
        const uint8_t* next = at + (block.end - g) * m.group_bytes(0);
        add<Sums::kPanelRows>(sums, rows.q + t * m.K, 0, count, panel, m, block, next);
      }
      write(rows, m, bias, tile, t, sums, count);
    }
  }

  static void multiply(const QuantizedRows& rows, const Int4Matrix& m, const float* bias, int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      if constexpr (Sums::kPanelFrom > 0) {
        if (rows.count >= Sums::kPanelFrom && m.K > 0) {
          by_panels(rows, m, bias, tile);
          continue;
        }
      }
      int64_t t = 0;
      for (; t + Sums::kMostRows <= rows.count; t += Sums::kMostRows) step<Sums::kMostRows>(rows, m, bias, tile, t);
      for (; t < rows.count; ++t) step<1>(rows, m, bias, tile, t);
    }
  }

  static void tiles(const void* args, int64_t begin, int64_t end) {
    const auto& a = *static_cast<const cpu::LinearInt4Args*>(args);
    multiply({a.q, a.params, a.out, nullptr, a.T, a.N}, {a.weight, a.N, a.K, a.group}, a.bias, begin, end);
  }

  static void expert_tiles(const void* args, int64_t begin, int64_t end) {
    const auto& a = *static_cast<const cpu::ExpertLinearInt4Args*>(args);
    by_experts(a, [&](const QuantizedRows& rows, int64_t e) {
      Int4Matrix m{a.weight, a.N, a.I, a.group};
      m.data += e * m.bytes();
      multiply(rows, m, a.bias ? a.bias + e * a.N : nullptr, begin, end);
    });
  }

  static void run(cpu::Pool& pool, const cpu::LinearInt4Args& a) {
    if (a.T > 0) pool.for_range(up(a.N, kTile), 1, tiles, &a);
  }

  static void run_experts(cpu::Pool& pool, const cpu::ExpertLinearInt4Args& a) {
    if (a.T > 0) pool.for_range(up(a.N, kTile), 1, expert_tiles, &a);
  }
};

}  // namespace
