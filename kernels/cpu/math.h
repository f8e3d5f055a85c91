// exp, tanh, the sigmoid and 1/sqrt as polynomials, the same on every machine. Written so that the compiler vectorises
// loops over them.
// Header-only and static: each file that is compiled for an instruction set has its own copy.
#pragma once
#include <cstdint>
#include <cstring>

namespace {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Chooses by masks: of a conditional between results the compiler makes a branch, and then it vectorises nothing.
inline float select(bool condition, float yes, float no) {
  const uint32_t mask = 0u - uint32_t(condition);
  return float_of((bits_of(yes) & mask) | (bits_of(no) & ~mask));
}

// e^x, within 2 ulp for x in [-87, 88]; 0 below (no denormals), about 1.6e38 above.
inline float exp_poly(float x) {
  x = select(x > 88.0f, 88.0f, x);
  const float clamped = select(x < -87.0f, -87.0f, x);
  const float shifted = clamped * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to a whole number
  const float n = shifted - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const float scale = float_of((bits_of(shifted) + 127u) << 23);  // the whole number is in the low bits of `shifted`
  return select(x < -87.0f, 0.0f, p * scale);
}

// 1 / (1 + e^-x), within 3 ulp where that is a normal number.
inline float sigmoid(float x) { return 1.0f / (1.0f + exp_poly(-x)); }

// tanh(x), within 3 ulp: near 0 as a polynomial (Cephes, tanhf), where 1 - 2 / (e^2x + 1) would lose its digits.
inline float tanh_poly(float x) {
  const uint32_t sign = bits_of(x) & 0x80000000u;
  const float magnitude = float_of(bits_of(x) ^ sign);
  const float z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  p = p * z * x + x;
  const float far = 1.0f - 2.0f / (exp_poly(2.0f * magnitude) + 1.0f);
  return select(magnitude < 0.625f, p, float_of(bits_of(far) | sign));
}

// 1/sqrt(x) for normal positive x, within 2 ulp: a first guess from the exponent, then Newton's steps.
inline float rsqrt_poly(float x) {
  float y = float_of(0x5f375a86u - (bits_of(x) >> 1));
  const float half = 0.5f * x;
  y = y * (1.5f - half * y * y);
  y = y * (1.5f - half * y * y);
  y = y * (1.5f - half * y * y);
  return y + y * (0.5f - half * y * y);
}

// Four lanes that are added up in one order, whatever instruction set holds them.
typedef float Lanes __attribute__((vector_size(16)));

inline Lanes load4(const float* p) {
  Lanes v;
  std::memcpy(&v, p, 16);
  return v;
}

// The last 1..3 elements of a row; the other lanes are 0.
inline Lanes load_tail(const float* p, int64_t count) {
  Lanes v = {0, 0, 0, 0};
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
}

inline float add_lanes(Lanes v) { return (v[0] + v[1]) + (v[2] + v[3]); }

// Sum of a[i] * b[i]: four vectors of lanes side by side, since one would wait for its own additions.
inline float dot(const float* a, const float* b, int64_t count) {
  Lanes sum[4] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    for (int j = 0; j < 4; ++j) sum[j] += load4(a + i + 4 * j) * load4(b + i + 4 * j);
  for (; i + 4 <= count; i += 4) sum[0] += load4(a + i) * load4(b + i);
  if (i < count) sum[1] += load_tail(a + i, count - i) * load_tail(b + i, count - i);
  return add_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

}  // namespace
