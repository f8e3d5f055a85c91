// Quantized rows that a matrix is multiplied by, and the gathering of those that chose an expert.
#pragma once
#include <algorithm>
#include <cstring>

#include "ops.h"

namespace {

// One behind the other; the result of each goes to a place of its own.
struct QuantizedRows {
  const uint8_t* q;       // [count, K]
  const float* params;    // [count, 2]: scale, zero
  float* out;             // rows of N
  const int64_t* places;  // of each row's result among these; null: as the rows lie
  int64_t count, N;

  float* result(int64_t r) const { return out + (places ? places[r] : r) * N; }
};

// Of the rows that are gathered at a time, so that an expert's matrix is read once for as many.
constexpr int64_t kMostGathered = 240;
constexpr int64_t kGatheredBytes = 1 << 19;  // on the stack of a thread

// Expert by expert: `multiply(rows, e)` for the slots (t, k) that chose it.
template <class Args, class Multiply>
void by_experts(const Args& a, const Multiply& multiply) {
  alignas(64) uint8_t q[kGatheredBytes];
  float params[2 * kMostGathered];
  int64_t places[kMostGathered];
  const int64_t num_slots = a.T * a.K, most = std::min(kMostGathered, kGatheredBytes / std::max(int64_t(a.I), int64_t(1)));
  QuantizedRows rows{q, params, a.out, places, 0, a.N};
  for (int64_t e = 0; e < a.E; ++e) {
    rows.count = 0;
    for (int64_t slot = 0; slot < num_slots; ++slot) {
      if (a.experts[slot] != e) continue;
      const int64_t row = a.has_own_rows ? slot : slot / a.K;
      std::memcpy(q + rows.count * a.I, a.q + row * a.I, size_t(a.I));
      std::memcpy(params + 2 * rows.count, a.params + 2 * row, 8);
      places[rows.count] = slot;
      if (++rows.count < most) continue;
      multiply(rows, e);
      rows.count = 0;
    }
    if (rows.count > 0) multiply(rows, e);
  }
}

}  // namespace
