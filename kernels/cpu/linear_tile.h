// Rows of x by rows of W, of which all projections are made. An output element adds up its K products in four lanes,
// k = lane mod 4, then lane by lane, then the bias: the same order whether it is computed in a tile of rows or alone.
// Header-only and static, as math.h is.
#pragma once
#include "math.h"

namespace {

constexpr int64_t kRowTile = 64;  // rows of x that stay in L2 while all of W passes by

// Rows from anywhere, and where the results of each go.
struct Rows {
  const float* x[kRowTile];
  float* out[kRowTile];
  int64_t count;
};

struct Matrix {
  const float* weight;  // [N, K]
  const float* bias;    // [N] or null
  int64_t K;
};

// R rows of x by C rows of W: R * C accumulators, so that each loaded vector is used C or R times.
template <int R, int C>
inline void tile(const Rows& rows, int64_t first, const Matrix& m, int64_t n) {
  const float* x[R];
  for (int r = 0; r < R; ++r) x[r] = rows.x[first + r];
  const float* w = m.weight + n * m.K;
  Lanes sum[R][C] = {};
  int64_t k = 0;
  for (; k + 4 <= m.K; k += 4) {
    Lanes wv[C];
    for (int c = 0; c < C; ++c) wv[c] = load4(w + c * m.K + k);
    for (int r = 0; r < R; ++r) {
      const Lanes xv = load4(x[r] + k);
      for (int c = 0; c < C; ++c) sum[r][c] += xv * wv[c];
    }
  }
  if (k < m.K) {
    for (int r = 0; r < R; ++r) {
      const Lanes xv = load_tail(x[r] + k, m.K - k);
      for (int c = 0; c < C; ++c) sum[r][c] += xv * load_tail(w + c * m.K + k, m.K - k);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) {
      const float total = add_lanes(sum[r][c]);
      rows.out[first + r][n + c] = m.bias ? total + m.bias[n + c] : total;
    }
}

template <int C>
inline void columns(const Rows& rows, const Matrix& m, int64_t n) {
  int64_t r = 0;
  for (; r + 4 <= rows.count; r += 4) tile<4, C>(rows, r, m, n);
  for (; r < rows.count; ++r) tile<1, C>(rows, r, m, n);
}

// Outputs begin..end-1 of all rows.
inline void multiply(const Rows& rows, const Matrix& m, int64_t begin, int64_t end) {
  int64_t n = begin;
  if (rows.count < 4) {
    for (; n + 4 <= end; n += 4) columns<4>(rows, m, n);
  } else {
    for (; n + 2 <= end; n += 2) columns<2>(rows, m, n);
  }
  for (; n < end; ++n) columns<1>(rows, m, n);
}

}  // namespace
