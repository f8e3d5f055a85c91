// What is applied to each element by itself: gated activations, soft caps, the adding of residuals. Bound by memory, the
// gates that need erf by arithmetic. Threads split rows or elements.
// For each instruction set as the compiler vectorises it: the file that includes this names it.
#pragma once
#include <cmath>

#include "math.h"
#include "ops.h"
#include "quantize_rows.h"

namespace {

using Gate = float(float gate, float up, const cpu::GatedArgs& a);

inline float silu(float gate, float up, const cpu::GatedArgs&) { return gate / (1.0f + exp_poly(-gate)) * up; }

inline float gelu(float gate, float up, const cpu::GatedArgs&) {
  return 0.5f * gate * (1.0f + std::erf(gate * 0.707106781186547524f)) * up;
}

inline float gelu_tanh(float gate, float up, const cpu::GatedArgs&) {
  const float inner = 0.797884560802865356f * (gate + 0.044715f * gate * gate * gate);  // sqrt(2 / pi)
  return 0.5f * gate * (1.0f + tanh_poly(inner)) * up;
}

inline float clamped_swiglu(float gate, float up, const cpu::GatedArgs& a) {
  const float g = gate > a.limit ? a.limit : gate;
  const float u = up > a.limit ? a.limit : up < -a.limit ? -a.limit : up;
  return g * sigmoid(a.alpha * g) * (u + 1.0f);
}

// `a` is a copy, which `out` cannot overlap.
template <Gate* act>
inline void gated_row(float* out, int64_t t, const cpu::GatedArgs a) {
  const float* gate = a.gate_up + 2 * t * a.F;
  const float* up = gate + a.F;
  for (int64_t f = 0; f < a.F; ++f) out[f] = act(gate[f], up[f], a);
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
  float row[cpu::kMostInputs];
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
