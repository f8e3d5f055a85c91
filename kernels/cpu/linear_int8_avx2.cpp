// Without VNNI: bytes are widened to 16 bits, whose products of two are added without loss. (`maddubs` would saturate.)
#include <immintrin.h>

#include "linear_int8.h"

namespace {

// C vectors of 4 outputs, from `w` on, for R rows.
template <int R, int C>
inline void sum(int32_t (*out)[kTile], const uint8_t* q, int64_t stride, const int8_t* w, int64_t K) {
  __m256i sums[R][C];  // of each output two lanes: inputs 0 and 1 of four, and 2 and 3
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sums[r][c] = _mm256_setzero_si256();
  const auto step = [&](const int8_t* at, const auto& word_at) __attribute__((always_inline)) {
    __m256i x[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) x[r] = _mm256_cvtepu8_epi16(_mm_set1_epi32(int(word_at(q + r * stride))));
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const __m256i v = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at + 16 * c)));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        sums[r][c] = _mm256_add_epi32(sums[r][c], _mm256_madd_epi16(x[r], v));
        asm("" : "+x"(sums[r][c]));  // gcc 12 would keep them on the stack
      }
    }
  };
  int64_t k = 0;
  for (; k + 4 <= K; k += 4) {
    const int8_t* at = w + k * kTile;
    for (int line = 0; line < C / 4; ++line)
      _mm_prefetch(reinterpret_cast<const char*>(at) + 2048 + 64 * line, _MM_HINT_T0);
    step(at, [k](const uint8_t* row) {
      uint32_t four;
      std::memcpy(&four, row + k, 4);
      return four;
    });
  }
  if (k < K) step(w + k * kTile, [k, K](const uint8_t* row) { return word(row + k, K - k); });
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; c += 2) {  // hadd leaves [0 1 4 5 2 3 6 7]
      const __m256i mixed = _mm256_hadd_epi32(sums[r][c], sums[r][c + 1]);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out[r] + 4 * c), _mm256_permute4x64_epi64(mixed, 0xd8));
    }
}

struct Sums {
  static constexpr int kMostRows = 3;  // 12 sums, 3 vectors of rows and one of weights: all 16 registers

  template <int R>
  static void rows(int32_t (*out)[kTile], const uint8_t* q, int64_t stride, const int8_t* w, int64_t K, const int8_t*) {
    if constexpr (R == 1) {
      sum<1, 8>(out, q, stride, w, K);
    } else {  // half the outputs at a time
      sum<R, 4>(out, q, stride, w, K);
      sum<R, 4>(reinterpret_cast<int32_t(*)[kTile]>(out[0] + 16), q, stride, w + 64, K);
    }
  }
};

}  // namespace

namespace cpu {
void linear_int8_avx2(Pool& pool, const LinearInt8Args& a) { LinearInt8<Sums>::run(pool, a); }
void expert_linear_int8_avx2(Pool& pool, const ExpertLinearInt8Args& a) { LinearInt8<Sums>::run_experts(pool, a); }
}  // namespace cpu
