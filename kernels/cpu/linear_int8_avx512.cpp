#include <immintrin.h>

#include "linear_int8.h"

namespace {

template <int R>
inline void sum(int32_t (*out)[kTile], const uint8_t* q, int64_t stride, const int8_t* w, int64_t K) {
  __m512i sums[R][2];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) sums[r][c] = _mm512_setzero_si512();
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
    const int8_t* at = w + k * kTile;
    for (int c = 0; c < 2; ++c) _mm_prefetch(reinterpret_cast<const char*>(at) + 2048 + 64 * c, _MM_HINT_T0);
    step(at, [k](const uint8_t* row) {
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
  static constexpr int kMostRows = 12;  // 24 sums, 2 vectors of weights and one of a row: 27 of 32 registers

  template <int R>
  static void rows(int32_t (*out)[kTile], const uint8_t* q, int64_t stride, const int8_t* w, int64_t K) {
    sum<R>(out, q, stride, w, K);
  }
};

}  // namespace

namespace cpu {
void linear_int8_avx512(Pool& pool, const LinearInt8Args& a) { LinearInt8<Sums>::run(pool, a); }
void expert_linear_int8_avx512(Pool& pool, const ExpertLinearInt8Args& a) { LinearInt8<Sums>::run_experts(pool, a); }
}  // namespace cpu
