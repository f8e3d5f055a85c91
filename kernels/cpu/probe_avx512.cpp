// 24 sums of 32 registers: more than any of these instructions takes to come out. The empty asm keeps them off the stack.
#include <immintrin.h>

#include "probe.h"

namespace cpu {

static void read(const uint8_t* data, int64_t bytes) {
  __m512i sums[4] = {};
  for (int64_t i = 0; i < bytes; i += 256)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[j] = _mm512_xor_si512(sums[j], _mm512_load_si512(data + i + 64 * j));
#pragma GCC unroll 4
  for (auto& sum : sums) __asm__ volatile("" : : "v"(sum));
}

static void fp32(int64_t steps) {
  const __m512 half = _mm512_set1_ps(0.5f), quarter = _mm512_set1_ps(0.25f);
  __m512 sums[24];
#pragma GCC unroll 24
  for (int i = 0; i < 24; ++i) sums[i] = _mm512_set1_ps(float(i));
  for (int64_t s = 0; s < steps; ++s)
#pragma GCC unroll 24
    for (int i = 0; i < 24; ++i) {
      sums[i] = _mm512_fmadd_ps(sums[i], half, quarter);
      __asm__("" : "+v"(sums[i]));
    }
#pragma GCC unroll 24
  for (auto& sum : sums) __asm__ volatile("" : : "v"(sum));
}

static void int8(int64_t steps) {
  const __m512i three = _mm512_set1_epi8(3), two = _mm512_set1_epi8(-2);
  __m512i sums[24];
#pragma GCC unroll 24
  for (int i = 0; i < 24; ++i) sums[i] = _mm512_set1_epi32(i);
  for (int64_t s = 0; s < steps; ++s)
#pragma GCC unroll 24
    for (int i = 0; i < 24; ++i) {
      sums[i] = _mm512_dpbusd_epi32(sums[i], three, two);
      __asm__("" : "+v"(sums[i]));
    }
#pragma GCC unroll 24
  for (auto& sum : sums) __asm__ volatile("" : : "v"(sum));
}

const Probes kProbesAvx512 = {.read = read,
                              .fp32 = {fp32, 24 * 16 * 2},
                              .int8 = {int8, 24 * 64 * 2},
                              .bf16 = {run_bf16_avx512, kBf16Ops}};

}  // namespace cpu
