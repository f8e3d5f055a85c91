// Without VNNI: the numbers of a nibble less 8 are small enough for `maddubs`: 2 * 255 * 8 fits 16 bits.
#include <immintrin.h>

#include "linear_int4.h"

namespace {

struct Sums {
  static constexpr int kMostRows = 1;

  template <int R>
  static void rows(float (*out)[kTile], const uint8_t* q, int64_t, const Int4Matrix& m, int64_t tile) {
    const uint8_t* at = m.tile(tile);
    const __m256i low = _mm256_set1_epi8(15), eight = _mm256_set1_epi8(8), one = _mm256_set1_epi16(1);
    __m256 total[4];
    for (int i = 0; i < 4; ++i) total[i] = _mm256_setzero_ps();
    for (int64_t g = 0; g < m.groups(); ++g) {
      const uint8_t* x = q + g * m.group;
      const uint8_t* bytes = at + 2 * kTile;
      const int64_t inputs = m.inputs(g);
      __m256i sums[4];
      for (int i = 0; i < 4; ++i) sums[i] = _mm256_setzero_si256();
      for (int64_t k = 0; k < inputs; k += 8, bytes += 4 * kTile) {
        const __m256i x0 = _mm256_set1_epi32(int(word_of(x + k, inputs - k)));
        const __m256i x1 = _mm256_set1_epi32(int(word_of(x + k + 4, inputs - k - 4)));
        for (int i = 0; i < 4; ++i) {
          const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + 32 * i));
          const __m256i w0 = _mm256_sub_epi8(_mm256_and_si256(both, low), eight);
          const __m256i w1 = _mm256_sub_epi8(_mm256_and_si256(_mm256_srli_epi16(both, 4), low), eight);
          const __m256i y0 = _mm256_madd_epi16(_mm256_maddubs_epi16(x0, w0), one);
          const __m256i y1 = _mm256_madd_epi16(_mm256_maddubs_epi16(x1, w1), one);
          sums[i] = _mm256_add_epi32(sums[i], _mm256_add_epi32(y0, y1));
        }
      }
      for (int i = 0; i < 4; ++i) {
        const __m256 d = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at + 16 * i)));
        total[i] = _mm256_add_ps(total[i], _mm256_mul_ps(_mm256_cvtepi32_ps(sums[i]), d));
      }
      at += m.group_bytes(g);
    }
    for (int i = 0; i < 4; ++i) _mm256_storeu_ps(out[0] + 8 * i, total[i]);
  }
};

}  // namespace

namespace cpu {
void linear_int4_avx2(Pool& pool, const LinearInt4Args& a) { LinearInt4<Sums>::run(pool, a); }
}  // namespace cpu
