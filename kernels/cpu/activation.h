// What is applied to each element by itself: gated activations, soft caps, the adding of residuals. Bound by memory, the
// gates that need erf by arithmetic. Threads split rows or elements.
// For each instruction set in its vectors: the file that includes this names it.
#pragma once
#include <cmath>

#include "math.h"
#include "ops.h"
#include "quantize_rows.h"
#include "simd.h"

namespace {

using Gate = Vec(Vec gate, Vec up, const cpu::GatedArgs& a);

inline Vec least(Vec a, Vec b) { return b < a ? b : a; }  // a NaN among `a` stays one
inline Vec most(Vec a, Vec b) { return b > a ? b : a; }

// 1 / (1 + e^-x), within 3 ulp where that is a normal number.
inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp_of(least(-x, broadcast(88.0f)))); }

// tanh(x), within 3 ulp; `tanh_poly` of math.h in vectors.
inline Vec tanh_of(Vec x) {
  const Ints sign = (Ints)x & int32_t(0x80000000);
  const Vec magnitude = (Vec)((Ints)x ^ sign), z = x * x;
  Vec p = broadcast(-5.70498872745e-3f);
  p = fma(p, z, broadcast(2.06390887954e-2f));
  p = fma(p, z, broadcast(-5.37397155531e-2f));
  p = fma(p, z, broadcast(1.33314422036e-1f));
  p = fma(p, z, broadcast(-3.33332819422e-1f));
  p = fma(p * z, x, x);
  const Vec far = 1.0f - 2.0f / (exp_of(least(2.0f * magnitude, broadcast(88.0f))) + 1.0f);
  return magnitude < broadcast(0.625f) ? p : (Vec)((Ints)far | sign);
}

inline Vec silu(Vec gate, Vec up, const cpu::GatedArgs&) { return gate * sigmoid(gate) * up; }

inline Vec gelu(Vec gate, Vec up, const cpu::GatedArgs&) {
  Vec half;
  for (int i = 0; i < kWidth; ++i) half[i] = 0.5f * (1.0f + std::erf(gate[i] * 0.707106781186547524f));
  return gate * half * up;
}

inline Vec gelu_tanh(Vec gate, Vec up, const cpu::GatedArgs&) {
  const Vec inner = 0.797884560802865356f * (gate + 0.044715f * gate * gate * gate);  // sqrt(2 / pi)
  return 0.5f * gate * (1.0f + tanh_of(inner)) * up;
}

inline Vec clamped_swiglu(Vec gate, Vec up, const cpu::GatedArgs& a) {
  const Vec g = least(gate, broadcast(a.limit));
  const Vec u = most(least(up, broadcast(a.limit)), broadcast(-a.limit));
  return g * sigmoid(a.alpha * g) * (u + 1.0f);
}

template <Gate* act>
inline void gated_row(float* out, int64_t t, const cpu::GatedArgs& a) {
  const float* gate = a.gate_up + 2 * t * a.F;
  const float* up = gate + a.F;
  int64_t f = 0;
  for (; f + kWidth <= a.F; f += kWidth) store(out + f, act(load(gate + f), load(up + f), a));
  if (const int64_t left = a.F - f; left > 0)
    store_first(out + f, act(load_first(gate + f, left), load_first(up + f, left), a), left);
}

template <Gate* act>
void gated_rows(const void* args, int64_t begin, int64_t end) {
  const auto& a = *static_cast<const cpu::GatedArgs*>(args);
  for (int64_t t = begin; t < end; ++t) gated_row<act>(a.out + t * a.F, t, a);
}

template <Gate* act>
void gated_byte_rows(const void* args, int64_t begin, int64_t end) {
  const auto& a = *static_cast<const cpu::GatedQuantizeArgs*>(args);
  const int64_t F = a.of.F;
  alignas(64) float row[cpu::kMostInputs];
  for (int64_t t = begin; t < end; ++t) {
    gated_row<act>(row, t, a.of);
    Quantizer::row(a.q + t * F, a.params + 2 * t, row, F);
  }
}

// In the order of kernels.gated.ACTIVATIONS.
constexpr cpu::Task* kGated[] = {gated_rows<silu>, gated_rows<gelu>, gated_rows<gelu_tanh>, gated_rows<clamped_swiglu>};
constexpr cpu::Task* kGatedBytes[] = {gated_byte_rows<silu>, gated_byte_rows<gelu>, gated_byte_rows<gelu_tanh>,
                                      gated_byte_rows<clamped_swiglu>};

void capped(const void* args, int64_t begin, int64_t end) {
  const cpu::SoftcapArgs a = *static_cast<const cpu::SoftcapArgs*>(args);
  for (int64_t i = begin; i < end; ++i) a.out[i] = a.cap * tanh_poly(a.x[i] / a.cap);
}

void added(const void* args, int64_t begin, int64_t end) {
  const cpu::AddArgs a = *static_cast<const cpu::AddArgs*>(args);
  for (int64_t i = begin; i < end; ++i) a.out[i] = a.x[i] + a.residual[i];
}

}  // namespace

namespace cpu {
void VIVACE_ISA(gated)(Pool& pool, const GatedArgs& a) { pool.for_range(a.T, 8, kGated[a.activation], &a); }
void VIVACE_ISA(gated_quantize)(Pool& pool, const GatedQuantizeArgs& a) {
  pool.for_range(a.of.T, 4, kGatedBytes[a.of.activation], &a);
}
void VIVACE_ISA(softcap)(Pool& pool, const SoftcapArgs& a) { pool.for_range(a.count, 4096, capped, &a); }
void VIVACE_ISA(add)(Pool& pool, const AddArgs& a) { pool.for_range(a.count, 16384, added, &a); }
}  // namespace cpu
