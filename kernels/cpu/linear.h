// y = x W^T + bias, and the same with a matrix for each expert; W in fp32 or bf16. Threads split the outputs N.
//
// An output element adds up its K products in as many lanes as a vector has, k = lane mod these, ascending; then halves of the
// lanes onto each other, then the bias: the same order whether it is computed in a tile of rows or alone.
// Bound by reading W while there are few rows, by multiplying from about 8 rows on.
#pragma once
#include <algorithm>

#include "ops.h"
#include "simd.h"

namespace {

constexpr int64_t kRowTile = 128;                // rows of x whose part of kBlock stays in L2 while all of W passes by
constexpr int64_t kBlock = 1024;                 // inputs: of a tile's rows of W these stay in L1
constexpr int kTileRows = 4;
constexpr int kTileOutputs = kWidth == 16 ? 6 : 3;  // 24 or 12 sums
constexpr int kRowOutputs = 8;                   // of one row alone
constexpr int64_t kWidenFrom = 16;               // rows, from which on W of bf16 is made fp32 a block at a time
constexpr int64_t kSmall = 1 << 17;              // multiplications that one thread does sooner than two have met

// Rows from anywhere, and where the results of each go.
struct Rows {
  const float* x[kRowTile];
  float* out[kRowTile];
  int64_t count;
};

template <typename Weight>
struct Matrix {
  const Weight* weight;  // [N, K]
  const float* bias;     // [N] or null
  int64_t K;
  int64_t stride;        // from a row of W to the next
  int64_t row, input;    // those of the first element that is there
};

// R rows of x by C rows of W, inputs begin..end-1: R * C vectors of sums, `saved` between the blocks of inputs.
template <int R, int C, typename Weight>
void tile(const Rows& rows, int64_t first, const Matrix<Weight>& m, int64_t n, int64_t begin, int64_t end, Vec* saved) {
  const float* x[R];
  for (int r = 0; r < R; ++r) x[r] = rows.x[first + r];
  const Weight* w = m.weight + (n - m.row) * m.stride - m.input;
  const Weight* ahead = first == 0 ? w + C * m.stride : w;  // rows of W that come next: streams too short to be foreseen
  Vec sum[R * C];
#pragma GCC unroll 24
  for (int i = 0; i < R * C; ++i) sum[i] = begin > 0 ? saved[i] : Vec{};
  int64_t k = begin;
  for (; k + kWidth <= end; k += kWidth) {
    Vec wv[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      wv[c] = load_any(w + c * m.stride + k);
      __builtin_prefetch(ahead + c * m.stride + k);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec xv = load(x[r] + k);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[r * C + c] = fma(xv, wv[c], sum[r * C + c]);
    }
  }
  if (k < end) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec xv = load_first(x[r] + k, end - k);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c)
        sum[r * C + c] = fma(xv, load_any_first(w + c * m.stride + k, end - k), sum[r * C + c]);
    }
  }
  if (end < m.K) {
#pragma GCC unroll 24
    for (int i = 0; i < R * C; ++i) saved[i] = sum[i];
    return;
  }
  float total[R * C];
  add_each<R * C>(sum, total);
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c)
      rows.out[first + r][n + c] = m.bias ? total[r * C + c] + m.bias[n + c] : total[r * C + c];
}

// Inputs begin..end-1 of all rows.
template <int C, typename Weight>
void block(const Rows& rows, const Matrix<Weight>& m, int64_t n, int64_t begin, int64_t end, Vec* saved) {
  int64_t r = 0;
  if constexpr (C <= kTileOutputs)
    for (; r + kTileRows <= rows.count; r += kTileRows) tile<kTileRows, C>(rows, r, m, n, begin, end, saved + r * C);
  for (; r < rows.count; ++r) tile<1, C>(rows, r, m, n, begin, end, saved + r * C);
}

// The same by way of fp32, which many rows make up for.
template <int C>
void widened_block(const Rows& rows, const Matrix<uint16_t>& m, int64_t n, int64_t begin, int64_t end, Vec* saved) {
  alignas(64) float wide[C][kBlock];
  const int64_t count = end - begin;
  for (int c = 0; c < C; ++c) {
    const uint16_t* w = m.weight + (n + c) * m.stride + begin;
    int64_t k = 0;
    for (; k + kWidth <= count; k += kWidth) store(wide[c] + k, load_any(w + k));
    if (k < count) store(wide[c] + k, load_any_first(w + k, count - k));
  }
  block<C>(rows, Matrix<float>{wide[0], m.bias, m.K, kBlock, n, begin}, n, begin, end, saved);
}

template <int C, typename Weight>
void outputs(const Rows& rows, const Matrix<Weight>& m, int64_t n) {
  Vec saved[kRowTile * C];
  int64_t begin = 0;
  do {  // once if K is 0
    const int64_t end = std::min(begin + kBlock, m.K);
    if constexpr (sizeof(Weight) == 2) {
      if (rows.count >= kWidenFrom)
        widened_block<C>(rows, m, n, begin, end, saved);
      else
        block<C>(rows, m, n, begin, end, saved);
    } else {
      block<C>(rows, m, n, begin, end, saved);
    }
    begin = end;
  } while (begin < m.K);
}

// Outputs begin..end-1 of all rows.
template <typename Weight>
void multiply(const Rows& rows, const Matrix<Weight>& m, int64_t begin, int64_t end) {
  int64_t n = begin;
  if (rows.count < kTileRows)
    for (; n + kRowOutputs <= end; n += kRowOutputs) outputs<kRowOutputs>(rows, m, n);
  else
    for (; n + kTileOutputs <= end; n += kTileOutputs) outputs<kTileOutputs>(rows, m, n);
  for (; n < end; ++n) outputs<1>(rows, m, n);
}

template <typename Weight>
void piece(const void* args, int64_t begin, int64_t end) {
  const auto& a = *static_cast<const cpu::LinearArgs*>(args);
  Rows rows;
  for (int64_t t = 0; t < a.T; t += kRowTile) {
    rows.count = std::min(a.T - t, kRowTile);
    for (int64_t r = 0; r < rows.count; ++r) {
      rows.x[r] = a.x + (t + r) * a.K;
      rows.out[r] = a.out + (t + r) * a.N;
    }
    multiply<Weight>(rows, {static_cast<const Weight*>(a.weight), a.bias, a.K, a.K, 0, 0}, begin, end);
  }
}

// Expert by expert: the slots (t, k) that chose it, a tile at a time.
template <typename Weight>
void expert_piece(const void* args, int64_t begin, int64_t end) {
  const auto& a = *static_cast<const cpu::ExpertLinearArgs*>(args);
  const int64_t num_slots = a.T * a.K;
  Rows rows;
  for (int64_t e = 0; e < a.E; ++e) {
    const Matrix<Weight> expert{static_cast<const Weight*>(a.weight) + e * a.N * a.I, a.bias ? a.bias + e * a.N : nullptr,
                                a.I, a.I, 0, 0};
    rows.count = 0;
    for (int64_t slot = 0; slot < num_slots; ++slot) {
      if (a.experts[slot] != e) continue;
      rows.x[rows.count] = a.x + (a.has_own_rows ? slot : slot / a.K) * a.I;
      rows.out[rows.count] = a.out + slot * a.N;
      if (++rows.count < kRowTile) continue;
      multiply(rows, expert, begin, end);
      rows.count = 0;
    }
    if (rows.count > 0) multiply(rows, expert, begin, end);
  }
}

inline int64_t grain(int64_t rows, int64_t inputs) { return std::max<int64_t>(16, kSmall / std::max<int64_t>(1, rows * inputs)); }

}  // namespace

namespace cpu {
void VIVACE_ISA(linear)(Pool& pool, const LinearArgs& a) {
  if (a.T > 0) pool.for_range(a.N, grain(a.T, a.K), a.is_bf16 ? piece<uint16_t> : piece<float>, &a);
}
void VIVACE_ISA(expert_linear)(Pool& pool, const ExpertLinearArgs& a) {
  if (a.T > 0) pool.for_range(a.N, grain(a.T * a.K, a.I), a.is_bf16 ? expert_piece<uint16_t> : expert_piece<float>, &a);
}
}  // namespace cpu
