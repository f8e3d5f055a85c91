// y = x W^T + bias of quantized rows by an int8 matrix, or by that of an expert. Threads split the tiles, or many rows, which
// then stay in a thread's own caches from op to op; each passes all its rows by a tile while that is in the cache. Bound by
// reading W up to 8 rows or so, by multiplying beyond.
//
// `Sums` is an instruction set's: `template <int R> static void rows(out, q, stride, w, K, next)` gives out[R][32] = the int32 sums
// over K of R rows, each `stride` bytes behind the other, with one tile. They are exact, so no order of additions shows. R is at
// most kMostRows, or 16 if that is more than 8. `next`, if it is not null, is a tile that may be fetched meanwhile.
#pragma once
#include "packed.h"
#include "quantized_rows.h"

namespace {

constexpr int64_t kManyRows = 128;  // of each thread: from here on it reads all of W rather than share its rows with others
constexpr int64_t kFewRows = 48;  // up to here a tile's way from memory is worth hiding behind the sums of 16 rows

// Four bytes of a row, of which `count` are left.
inline uint32_t word(const uint8_t* q, int64_t count) {
  uint32_t four = 0;
  if (count >= 4)
    std::memcpy(&four, q, 4);
  else
    std::memcpy(&four, q, size_t(count));
  return four;
}

template <class Sums>
struct LinearInt8 {
  // Rows t.., R of them. `bias` may be null.
  template <int R>
  static void step(const QuantizedRows& rows, const Int8Matrix& m, const float* bias, int64_t tile, int64_t t) {
    const int64_t first = tile * kTile, count = std::min(kTile, m.N - first);
    const int32_t* columns = m.sums() + first;
    const float* scales = m.scales() + first;
    for (int64_t n = 0; n < kTile; n += 16) {  // needed at the end of the tile, and not in its stream
      __builtin_prefetch(columns + n);
      __builtin_prefetch(scales + n);
    }
    if constexpr (R > 8)  // fewer are waiting for W as it is
      for (int r = 0; r < R; ++r)
        for (int64_t n = 0; n < count; n += 16) __builtin_prefetch(rows.result(t + r) + first + n, 1);
    alignas(64) int32_t sums[R][kTile];
    const bool is_last_of_many = t > 0 && t + R == rows.count;
    Sums::template rows<R>(sums, rows.q + t * m.K, m.K, m.tile(tile), m.K, is_last_of_many ? m.tile(tile + 1) : nullptr);
    for (int r = 0; r < R; ++r) {
      const float scale = rows.params[2 * (t + r)];
      const int32_t zero = int32_t(rows.params[2 * (t + r) + 1]);
      float y[kTile];  // whole, for the compiler to vectorise: sums and scales are padded
      for (int64_t n = 0; n < kTile; ++n) y[n] = float(sums[r][n] - zero * columns[n]) * (scale * scales[n]);
      for (int64_t n = 0; bias && n < count; ++n) y[n] += bias[first + n];
      std::memcpy(rows.result(t + r) + first, y, size_t(count) * 4);
    }
  }

  static void multiply(const QuantizedRows& rows, const Int8Matrix& m, const float* bias, int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      int64_t t = 0;
      for (int64_t left; (left = rows.count - t) > 0;) {
        if (Sums::kMostRows > 8 && left >= 16 && rows.count <= kFewRows) {
          step<Sums::kMostRows <= 8 ? 1 : 16>(rows, m, bias, tile, t);
          t += 16;
        } else if (left >= Sums::kMostRows) {
          step<Sums::kMostRows>(rows, m, bias, tile, t);
          t += Sums::kMostRows;
        } else if (Sums::kMostRows > 8 && left >= 8) {
          step<8>(rows, m, bias, tile, t);
          t += 8;
        } else if (Sums::kMostRows > 4 && left >= 4) {
          step<4>(rows, m, bias, tile, t);
          t += 4;
        } else if (Sums::kMostRows > 2 && left >= 2) {
          step<2>(rows, m, bias, tile, t);
          t += 2;
        } else {
          step<1>(rows, m, bias, tile, t);
          t += 1;
        }
      }
    }
  }

  static void tiles(const void* args, int64_t begin, int64_t end) {
    const auto& a = *static_cast<const cpu::LinearInt8Args*>(args);
    multiply({a.q, a.params, a.out, nullptr, a.T, a.N}, {a.weight, a.N, a.K}, a.bias, begin, end);
  }

  static void some_rows(const void* args, int64_t begin, int64_t end) {
    const auto& a = *static_cast<const cpu::LinearInt8Args*>(args);
    const Int8Matrix m{a.weight, a.N, a.K};
    multiply({a.q + begin * a.K, a.params + 2 * begin, a.out + begin * a.N, nullptr, end - begin, a.N}, m, a.bias, 0, m.tiles());
  }

  static void expert_tiles(const void* args, int64_t begin, int64_t end) {
    const auto& a = *static_cast<const cpu::ExpertLinearInt8Args*>(args);
    by_experts(a, [&](const QuantizedRows& rows, int64_t e) {
      Int8Matrix m{a.weight, a.N, a.I};
      m.data += e * m.bytes();
      multiply(rows, m, a.bias ? a.bias + e * a.N : nullptr, begin, end);
    });
  }

  static void run(cpu::Pool& pool, const cpu::LinearInt8Args& a) {
    if (a.T >= kManyRows * pool.threads())
      pool.for_range(a.T, 1, some_rows, &a);
    else if (a.T > 0)
      pool.for_range(up(a.N, kTile), 1, tiles, &a);
  }

  static void run_experts(cpu::Pool& pool, const cpu::ExpertLinearInt8Args& a) {
    if (a.T > 0) pool.for_range(up(a.N, kTile), 1, expert_tiles, &a);
  }
};

}  // namespace
