// Rotary table, and norm + rotation + cache writing after the qkv projection. Threads split tokens.
#include <cmath>
#include <cstring>

#include "math.h"
#include "ops.h"

namespace {

void table_rows(const void* args, int64_t begin, int64_t end) {
  const auto& a = *static_cast<const cpu::RopeTableArgs*>(args);
  for (int64_t t = begin; t < end; ++t) {
    float* row = a.cos_sin + t * 2 * a.half;
    for (int64_t i = 0; i < a.half; ++i) {
      const float angle = float(a.positions[t]) * a.inv_freq[i];
      row[i] = float(std::cos(double(angle)) * double(a.scale));
      row[a.half + i] = float(std::sin(double(angle)) * double(a.scale));
    }
  }
}

// One head: norm where there is a weight, then rotation of its first R elements. `out` is not `x`.
void rotate(float* out, const float* x, const float* norm, const float* cos_sin, int64_t D, int64_t R,
            float eps) {
  float normed[1024];
  if (norm) {
    const float scale = rsqrt_poly(dot(x, x, D) / float(D) + eps);
    for (int64_t d = 0; d < D; ++d) normed[d] = x[d] * scale * norm[d];
    x = normed;
  }
  const int64_t half = R / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float c = cos_sin[i], s = cos_sin[half + i], first = x[i], second = x[half + i];
    out[i] = first * c - second * s;
    out[half + i] = second * c + first * s;
  }
  for (int64_t d = R; d < D; ++d) out[d] = x[d];
}

void write_rows(const void* args, int64_t begin, int64_t end) {
  const auto& a = *static_cast<const cpu::RopeKvWriteArgs*>(args);
  for (int64_t t = begin; t < end; ++t) {
    const float* row = a.qkv + t * (a.H + 2 * a.G) * a.D;
    const float* cos_sin = a.cos_sin + t * a.R;
    for (int64_t h = 0; h < a.H; ++h)
      rotate(a.q + (t * a.H + h) * a.D, row + h * a.D, a.q_norm, cos_sin, a.D, a.R, a.eps);
    if (a.slots[t] < 0) continue;
    const int64_t block = a.slots[t] / a.S, offset = a.slots[t] % a.S;
    for (int64_t g = 0; g < a.G; ++g) {
      float* k = a.kv_cache + (((block * 2) * a.G + g) * a.S + offset) * a.D;
      rotate(k, row + (a.H + g) * a.D, a.k_norm, cos_sin, a.D, a.R, a.eps);
      std::memcpy(k + a.G * a.S * a.D, row + (a.H + a.G + g) * a.D, size_t(a.D) * 4);
    }
  }
}

}  // namespace

namespace cpu {
void rope_table_portable(Pool& pool, const RopeTableArgs& a) { pool.for_range(a.T, 8, table_rows, &a); }
void rope_kv_write_portable(Pool& pool, const RopeKvWriteArgs& a) { pool.for_range(a.T, 4, write_rows, &a); }
}  // namespace cpu
