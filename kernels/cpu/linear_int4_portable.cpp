#include "half.h"
#include "linear_int4.h"

namespace {

struct Sums {
  static constexpr int kMostRows = 1;
  static constexpr int kPanelFrom = 0;

  template <int R>
  static void rows(float (*out)[kTile], const uint8_t* q, int64_t, const Int4Matrix& m, int64_t tile) {
    const uint8_t* at = m.tile(tile);
    float total[kTile] = {};
    for (int64_t g = 0; g < m.groups(); ++g) {
      const uint8_t* x = q + g * m.group;
      int32_t sums[kTile] = {};
      for (int64_t k = 0; k < m.inputs(g); ++k) {
        const uint8_t* of_input = at + 2 * kTile + k / 8 * 4 * kTile + k % 4;
        const int shift = k % 8 < 4 ? 0 : 4;
        for (int64_t n = 0; n < kTile; ++n) sums[n] += int32_t(x[k]) * ((of_input[4 * n] >> shift & 15) - 8);
      }
      for (int64_t n = 0; n < kTile; ++n) {
        uint16_t half;
        std::memcpy(&half, at + 2 * n, 2);
        total[n] = total[n] + float(sums[n]) * widen(half);
      }
      at += m.group_bytes(g);
    }
    std::memcpy(out, total, sizeof total);
  }
};

}  // namespace

namespace cpu {
void linear_int4_portable(Pool& pool, const LinearInt4Args& a) { LinearInt4<Sums>::run(pool, a); }
void expert_linear_int4_portable(Pool& pool, const ExpertLinearInt4Args& a) { LinearInt4<Sums>::run_experts(pool, a); }
}  // namespace cpu
