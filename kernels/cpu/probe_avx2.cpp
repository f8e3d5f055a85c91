// 12 sums: enough for the latency of an FMA on two ports, and few enough for 16 registers. The empty asm keeps the compiler
// from moving what does not change out of the loop, and sums from the stack.
#include <immintrin.h>

#include "probe.h"

namespace cpu {

static void read(const uint8_t* data, int64_t bytes) {
  __m256i sums[4] = {};
  for (int64_t i = 0; i < bytes; i += 128)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      sums[j] = _mm256_xor_si256(sums[j], _mm256_load_si256(reinterpret_cast<const __m256i*>(data + i + 32 * j)));
#pragma GCC unroll 4
  for (auto& sum : sums) __asm__ volatile("" : : "x"(sum));
}

static void fp32(int64_t steps) {
  const __m256 half = _mm256_set1_ps(0.5f), quarter = _mm256_set1_ps(0.25f);
  __m256 sums[12];
#pragma GCC unroll 12
  for (int i = 0; i < 12; ++i) sums[i] = _mm256_set1_ps(float(i));
  for (int64_t s = 0; s < steps; ++s)
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) {
      sums[i] = _mm256_fmadd_ps(sums[i], half, quarter);
      __asm__("" : "+x"(sums[i]));
    }
#pragma GCC unroll 12
  for (auto& sum : sums) __asm__ volatile("" : : "x"(sum));
}

// u8 * s8 in pairs to 16 bits, those in pairs to 32, and the sum: three instructions for 32 multiply-adds.
static void int8(int64_t steps) {
  const __m256i three = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
  __m256i two = _mm256_set1_epi8(-2), sums[12];
#pragma GCC unroll 12
  for (int i = 0; i < 12; ++i) sums[i] = _mm256_set1_epi32(i);
  for (int64_t s = 0; s < steps; ++s)
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) {
      __asm__("" : "+x"(two));
      sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(_mm256_maddubs_epi16(three, two), ones));
    }
#pragma GCC unroll 12
  for (auto& sum : sums) __asm__ volatile("" : : "x"(sum));
}

const Probes kProbesAvx2 = {.read = read, .fp32 = {fp32, 12 * 8 * 2}, .int8 = {int8, 12 * 32 * 2}, .bf16 = {}};

}  // namespace cpu
