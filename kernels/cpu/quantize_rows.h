// fp32 rows to u8, a vector at a time. The same bytes however wide these are: lo and hi do not depend on the order, and every
// other step is one rounding of one element. Bound by reading x.
#pragma once
#include <cstring>

#include "ops.h"
#include "simd.h"

namespace {

struct Quantizer {
  static constexpr int64_t W = kWidth;
  typedef uint8_t Bytes __attribute__((vector_size(kWidth)));

  // Zeros behind the end, which change neither lo nor hi.
  static Vec load(const float* x, int64_t count) { return count >= W ? ::load(x) : load_first(x, count); }

  static void row(uint8_t* q, float* params, const float* x, int64_t K) {
    Vec lo = {}, hi = {};
    Ints bad = {};
    for (int64_t k = 0; k < K; k += W) {
      const Vec v = load(x + k, K - k);
      lo = v < lo ? v : lo;
      hi = v > hi ? v : hi;
      bad |= v != v;
    }
    float least = 0.0f, most = 0.0f;
    bool is_bad = false;
    for (int i = 0; i < W; ++i) {
      least = lo[i] < least ? lo[i] : least;
      most = hi[i] > most ? hi[i] : most;
      is_bad |= bad[i] != 0;
    }
    float scale = (most - least) / 255.0f;
    if (!(scale >= 0x1p-126f)) scale = 1.0f;  // 1 / scale would not be finite for the least of these
    const float inverse = 1.0f / scale;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, to even at the half
    const float zero = -least * inverse + kRound - kRound;
    const Vec shift = Vec{} + kRound, factor = Vec{} + inverse;
    const Ints offset = Ints{} + (int32_t(zero) - 0x4b400000);  // the bits of kRound
    for (int64_t k = 0; k < K; k += W) {
      const Vec rounded = load(x + k, K - k) * factor + shift;
      Ints whole;
      std::memcpy(&whole, &rounded, sizeof whole);
      whole += offset;
      whole = whole < 0 ? Ints{} : whole;
      whole = whole > 255 ? Ints{} + 255 : whole;
      const Bytes bytes = __builtin_convertvector(whole, Bytes);
      if (K - k >= W)
        std::memcpy(q + k, &bytes, sizeof bytes);
      else
        std::memcpy(q + k, &bytes, size_t(K - k));
    }
    params[0] = is_bad ? __builtin_nanf("") : scale;  // no number may come of what is none
    params[1] = zero;
  }

  static void rows(const void* args, int64_t begin, int64_t end) {
    const auto& a = *static_cast<const cpu::QuantizeArgs*>(args);
    for (int64_t t = begin; t < end; ++t) row(a.q + t * a.K, a.params + 2 * t, a.x + t * a.K, a.K);
  }

  static void run(cpu::Pool& pool, const cpu::QuantizeArgs& a) { pool.for_range(a.T, 4, rows, &a); }
};

}  // namespace
