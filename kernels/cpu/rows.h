// The ops that are one pass over rows: embedding, taking rows, norms, the cache's reading.
// All bound by memory. Threads split rows; a row is one thread's.
// For each instruction set as the compiler vectorises it: the file that includes this names it.
#pragma once
#include <cstring>

#include "kv.h"
#include "math.h"
#include "ops.h"
#include "quantize_rows.h"
#include "simd.h"

namespace {

template <typename Args>
inline const Args& as(const void* args) {
  return *static_cast<const Args*>(args);
}

// Sum of x[i]^2: four vectors side by side, since one would wait for its own additions.
inline float squares(const float* x, int64_t count) {
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kWidth <= count; i += 4 * kWidth)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Vec v = load(x + i + j * kWidth);
      sums[j] = fma(v, v, sums[j]);
    }
  for (; i < count; i += kWidth) {
    const Vec v = load_first(x + i, count - i);
    sums[0] = fma(v, v, sums[0]);
  }
  return add_all((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

void norm_row(float* out, const float* x, const float* weight, int64_t M, float eps) {
  const float scale = rsqrt_poly(squares(x, M) / float(M) + eps);
  for (int64_t m = 0; m < M; ++m) out[m] = x[m] * scale * weight[m];
}

template <typename Element>
void embed_rows(const void* args, int64_t begin, int64_t end) {
  const auto& a = as<cpu::EmbedArgs>(args);
  for (int64_t t = begin; t < end; ++t) {
    const Element* row = static_cast<const Element*>(a.table) + int64_t(a.tokens[t]) * a.M;
    for (int64_t m = 0; m < a.M; ++m) a.out[t * a.M + m] = from_element(row[m]) * a.scale;
  }
}

void taken_rows(const void* args, int64_t begin, int64_t end) {
  const auto& a = as<cpu::TakeRowsArgs>(args);
  for (int64_t r = begin; r < end; ++r)
    std::memcpy(a.out + r * a.M, a.x + int64_t(a.rows[r]) * a.M, size_t(a.M) * 4);
}

void norm_rows(const void* args, int64_t begin, int64_t end) {
  const auto& a = as<cpu::RmsnormArgs>(args);
  for (int64_t t = begin; t < end; ++t) norm_row(a.out + t * a.M, a.x + t * a.M, a.weight, a.M, a.eps);
}

void add_norm_rows(const void* args, int64_t begin, int64_t end) {
  const auto& a = as<cpu::AddRmsnormArgs>(args);
  for (int64_t t = begin; t < end; ++t) {
    float* sum = a.sum + t * a.M;
    for (int64_t m = 0; m < a.M; ++m) sum[m] = a.x[t * a.M + m] + a.residual[t * a.M + m];
    norm_row(a.out + t * a.M, sum, a.weight, a.M, a.eps);
  }
}

void norm_byte_rows(const void* args, int64_t begin, int64_t end) {
  const auto& a = as<cpu::RmsnormQuantizeArgs>(args);
  const int64_t M = a.of.M;
  float row[cpu::kMostInputs];
  for (int64_t t = begin; t < end; ++t) {
    norm_row(row, a.of.x + t * M, a.of.weight, M, a.of.eps);
    Quantizer::row(a.q + t * M, a.params + 2 * t, row, M);
  }
}

void add_norm_byte_rows(const void* args, int64_t begin, int64_t end) {
  const auto& a = as<cpu::AddRmsnormQuantizeArgs>(args);
  const int64_t M = a.of.M;
  float row[cpu::kMostInputs];
  for (int64_t t = begin; t < end; ++t) {
    float* sum = a.of.sum + t * M;
    for (int64_t m = 0; m < M; ++m) sum[m] = a.of.x[t * M + m] + a.of.residual[t * M + m];
    norm_row(row, sum, a.of.weight, M, a.of.eps);
    Quantizer::row(a.q + t * M, a.params + 2 * t, row, M);
  }
}

template <typename Element>
void read_rows(const void* args, int64_t begin, int64_t end) {
  const auto& a = as<cpu::KvReadArgs>(args);
  const Kv<Element> kv{a.G, a.S, a.D};
  const uint8_t* cache = static_cast<const uint8_t*>(a.kv_cache);
  for (int64_t t = begin; t < end; ++t)
    for (int64_t g = 0; g < a.G; ++g) {
      const int64_t block = a.slots[t] / a.S, offset = a.slots[t] % a.S, at = (t * a.G + g) * a.D;
      get_token(kv, kv.plane(cache, block, 0, g), offset, a.S, offset, a.k + at);
      get_token(kv, kv.plane(cache, block, 1, g), offset * a.D, 1, offset, a.v + at);
    }
}

// In the order of KvType.
constexpr cpu::Task* kRead[] = {read_rows<float>, read_rows<uint16_t>, read_rows<int8_t>};

}  // namespace

namespace cpu {
void VIVACE_ISA(embed)(Pool& pool, const EmbedArgs& a) {
  pool.for_range(a.T, 64, a.is_bf16 ? embed_rows<uint16_t> : embed_rows<float>, &a);
}
void VIVACE_ISA(take_rows)(Pool& pool, const TakeRowsArgs& a) { pool.for_range(a.R, 64, taken_rows, &a); }
void VIVACE_ISA(rmsnorm)(Pool& pool, const RmsnormArgs& a) { pool.for_range(a.T, 8, norm_rows, &a); }
void VIVACE_ISA(add_rmsnorm)(Pool& pool, const AddRmsnormArgs& a) { pool.for_range(a.T, 8, add_norm_rows, &a); }
void VIVACE_ISA(rmsnorm_quantize)(Pool& pool, const RmsnormQuantizeArgs& a) {
  pool.for_range(a.of.T, 4, norm_byte_rows, &a);
}
void VIVACE_ISA(add_rmsnorm_quantize)(Pool& pool, const AddRmsnormQuantizeArgs& a) {
  pool.for_range(a.of.T, 4, add_norm_byte_rows, &a);
}
void VIVACE_ISA(kv_read)(Pool& pool, const KvReadArgs& a) { pool.for_range(a.T, 64, kRead[a.kv_type], &a); }
}  // namespace cpu
