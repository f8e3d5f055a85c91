// exp and 1/sqrt as polynomials, the same on every machine. Written so that the compiler vectorises loops over them.
// Header-only and static: each file that is compiled for an instruction set has its own copy.
#pragma once
#include <cstdint>
#include <cstring>

namespace {

// e^x, within 2 ulp for x in [-87, 88]; 0 below (no denormals), about 1.6e38 above.
inline float exp_poly(float x) {
  x = x > 88.0f ? 88.0f : x;
  const float clamped = x < -87.0f ? -87.0f : x;
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
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  const uint32_t power = (uint32_t(bits) + 127u) << 23;  // the whole number is in the low bits of `shifted`
  float scale;
  std::memcpy(&scale, &power, 4);
  return x < -87.0f ? 0.0f : p * scale;
}

// 1/sqrt(x) for normal positive x, within 2 ulp: a first guess from the exponent, then Newton's steps.
inline float rsqrt_poly(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = 0x5f375a86 - (bits >> 1);
  float y;
  std::memcpy(&y, &bits, 4);
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
