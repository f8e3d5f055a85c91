// A recorded list of op calls, run as one: ops one after another with arguments that are kept here. Between two runs all
// that changes of them are int64 fields, each of them constant + sum of factor * size over the sizes of a step.
//
// kernels/cpu/recorder.py says which fields those are, and has proved that nothing else varies.
#pragma once
#include <cstdint>
#include <memory>

namespace cpu {

using Op = void(void* context, const void* args);

#pragma pack(push, 1)
struct Call {
  Op* op;
  const void* args;
};
// What a program is made of; copied.
struct Recording {
  int64_t num_calls, num_bytes, num_patches, num_sizes;
  Op* const* ops;          // [num_calls]
  const int64_t* starts;   // [num_calls], of each call's arguments in `args`
  const uint8_t* args;     // [num_bytes]
  const int64_t* patches;  // [num_patches, 2 + num_sizes]: place in `args`, constant, a factor for each size
};
#pragma pack(pop)

class Program {
 public:
  // Null if there is no memory for it.
  static std::unique_ptr<Program> make(const Recording& recording);
  // `sizes` are num_sizes; `more` are calls that follow the recorded ones. `seconds` is null, or takes how long each call ran.
  void run(void* context, const int64_t* sizes, const Call* more, int64_t num_more, double* seconds);

 private:
  void patch(const int64_t* sizes);

  int64_t num_calls_ = 0, num_patches_ = 0, num_sizes_ = 0;
  std::unique_ptr<Op*[]> ops_;
  std::unique_ptr<int64_t[]> starts_, patches_, sizes_;  // sizes_: those that the arguments are of
  std::unique_ptr<uint8_t[]> args_;
};

}  // namespace cpu
