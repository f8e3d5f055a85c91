// y = x W^T + bias, and the same with a matrix for each expert, in plain C++. Threads split the outputs N.
//
// Bound by reading W while there are few rows, by multiplying from about 8 rows on.
#include <algorithm>

#include "linear_tile.h"
#include "ops.h"

namespace {

void piece(const void* args, int64_t begin, int64_t end) {
  const auto& a = *static_cast<const cpu::LinearArgs*>(args);
  Rows rows;
  for (int64_t t = 0; t < a.T; t += kRowTile) {
    rows.count = std::min(a.T - t, kRowTile);
    for (int64_t r = 0; r < rows.count; ++r) {
      rows.x[r] = a.x + (t + r) * a.K;
      rows.out[r] = a.out + (t + r) * a.N;
    }
    multiply(rows, {a.weight, a.bias, a.K}, begin, end);
  }
}

// Expert by expert: the slots (t, k) that chose it, a tile at a time.
void expert_piece(const void* args, int64_t begin, int64_t end) {
  const auto& a = *static_cast<const cpu::ExpertLinearArgs*>(args);
  const int64_t num_slots = a.T * a.K;
  Rows rows;
  for (int64_t e = 0; e < a.E; ++e) {
    const Matrix expert{a.weight + e * a.N * a.I, a.bias ? a.bias + e * a.N : nullptr, a.I};
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

}  // namespace

namespace cpu {
void linear_portable(Pool& pool, const LinearArgs& a) {
  if (a.T > 0) pool.for_range(a.N, 16, piece, &a);
}
void expert_linear_portable(Pool& pool, const ExpertLinearArgs& a) {
  if (a.T > 0) pool.for_range(a.N, 16, expert_piece, &a);
}
}  // namespace cpu
