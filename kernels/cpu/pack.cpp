// From rows of numbers to the layouts of packed.h. Not for an instruction set: a packed matrix fits every CPU. Bound by the
// divisions, which kernels/quantized.py makes in the same order: the results are the same to the bit.
#include <cmath>
#include <cstring>

#include "half.h"
#include "ops.h"
#include "packed.h"

namespace {

constexpr int64_t kMaxGroup = 128;
constexpr int64_t kPiece = 1024;  // of a row of int8, that is rounded before it is packed

// The whole number next to x, ties to even. |x| < 2^22, where the sum has no bits for a fraction.
inline float nearest(float x) { return x + 12582912.0f - 12582912.0f; }

// The largest magnitude; infinity if a number is not finite.
float largest(const float* w, int64_t count) {
  int32_t most = 0;
  for (int64_t k = 0; k < count; ++k) {
    int32_t bits;
    std::memcpy(&bits, w + k, 4);
    most = std::max(most, bits & 0x7fffffff);  // in the order of the magnitudes; NaN is above infinity
  }
  most = std::min(most, 0x7f800000);
  float size;
  std::memcpy(&size, &most, 4);
  return size;
}

// Inputs from.. of row n, `from` a multiple of 4. Returns their sum.
int32_t put(const Int8Matrix& m, int64_t n, const int8_t* q, int64_t from, int64_t count) {
  int8_t* to = const_cast<int8_t*>(m.tile(n / kTile)) + n % kTile * 4 + from * kTile;
  int32_t sum = 0;
  for (int64_t k = 0; k < count; ++k) sum += q[k];
  const int64_t whole = count / 4 * 4;
  for (int64_t k = 0; k < whole; k += 4) std::memcpy(to + k * kTile, q + k, 4);
  if (whole < count) std::memcpy(to + whole * kTile, q + whole, size_t(count - whole));
  return sum;
}

// Group g of row n; what is beyond its end in `q` is 0. Returns the sum of what the numbers stand for.
float put(const Int4Matrix& m, int64_t n, int64_t g, const int8_t* q, uint16_t scale) {
  const int64_t column = n % kTile;
  uint8_t* to = const_cast<uint8_t*>(m.tile(n / kTile)) + g * m.group_bytes(0);
  std::memcpy(to + 2 * column, &scale, 2);
  to += 2 * kTile + column / 16 * 64 + column % 16 * 4;
  int32_t sum = 0;
  for (int64_t k = 0; k < up(m.inputs(g), 8) * 8; k += 8, to += 4 * kTile) {
    uint8_t bytes[4];
    for (int64_t j = 0; j < 4; ++j) {
      sum += q[k + j] + q[k + j + 4];
      bytes[j] = uint8_t((q[k + j] + 8) | (q[k + j + 4] + 8) << 4);
    }
    std::memcpy(to, bytes, 4);
  }
  return float(sum) * widen(scale);
}

}  // namespace

namespace cpu {

int64_t packed_int8_bytes(int64_t N, int64_t K) { return Int8Matrix{nullptr, N, K}.bytes(); }

void pack_int8(uint8_t* out, const int8_t* q, const float* scales, int64_t N, int64_t K) {
  const Int8Matrix m{out, N, K};
  std::memset(out, 0, size_t(m.bytes()));
  std::memcpy(const_cast<float*>(m.scales()), scales, size_t(N) * 4);
  for (int64_t n = 0; n < N; ++n) const_cast<int32_t*>(m.sums())[n] = put(m, n, q + n * K, 0, K);
}

bool round_int8(uint8_t* out, const float* w, int64_t N, int64_t K, int64_t first, int64_t count) {
  const Int8Matrix m{out, N, K};
  for (int64_t n = first; n < first + count; ++n, w += K) {
    const float most = largest(w, K), step = most / 127.0f;
    const float scale = step > 0 ? step : 1.0f;  // of numbers so tiny that it came to 0 as well
    if (!std::isfinite(most)) return false;
    int32_t sum = 0;
    for (int64_t from = 0; from < K; from += kPiece) {
      int8_t q[kPiece];
      const int64_t size = std::min(kPiece, K - from);
      for (int64_t k = 0; k < size; ++k) {
        const float x = nearest(w[from + k] / scale);
        q[k] = int8_t(int32_t(std::min(std::max(x, -127.0f), 127.0f)));
      }
      sum += put(m, n, q, from, size);
    }
    const_cast<int32_t*>(m.sums())[n] = sum;
    const_cast<float*>(m.scales())[n] = scale;
  }
  return true;
}

int64_t packed_int4_bytes(int64_t N, int64_t K, int64_t group) { return Int4Matrix{nullptr, N, K, group}.bytes(); }

void pack_int4(uint8_t* out, const int8_t* q, const uint16_t* scales, int64_t N, int64_t K, int64_t group) {
  const Int4Matrix m{out, N, K, group};
  std::memset(out, 0, size_t(m.bytes()));
  for (int64_t n = 0; n < N; ++n) {
    float total = 0.0f;
    for (int64_t g = 0; g < m.groups(); ++g) {
      int8_t padded[kMaxGroup] = {};
      std::memcpy(padded, q + n * K + g * group, size_t(m.inputs(g)));
      total += put(m, n, g, padded, scales[n * m.groups() + g]);
    }
    const_cast<float*>(m.sums())[n] = total;
  }
}

bool round_int4(uint8_t* out, const float* w, int64_t N, int64_t K, int64_t group, int64_t first, int64_t count) {
  const Int4Matrix m{out, N, K, group};
  for (int64_t n = first; n < first + count; ++n, w += K) {
    float total = 0.0f;
    for (int64_t g = 0; g < m.groups(); ++g) {
      const float* x = w + g * group;
      const int64_t size = m.inputs(g);
      const float most = largest(x, size);
      int64_t place = 0;
      while (place < size - 1 && std::abs(x[place]) != most) ++place;
      const uint16_t half = narrow(x[place] / -8.0f);
      if (!std::isfinite(most) || (half & 0x7c00) == 0x7c00) return false;
      const float scale = (half & 0x7fff) == 0 ? 1.0f : widen(half);
      int8_t q[kMaxGroup] = {};
      for (int64_t k = 0; k < size; ++k) {
        const float rounded = nearest(x[k] / scale);
        q[k] = int8_t(int32_t(std::min(std::max(rounded, -8.0f), 7.0f)));
      }
      total += put(m, n, g, q, half);
    }
    const_cast<float*>(m.sums())[n] = total;
  }
  return true;
}

}  // namespace cpu
