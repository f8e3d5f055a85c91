// fp16 to fp32, exact. Header-only and static, as math.h is.
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

}  // namespace
