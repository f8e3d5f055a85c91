// The KV cache: [N blocks, 2, G KV heads] planes of S tokens, first of K, then of V. A plane of K is [D, S], so that a query meets
// a vector of tokens, of V [S, D]. Elements are fp32, bf16, or int8 with a scale for each token in fp32, [S] behind the elements.
// A unit is what block-sparse decode selects by, a part of a block: see kernels/selection.py.
// Header-only and static, as math.h is.
#pragma once
#include <cmath>
#include <cstring>

#include "math.h"

namespace {

enum KvType { kFp32, kBf16, kInt8 };  // kernels.cpu.library.kv_type

template <typename Element>
struct Kv {
  static constexpr bool kHasScales = sizeof(Element) == 1;
  int64_t G, S, D;

  int64_t plane_bytes() const { return S * (D * int64_t(sizeof(Element)) + (kHasScales ? 4 : 0)); }

  // The plane of a block's K (0) or V (1).
  template <typename Byte>
  Byte* plane(Byte* cache, int64_t block, int64_t which, int64_t g) const {
    return cache + ((block * 2 + which) * G + g) * plane_bytes();
  }

  const uint8_t* scales(const uint8_t* plane) const { return plane + S * D * int64_t(sizeof(Element)); }
};

constexpr int64_t unit_tokens(int64_t S) { return S % 16 ? S : 16; }

inline float from_element(float x) { return x; }
inline float from_element(uint16_t x) { return float_of(uint32_t(x) << 16); }
inline float from_element(int8_t x) { return float(x); }

// To the nearest, halves to even.
inline void to_element(float& to, float x, float) { to = x; }
inline void to_element(uint16_t& to, float x, float) {
  const uint32_t bits = bits_of(x);
  to = uint16_t(x != x ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}
inline void to_element(int8_t& to, float x, float inverse) {
  const float rounded = x * inverse + 12582912.0f - 12582912.0f;  // 1.5 * 2^23
  to = int8_t(rounded > 127.0f ? 127.0f : rounded > -128.0f ? rounded : -128.0f);
}

// A token of one plane: elements `stride` apart, and its scale: the number of the largest magnitude becomes -128. 1 if all are 0;
// a NaN makes the scale one.
template <typename Element>
inline void put_token(const Kv<Element>& kv, uint8_t* plane, int64_t first, int64_t stride, int64_t token, const float* x) {
  float inverse = 1.0f;
  if constexpr (Kv<Element>::kHasScales) {
    float low = 0.0f, high = 0.0f;
    bool is_bad = false;
    for (int64_t d = 0; d < kv.D; ++d) {
      low = x[d] < low ? x[d] : low;
      high = x[d] > high ? x[d] : high;
      is_bad |= x[d] != x[d];
    }
    float scale = (high >= -low ? high : low) / -128.0f;
    if (scale == 0.0f) scale = 1.0f;
    inverse = 1.0f / scale;
    if (is_bad) scale = __builtin_nanf("");
    std::memcpy(plane + kv.S * kv.D + token * 4, &scale, 4);
  }
  Element* out = reinterpret_cast<Element*>(plane) + first;
  for (int64_t d = 0; d < kv.D; ++d) to_element(out[d * stride], x[d], inverse);
}

template <typename Element>
inline void get_token(const Kv<Element>& kv, const uint8_t* plane, int64_t first, int64_t stride, int64_t token, float* x) {
  float scale = 1.0f;
  if constexpr (Kv<Element>::kHasScales) std::memcpy(&scale, kv.scales(plane) + token * 4, 4);
  const Element* in = reinterpret_cast<const Element*>(plane) + first;
  for (int64_t d = 0; d < kv.D; ++d) x[d] = from_element(in[d * stride]) * scale;
}

}  // namespace
