// Without VNNI: the numbers of a nibble less 8 are small enough for `maddubs`: 2 * 255 * 8 fits 16 bits.
#include <immintrin.h>

#include "linear_int4.h"

namespace {

struct Sums {
  static constexpr int kMostRows = 1;
  static constexpr int kPanelFrom = 3;
  static constexpr int kPanelRows = 3;  // 12 sums of 16 bits, 3 vectors of rows

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

  static void unpack(Panel& panel, const uint8_t* at, const Int4Matrix& m, Block block) {
    const __m256i low = _mm256_set1_epi8(15), eight = _mm256_set1_epi8(8);
    for (int64_t g = block.first; g < block.end; ++g) {
      const int64_t inputs = up(m.inputs(g), 8) * 8;
      auto* to = reinterpret_cast<__m256i*>(panel.w + (g - block.first) * m.group * kTile);
      for (int i = 0; i < 4; ++i)
        _mm256_store_ps(panel.scales[g - block.first] + 8 * i,
                        _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at + 16 * i))));
      at += 2 * kTile;
      for (int64_t k = 0; k < inputs; k += 8, at += 4 * kTile, to += 8)
        for (int i = 0; i < 4; ++i) {
          const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 32 * i));
          const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
          _mm256_store_si256(to + i, _mm256_sub_epi8(_mm256_and_si256(both, low), eight));
          _mm256_store_si256(to + i + 4, _mm256_sub_epi8(high, eight));
        }
    }
  }

  // Up to 32 inputs, whose sums fit 16 bits: 8 steps of 2 * 255 * 8.
  template <int R>
  static void add_piece(__m256i (*sums)[4], const uint8_t* x, int64_t stride, const int8_t* w, int64_t inputs) {
    __m256i small[R][4];
#pragma GCC unroll 3
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) small[r][i] = _mm256_setzero_si256();
    const auto step = [&](int64_t k, const auto& word_at) __attribute__((always_inline)) {
      __m256i four[R];
#pragma GCC unroll 3
      for (int r = 0; r < R; ++r) four[r] = _mm256_set1_epi32(int(word_at(x + r * stride + k)));
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m256i v = _mm256_load_si256(reinterpret_cast<const __m256i*>(w + k * kTile + 32 * i));
#pragma GCC unroll 3
        for (int r = 0; r < R; ++r) small[r][i] = _mm256_add_epi16(small[r][i], _mm256_maddubs_epi16(four[r], v));
      }
    };
    int64_t k = 0;
    for (; k + 4 <= inputs; k += 4)
      step(k, [](const uint8_t* row) {
        uint32_t word;
        std::memcpy(&word, row, 4);
        return word;
      });
    if (k < inputs) step(k, [left = inputs - k](const uint8_t* row) { return word_of(row, left); });
    const __m256i one = _mm256_set1_epi16(1);
#pragma GCC unroll 3
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sums[r][i] = _mm256_add_epi32(sums[r][i], _mm256_madd_epi16(small[r][i], one));
  }

  template <int R>
  static void add(float (*out)[kTile], const uint8_t* q, int64_t stride, const Panel& panel, const Int4Matrix& m,
                  Block block, Ahead ahead) {
    if (block.first == 0) std::memset(out, 0, R * sizeof *out);
    for (int64_t g = 0; g < block.end - block.first; ++g) {
      const int64_t inputs = m.inputs(block.first + g);
      __m256i sums[R][4] = {};
      for (int64_t k = 0; k < inputs; k += 32) {
        for (int i = 0; i < 8; ++i, ahead.at += ahead.step)
          _mm_prefetch(reinterpret_cast<const char*>(ahead.at), _MM_HINT_T1);
        const int64_t from = g * m.group + k;
        add_piece<R>(sums, q + from, stride, panel.w + from * kTile, std::min<int64_t>(32, inputs - k));
      }
      for (int i = 0; i < 4; ++i) {
        const __m256 d = _mm256_load_ps(panel.scales[g] + 8 * i);
        for (int r = 0; r < R; ++r) {
          const __m256 y = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[r][i]), d);
          _mm256_store_ps(out[r] + 8 * i, _mm256_add_ps(_mm256_load_ps(out[r] + 8 * i), y));
        }
      }
    }
  }
};

}  // namespace

namespace cpu {
void linear_int4_avx2(Pool& pool, const LinearInt4Args& a) { LinearInt4<Sums>::run(pool, a); }
void expert_linear_int4_avx2(Pool& pool, const ExpertLinearInt4Args& a) { LinearInt4<Sums>::run_experts(pool, a); }
}  // namespace cpu
