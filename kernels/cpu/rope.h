// Rotary table, and norm + rotation + cache writing after the qkv projection. Threads split tokens.
// For each instruction set as the compiler vectorises it: the file that includes this names it.
#pragma once
#include <cmath>
#include <cstring>

#include "kv.h"
#include "math.h"
#include "ops.h"

namespace {

constexpr int64_t kMaxD = 1024;  // checked by kernels/rope_kv_write/cpu.py

void table_rows(const void* args, int64_t begin, int64_t end) {
  const auto& a = *static_cast<const cpu::RopeTableArgs*>(args);
  for (int64_t t = begin; t < end; ++t) {
    float* row = a.cos_sin + t * 2 * a.half;
    const float* inv_freq = a.inv_freq + (a.variants ? a.variants[t] * a.half : 0);
    for (int64_t i = 0; i < a.half; ++i) {
      const float angle = float(a.positions[t]) * inv_freq[i];
      row[i] = float(std::cos(double(angle)) * double(a.scale));
      row[a.half + i] = float(std::sin(double(angle)) * double(a.scale));
    }
  }
}

// Rotation of a head's first R elements. `out` is not `x`.
void rotate(float* out, const float* x, const float* cos_sin, int64_t D, int64_t R) {
  const int64_t half = R / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float c = cos_sin[i], s = cos_sin[half + i], first = x[i], second = x[half + i];
    out[i] = first * c - second * s;
    out[half + i] = second * c + first * s;
  }
  for (int64_t d = R; d < D; ++d) out[d] = x[d];
}

inline float norm_scale(const float* x, int64_t count, float eps) {
  return rsqrt_poly(dot(x, x, count) / float(count) + eps);
}

// Head h of q or of k: norm where there is a weight, of each head or of all as one row (`row_scale`), then rotation.
void write_head(float* out, const float* x, int64_t h, const float* norm, float row_scale, const float* cos_sin,
                const cpu::RopeKvWriteArgs& a) {
  const float* head = x + h * a.D;
  float normed[kMaxD];
  if (norm) {
    const float* weight = a.is_row_norm ? norm + h * a.D : norm;
    const float scale = a.is_row_norm ? row_scale : norm_scale(head, a.D, a.eps);
    for (int64_t d = 0; d < a.D; ++d) normed[d] = head[d] * scale * weight[d];
    head = normed;
  }
  rotate(out, head, cos_sin, a.D, a.R);
}

template <typename Element>
void write_rows(const void* args, int64_t begin, int64_t end) {
  const auto& a = *static_cast<const cpu::RopeKvWriteArgs*>(args);
  for (int64_t t = begin; t < end; ++t) {
    const float* q = a.qkv + t * (a.H + 2 * a.G) * a.D;
    const float *k = q + a.H * a.D, *v = k + a.G * a.D;
    const float* cos_sin = a.cos_sin + t * a.R;
    const float q_scale = a.q_norm && a.is_row_norm ? norm_scale(q, a.H * a.D, a.eps) : 0.0f;
    for (int64_t h = 0; h < a.H; ++h)
      write_head(a.q + (t * a.H + h) * a.D, q, h, a.q_norm, q_scale, cos_sin, a);
    if (a.slots[t] < 0) continue;
    const int64_t block = a.slots[t] / a.S, offset = a.slots[t] % a.S;
    const Kv<Element> kv{a.G, a.S, a.D};
    uint8_t* cache = static_cast<uint8_t*>(a.kv_cache);
    const float row_scale = a.k_norm && a.is_row_norm ? norm_scale(k, a.G * a.D, a.eps) : 0.0f;
    for (int64_t g = 0; g < a.G; ++g) {
      float rotated[kMaxD];
      write_head(rotated, k, g, a.k_norm, row_scale, cos_sin, a);
      put_token(kv, kv.plane(cache, block, 0, g), offset, a.S, offset, rotated);
      put_token(kv, kv.plane(cache, block, 1, g), offset * a.D, 1, offset, v + g * a.D);
    }
  }
}

// In the order of KvType.
constexpr cpu::Task* kWrite[] = {write_rows<float>, write_rows<uint16_t>, write_rows<int8_t>};

}  // namespace

namespace cpu {
void VIVACE_ISA(rope_table)(Pool& pool, const RopeTableArgs& a) { pool.for_range(a.T, 8, table_rows, &a); }
void VIVACE_ISA(rope_kv_write)(Pool& pool, const RopeKvWriteArgs& a) { pool.for_range(a.T, 4, kWrite[a.kv_type], &a); }
}  // namespace cpu
