// fp16 to fp32, exact, and back, to the nearest, ties to even. Header-only and static, as math.h is.
#pragma once
#include <cstdint>
#include <cstring>

namespace {

inline float widen(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
  const uint32_t above = exponent == 31 ? 255 : exponent + 112;
  const float tiny = float(fraction) * 5.9604644775390625e-8f;  // 2^-24
  uint32_t bits;
  std::memcpy(&bits, &tiny, 4);
  if (exponent != 0) bits = above << 23 | fraction << 13;
  bits |= sign;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint16_t narrow(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return uint16_t(sign | 0x7e00);  // NaN
  if (size >= 0x47800000) return uint16_t(sign | 0x7c00);
  if (size >= 0x38800000) return uint16_t(sign | (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13);
  float half_ulps = 0.5f;  // whose last bit is the smallest number of fp16: the sum rounds to it
  float magnitude;
  std::memcpy(&magnitude, &size, 4);
  half_ulps += magnitude;
  std::memcpy(&bits, &half_ulps, 4);
  return uint16_t(sign | (bits - 0x3f000000));
}

}  // namespace
