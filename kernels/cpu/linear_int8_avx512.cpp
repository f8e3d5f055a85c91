#include <immintrin.h>

#include "linear_int8.h"

namespace {

struct Sums {
  static constexpr int kMostRows = 12;  // 24 sums, 2 vectors of weights and one of a row: 27 of 32 registers

  template <int R>
  static void rows(int32_t (*out)[kTile], const uint8_t* q, int64_t stride, const int8_t* w, int64_t K) {
    __m512i left[R], right[R];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) left[r] = right[r] = _mm512_setzero_si512();
    const auto step = [&](const int8_t* at, const auto& word_of) __attribute__((always_inline)) {
      const __m512i w0 = _mm512_loadu_si512(at), w1 = _mm512_loadu_si512(at + 64);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const __m512i x = _mm512_set1_epi32(int(word_of(q + r * stride)));
        left[r] = _mm512_dpbusd_epi32(left[r], x, w0);
        right[r] = _mm512_dpbusd_epi32(right[r], x, w1);
        asm("" : "+v"(left[r]), "+v"(right[r]));  // gcc 12 would keep them on the stack
      }
    };
    int64_t k = 0;
    for (; k + 4 <= K; k += 4) {
      const int8_t* at = w + k * kTile;
      _mm_prefetch(reinterpret_cast<const char*>(at) + 2048, _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(at) + 2048 + 64, _MM_HINT_T0);
      step(at, [k](const uint8_t* row) {
        uint32_t four;
        std::memcpy(&four, row + k, 4);
        return four;
      });
    }
    if (k < K) step(w + k * kTile, [k, K](const uint8_t* row) { return word(row + k, K - k); });
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      _mm512_store_si512(out[r], left[r]);
      _mm512_store_si512(out[r] + 16, right[r]);
    }
  }
};

}  // namespace

namespace cpu {
void linear_int8_avx512(Pool& pool, const LinearInt8Args& a) { LinearInt8<Sums>::run(pool, a); }
}  // namespace cpu
