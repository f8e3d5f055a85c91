// Without VNNI: bytes are widened to 16 bits, whose products of two are added without loss. (`maddubs` would saturate.)
#include <immintrin.h>

#include "linear_int8.h"

namespace {

struct Sums {
  static constexpr int kMostRows = 2;
  static constexpr bool kHas16 = false;

  // Eight outputs a vector of weights: 32 bytes, of which each half gives 4 outputs, their sum in two lanes.
  template <int R>
  static void rows(int32_t (*out)[kTile], const uint8_t* q, int64_t stride, const int8_t* w, int64_t K) {
    for (int64_t part = 0; part < kTile; part += 16) {  // R * 4 sums
      __m256i sums[R][4];
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < 4; ++i) sums[r][i] = _mm256_setzero_si256();
      for (int64_t k = 0; k < K; k += 4) {
        const int8_t* at = w + k * kTile + part * 4;
        __m256i x[R];
        for (int r = 0; r < R; ++r)
          x[r] = _mm256_cvtepu8_epi16(_mm_set1_epi32(int(word(q + r * stride + k, K - k))));
        for (int i = 0; i < 4; ++i) {
          const __m256i v = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at + 16 * i)));
          for (int r = 0; r < R; ++r) sums[r][i] = _mm256_add_epi32(sums[r][i], _mm256_madd_epi16(x[r], v));
        }
      }
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < 4; i += 2) {  // hadd leaves [0 1 4 5 2 3 6 7]
          const __m256i mixed = _mm256_hadd_epi32(sums[r][i], sums[r][i + 1]);
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(out[r] + part + 4 * i),
                              _mm256_permute4x64_epi64(mixed, 0xd8));
        }
    }
  }
};

}  // namespace

namespace cpu {
void linear_int8_avx2(Pool& pool, const LinearInt8Args& a) { LinearInt8<Sums>::run(pool, a); }
}  // namespace cpu
