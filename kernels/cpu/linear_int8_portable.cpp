#include "linear_int8.h"

namespace {

struct Sums {
  static constexpr int kMostRows = 1;

  template <int R>
  static void rows(int32_t (*out)[kTile], const uint8_t* q, int64_t, const int8_t* w, int64_t K, const int8_t*) {
    int32_t sums[kTile] = {};
    for (int64_t k = 0; k < K; ++k) {
      const int8_t* of_input = w + k / 4 * 4 * kTile + k % 4;
      for (int64_t n = 0; n < kTile; ++n) sums[n] += int32_t(q[k]) * of_input[4 * n];
    }
    std::memcpy(out, sums, sizeof sums);
  }
};

}  // namespace

namespace cpu {
void linear_int8_portable(Pool& pool, const LinearInt8Args& a) { LinearInt8<Sums>::run(pool, a); }
void expert_linear_int8_portable(Pool& pool, const ExpertLinearInt8Args& a) { LinearInt8<Sums>::run_experts(pool, a); }

// Bound by reading: of each row of the table its bytes lie 128 apart.
void embed_int8_portable(Pool& pool, const EmbedInt8Args& a) {
  pool.for_range(
      a.T, 4,
      [](const void* args, int64_t begin, int64_t end) {
        const auto& e = *static_cast<const EmbedInt8Args*>(args);
        const Int8Matrix m{e.table, e.V, e.M};
        for (int64_t t = begin; t < end; ++t) {
          const int64_t token = e.tokens[t];
          const int8_t* row = m.tile(token / kTile) + token % kTile * 4;
          const float scale = m.scales()[token] * e.scale;
          for (int64_t k = 0; k < e.M; ++k) e.out[t * e.M + k] = float(row[k / 4 * 4 * kTile + k % 4]) * scale;
        }
      },
      &a);
}
}  // namespace cpu
