// y = x W^T in plain C++. An output element adds up its K products in four lanes, k = lane mod 4, then lane by lane:
// the same order whether it is computed in a tile of rows or alone.
//
// Threads split N. Bound by reading W while there are few rows, by multiplying from about 8 rows on.
#include <algorithm>

#include "math.h"
#include "ops.h"

namespace {

constexpr int64_t kRowTile = 64;  // rows of x that stay in L2 while all of W passes by

// R rows of x by C rows of W: R * C accumulators, so that each loaded vector is used C or R times.
template <int R, int C>
inline void tile(const cpu::LinearArgs& a, int64_t t, int64_t n) {
  const float* x = a.x + t * a.K;
  const float* w = a.weight + n * a.K;
  Lanes sum[R][C] = {};
  int64_t k = 0;
  for (; k + 4 <= a.K; k += 4) {
    Lanes wv[C];
    for (int c = 0; c < C; ++c) wv[c] = load4(w + c * a.K + k);
    for (int r = 0; r < R; ++r) {
      const Lanes xv = load4(x + r * a.K + k);
      for (int c = 0; c < C; ++c) sum[r][c] += xv * wv[c];
    }
  }
  if (k < a.K) {
    for (int r = 0; r < R; ++r) {
      const Lanes xv = load_tail(x + r * a.K + k, a.K - k);
      for (int c = 0; c < C; ++c) sum[r][c] += xv * load_tail(w + c * a.K + k, a.K - k);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) a.out[(t + r) * a.N + n + c] = add_lanes(sum[r][c]);
}

template <int C>
inline void columns(const cpu::LinearArgs& a, int64_t t, int64_t end, int64_t n) {
  for (; t + 4 <= end; t += 4) tile<4, C>(a, t, n);
  for (; t < end; ++t) tile<1, C>(a, t, n);
}

void piece(const void* args, int64_t begin, int64_t end) {
  const cpu::LinearArgs& a = *static_cast<const cpu::LinearArgs*>(args);
  for (int64_t t = 0; t < a.T; t += kRowTile) {
    const int64_t last = std::min(a.T, t + kRowTile);
    int64_t n = begin;
    if (last - t < 4) {
      for (; n + 4 <= end; n += 4) columns<4>(a, t, last, n);
    } else {
      for (; n + 2 <= end; n += 2) columns<2>(a, t, last, n);
    }
    for (; n < end; ++n) columns<1>(a, t, last, n);
  }
}

}  // namespace

void cpu::linear_portable(Pool& pool, const LinearArgs& a) {
  if (a.T > 0) pool.for_range(a.N, 16, piece, &a);
}
