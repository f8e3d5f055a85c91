#include <immintrin.h>

#include "linear_int4.h"

namespace {

struct Sums {
  static constexpr int kMostRows = 4;  // 8 sums of a group, 8 of all, 4 vectors of weights
  static constexpr int kPanelFrom = 8;
  static constexpr int kPanelRows = 8;  // 16 sums of a group, 2 vectors of weights and one of a row; those of all in memory

  template <int R>
  static void rows(float (*out)[kTile], const uint8_t* q, int64_t stride, const Int4Matrix& m, int64_t tile) {
    const uint8_t* at = m.tile(tile);
    const __m512i low = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
    __m512 total[R][2];
    for (int r = 0; r < R; ++r) total[r][0] = total[r][1] = _mm512_setzero_ps();
    for (int64_t g = 0; g < m.groups(); ++g) {
      const uint8_t* x = q + g * m.group;
      const uint8_t* bytes = at + 2 * kTile;
      const int64_t inputs = m.inputs(g);
      __m512i sums[R][2];
      for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
      const auto step = [&](const uint8_t* from, const auto& word_at) __attribute__((always_inline)) {
        for (int half = 0; half < 2; ++half) {
          const __m512i both = _mm512_loadu_si512(from + 64 * half);
          const __m512i w0 = _mm512_sub_epi8(_mm512_and_si512(both, low), eight);
          const __m512i w1 = _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(both, 4), low), eight);
          for (int r = 0; r < R; ++r) {
            const uint8_t* row = x + r * stride;
            sums[r][half] = _mm512_dpbusd_epi32(sums[r][half], _mm512_set1_epi32(int(word_at(row, 0))), w0);
            sums[r][half] = _mm512_dpbusd_epi32(sums[r][half], _mm512_set1_epi32(int(word_at(row, 4))), w1);
            asm("" : "+v"(sums[r][half]));
          }
        }
      };
      int64_t k = 0;
      for (; k + 8 <= inputs; k += 8) {
        _mm_prefetch(reinterpret_cast<const char*>(bytes) + 2048, _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(bytes) + 2048 + 64, _MM_HINT_T0);
        step(bytes, [k](const uint8_t* row, int64_t j) {
          uint32_t four;
          std::memcpy(&four, row + k + j, 4);
          return four;
        });
        bytes += 4 * kTile;
      }
      if (k < inputs)
        step(bytes, [k, inputs](const uint8_t* row, int64_t j) { return word_of(row + k + j, inputs - k - j); });
      for (int half = 0; half < 2; ++half) {
        const __m512 d = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 32 * half)));
        for (int r = 0; r < R; ++r)
          total[r][half] = _mm512_add_ps(total[r][half], _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][half]), d));
      }
      at += m.group_bytes(g);
    }
    for (int r = 0; r < R; ++r) {
      _mm512_store_ps(out[r], total[r][0]);
      _mm512_store_ps(out[r] + 16, total[r][1]);
    }
  }

  static void unpack(Panel& panel, const uint8_t* at, const Int4Matrix& m, Block block) {
    const __m512i low = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
    for (int64_t g = block.first; g < block.end; ++g) {
      const int64_t inputs = up(m.inputs(g), 8) * 8;
      int8_t* to = panel.w + (g - block.first) * m.group * kTile;
      for (int half = 0; half < 2; ++half)
        _mm512_store_ps(panel.scales[g - block.first] + 16 * half,
                        _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 32 * half))));
      at += 2 * kTile;
      for (int64_t k = 0; k < inputs; k += 8, at += 4 * kTile, to += 8 * kTile)
        for (int half = 0; half < 2; ++half) {
          const __m512i both = _mm512_loadu_si512(at + 64 * half);
          const __m512i high = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
          _mm512_store_si512(to + 64 * half, _mm512_sub_epi8(_mm512_and_si512(both, low), eight));
          _mm512_store_si512(to + 64 * half + 4 * kTile, _mm512_sub_epi8(high, eight));
        }
    }
  }

  // Inlined, its sums would be on the stack too.
  template <int R>
  [[gnu::noinline]] static void add(float (*out)[kTile], const uint8_t* q, int64_t stride, const Panel& panel,
                                    const Int4Matrix& m, Block block, Ahead ahead) {
    if (block.first == 0) std::memset(out, 0, R * sizeof *out);
    for (int64_t g = 0; g < block.end - block.first; ++g) {
      const uint8_t* x = q + g * m.group;
      const int8_t* w = panel.w + g * m.group * kTile;
      const int64_t inputs = m.inputs(block.first + g);
      __m512i sums[R][2];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
      const auto step = [&](int64_t k, const auto& word_at) __attribute__((always_inline)) {
        const __m512i w0 = _mm512_load_si512(w + k * kTile), w1 = _mm512_load_si512(w + k * kTile + 64);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const __m512i four = _mm512_set1_epi32(int(word_at(x + r * stride + k)));
          sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], four, w0);
          sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], four, w1);
          asm("" : "+v"(sums[r][0]), "+v"(sums[r][1]));  // gcc 12 would keep them on the stack
        }
      };
      int64_t k = 0;
      for (; k + 4 <= inputs; k += 4) {
        _mm_prefetch(reinterpret_cast<const char*>(ahead.at), _MM_HINT_T1);
        ahead.at += ahead.step;
        step(k, [](const uint8_t* row) {
          uint32_t four;
          std::memcpy(&four, row, 4);
          return four;
        });
      }
      if (k < inputs) step(k, [left = inputs - k](const uint8_t* row) { return word_of(row, left); });
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) {
        const __m512 d = _mm512_load_ps(panel.scales[g] + 16 * c);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][c]), d);
          _mm512_store_ps(out[r] + 16 * c, _mm512_add_ps(_mm512_load_ps(out[r] + 16 * c), y));
        }
      }
    }
  }
};

}  // namespace

namespace cpu {
void linear_int4_avx512(Pool& pool, const LinearInt4Args& a) { LinearInt4<Sums>::run(pool, a); }
void expert_linear_int4_avx512(Pool& pool, const ExpertLinearInt4Args& a) { LinearInt4<Sums>::run_experts(pool, a); }
}  // namespace cpu
