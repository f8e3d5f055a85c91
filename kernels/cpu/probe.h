// What the machine can do at most, to compare an op with: bytes read from memory, and multiply-adds on registers alone.
//
// An instruction set brings the inner loops, in its own file; probe.cpp runs them on pinned threads and takes the time.
#pragma once
#include <cstdint>

namespace cpu {

struct Steps {
  void (*run)(int64_t steps);  // null: no such instruction
  int64_t ops;                 // of a step; a multiply-add is two
};
struct Probes {
  void (*read)(const uint8_t* data, int64_t bytes);  // whole KiB
  Steps fp32, int8, bf16;
};

extern const Probes kProbesPortable, kProbesAvx2, kProbesAvx512;
void run_bf16_avx512(int64_t steps);
constexpr int64_t kBf16Ops = 24 * 32 * 2;

// Both write a rate for each repeat, bytes/s and ops/s, of all threads together: from the first one's start to the last
// one's end. False if there is no memory.
bool probe_read(const Probes& probes, int32_t threads, int64_t bytes, int32_t repeats, double* rates);
void probe_steps(const Steps& steps, int32_t threads, double seconds, int32_t repeats, double* rates);

}  // namespace cpu
