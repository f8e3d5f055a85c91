// y = x W^T + bias of quantized rows by an int4 matrix in groups: packed.h. Threads split the tiles.
//
//   y[n] = scale * (sum over groups, in order, of d[n, group] * (int32 sum of q * w)  -  zero * sum[n]) + bias[n]
//
// The int32 sums are exact, and every other step is one rounding, so that all instruction sets give the same bits.
// Bound by reading W for some rows, by unpacking and multiplying beyond.
//
// `Sums`: `template <int R> static void rows(out, q, stride, m, tile)` gives out[R][32] = the sums over groups, fp32.
#pragma once
#include <cstring>

#include "ops.h"
#include "packed.h"

namespace {

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
  template <int R>
  static void step(const cpu::LinearInt4Args& a, const Int4Matrix& m, int64_t tile, int64_t t) {
    alignas(64) float sums[R][kTile];
    Sums::template rows<R>(sums, a.q + t * a.K, a.K, m, tile);
    const int64_t first = tile * kTile, count = std::min(kTile, a.N - first);
    const float* columns = m.sums() + first;
    for (int r = 0; r < R; ++r) {
      const float scale = a.params[2 * (t + r)], zero = a.params[2 * (t + r) + 1];
      float* out = a.out + (t + r) * a.N + first;
      for (int64_t n = 0; n < count; ++n) {
        const float y = (sums[r][n] - zero * columns[n]) * scale;
        out[n] = a.bias ? y + a.bias[first + n] : y;
      }
    }
  }

  static void tiles(const void* args, int64_t begin, int64_t end) {
    const auto& a = *static_cast<const cpu::LinearInt4Args*>(args);
    const Int4Matrix m{a.weight, a.N, a.K, a.group};
    for (int64_t tile = begin; tile < end; ++tile) {
      int64_t t = 0;
      for (; t + Sums::kMostRows <= a.T; t += Sums::kMostRows) step<Sums::kMostRows>(a, m, tile, t);
      for (; t < a.T; ++t) step<1>(a, m, tile, t);
    }
  }

  static void run(cpu::Pool& pool, const cpu::LinearInt4Args& a) {
    if (a.T > 0) pool.for_range(up(a.N, kTile), 1, tiles, &a);
  }
};

}  // namespace
