// From rows of whole numbers to the layouts of packed.h. Not for an instruction set: a packed matrix fits every CPU.
#include <cstring>

#include "half.h"
#include "ops.h"
#include "packed.h"

namespace cpu {

int64_t packed_int8_bytes(int64_t N, int64_t K) { return Int8Matrix{nullptr, N, K}.bytes(); }

void pack_int8(uint8_t* out, const int8_t* q, const float* scales, int64_t N, int64_t K) {
  const Int8Matrix m{out, N, K};
  std::memset(out, 0, size_t(m.bytes()));
  auto* sums = const_cast<int32_t*>(m.sums());
  std::memcpy(const_cast<float*>(m.scales()), scales, size_t(N) * 4);
  for (int64_t n = 0; n < N; ++n) {
    const int8_t* row = q + n * K;
    int8_t* to = const_cast<int8_t*>(m.tile(n / kTile)) + n % kTile * 4;
    int32_t sum = 0;
    for (int64_t k = 0; k < K; ++k) sum += row[k];
    for (int64_t k = 0; k < K; k += 4) std::memcpy(to + k * kTile, row + k, size_t(std::min<int64_t>(4, K - k)));
    sums[n] = sum;
  }
}

int64_t packed_int4_bytes(int64_t N, int64_t K, int64_t group) { return Int4Matrix{nullptr, N, K, group}.bytes(); }

void pack_int4(uint8_t* out, const int8_t* q, const uint16_t* scales, int64_t N, int64_t K, int64_t group) {
  const Int4Matrix m{out, N, K, group};
  std::memset(out, 0, size_t(m.bytes()));
  auto* sums = const_cast<float*>(m.sums());
  for (int64_t n = 0; n < N; ++n) {
    const int64_t column = n % kTile;
    uint8_t* to = const_cast<uint8_t*>(m.tile(n / kTile));
    float total = 0.0f;
    for (int64_t g = 0; g < m.groups(); ++g) {
      const int8_t* row = q + n * K + g * group;
      const uint16_t half = scales[n * m.groups() + g];
      std::memcpy(to + 2 * column, &half, 2);
      uint8_t* bytes = to + 2 * kTile + column / 16 * 64 + column % 16 * 4;
      int32_t sum = 0;
      for (int64_t k = 0; k < m.inputs(g); ++k) sum += row[k];
      for (int64_t k = 0; k < up(m.inputs(g), 8) * 8; ++k) {
        // Inputs beyond the group are 0, which is 8 here.
        const uint8_t nibble = uint8_t((k < m.inputs(g) ? row[k] : 0) + 8);
        bytes[k / 8 * 4 * kTile + k % 4] |= uint8_t(k % 8 < 4 ? nibble : nibble << 4);
      }
      total += float(sum) * widen(half);
      to += m.group_bytes(g);
    }
    sums[n] = total;
  }
}

}  // namespace cpu
