#include <immintrin.h>

#include "linear_int8.h"

namespace {

// Sums over K inputs, added to what `out` has unless it `begins`. At each step 128 bytes of `ahead` are fetched, or, where
// `kIsPart`, half of them, since the same inputs pass twice.
template <int R, bool kIsPart>
[[gnu::noinline]] void sum(int32_t (*out)[kTile], const uint8_t* q, int64_t stride, const int8_t* w, int64_t K, const int8_t* ahead,
                           bool begins) {
  __m512i sums[R][2];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) sums[r][c] = _mm512_setzero_si512();
  if (kIsPart && !begins)
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) sums[r][c] = _mm512_load_si512(out[r] + 16 * c);
  const auto step = [&](const int8_t* at, const auto& word_at) __attribute__((always_inline)) {
    __m512i v[2];
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) v[c] = _mm512_loadu_si512(at + 64 * c);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const __m512i x = _mm512_set1_epi32(int(word_at(q + r * stride)));
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) {
        sums[r][c] = _mm512_dpbusd_epi32(sums[r][c], x, v[c]);
        asm("" : "+v"(sums[r][c]));  // gcc 12 would keep them on the stack
      }
    }
  };
  int64_t k = 0;
  for (; k + 4 <= K; k += 4) {
    constexpr int kLines = kIsPart ? 1 : 2;
    for (int line = 0; line < kLines; ++line)
      _mm_prefetch(reinterpret_cast<const char*>(ahead) + 16 * kLines * k + 64 * line, _MM_HINT_T0);
    step(w + k * kTile, [k](const uint8_t* row) {
      uint32_t four;
      std::memcpy(&four, row + k, 4);
      return four;
    });
  }
  if (k < K) step(w + k * kTile, [k, K](const uint8_t* row) { return word(row + k, K - k); });
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) _mm512_store_si512(out[r] + 16 * c, sums[r][c]);
}

struct Sums {
  static constexpr int kMostRows = 12;   // 24 sums, 2 vectors of weights and one of a row: 27 of 32 registers
  static constexpr int64_t kPart = 512;  // inputs: twice 16 KB of weights and 8 KB of rows are in the cache

  template <int R>
  static void rows(int32_t (*out)[kTile], const uint8_t* q, int64_t stride, const int8_t* w, int64_t K, const int8_t* next) {
    if constexpr (R <= kMostRows) {
      sum<R, false>(out, q, stride, w, K, next ? next : w + 2048, true);
    } else {
      // Part by part twice 8 rows, which fetch the next part meanwhile: so memory works as long as the multipliers do.
      static_assert(R == 16);
      const int64_t part = up(up(K, std::max<int64_t>(up(K, kPart), 1)), 4) * 4;
      int64_t k = 0;
      do {
        const int64_t inputs = std::min(part, K - k);
        const int8_t *at = w + k * kTile, *ahead = at + up(inputs, 4) * 4 * kTile;
        sum<8, true>(out, q + k, stride, at, inputs, ahead, k == 0);
        sum<8, true>(out + 8, q + 8 * stride + k, stride, at, inputs, ahead + inputs * kTile / 2, k == 0);
      } while ((k += part) < K);
    }
  }
};

}  // namespace

namespace cpu {
void linear_int8_avx512(Pool& pool, const LinearInt8Args& a) { LinearInt8<Sums>::run(pool, a); }
void expert_linear_int8_avx512(Pool& pool, const ExpertLinearInt8Args& a) { LinearInt8<Sums>::run_experts(pool, a); }
}  // namespace cpu
