#include "probe.h"

namespace cpu {

// 16 bytes fit every CPU that has vectors at all; elsewhere the compiler makes four of one.
typedef float Floats __attribute__((vector_size(16)));
typedef uint64_t Words __attribute__((vector_size(16), may_alias));

static void read(const uint8_t* data, int64_t bytes) {
  Words sums[4] = {};
  for (int64_t i = 0; i < bytes; i += 64)
    for (int j = 0; j < 4; ++j) sums[j] ^= *reinterpret_cast<const Words*>(data + i + 16 * j);
  const Words all = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
  __asm__ volatile("" : : "m"(all));
}

// 12 sums and two factors fit 16 registers, and are more than a multiplication and an addition take to come out.
static void fp32(int64_t steps) {
  Floats sums[12];
#pragma GCC unroll 12
  for (int i = 0; i < 12; ++i) sums[i] = Floats{} + float(i);
  const Floats half = Floats{} + 0.5f, quarter = Floats{} + 0.25f;
  for (int64_t s = 0; s < steps; ++s)
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) sums[i] = sums[i] * half + quarter;
  Floats all = sums[0];
#pragma GCC unroll 12
  for (int i = 1; i < 12; ++i) all += sums[i];
  __asm__ volatile("" : : "m"(all));
}

const Probes kProbesPortable = {.read = read, .fp32 = {fp32, 12 * 4 * 2}, .int8 = {}, .bf16 = {}};

}  // namespace cpu
