// Apart from the other probes of AVX-512: most CPUs that have it lack this.
#include <immintrin.h>

#include "probe.h"

namespace cpu {

void run_bf16_avx512(int64_t steps) {
  const __m512bh half = (__m512bh)_mm512_set1_epi16(0x3f00), quarter = (__m512bh)_mm512_set1_epi16(0x3e80);
  __m512 sums[24];
#pragma GCC unroll 24
  for (int i = 0; i < 24; ++i) sums[i] = _mm512_set1_ps(float(i));
  for (int64_t s = 0; s < steps; ++s)
#pragma GCC unroll 24
    for (int i = 0; i < 24; ++i) {
      sums[i] = _mm512_dpbf16_ps(sums[i], half, quarter);
      __asm__("" : "+v"(sums[i]));
    }
#pragma GCC unroll 24
  for (auto& sum : sums) __asm__ volatile("" : : "v"(sum));
}

}  // namespace cpu
