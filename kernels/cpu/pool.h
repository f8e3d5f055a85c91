// A small thread pool. Splits a range into one piece per thread, always the same way, and waits.
//
//   for_range(pool, count, grain, task, args) calls task(args, begin, end) on disjoint pieces of 0..count-1.
//
// The caller works too. Ranges of `grain` or fewer run on the caller alone. Workers spin for some microseconds
// after a piece, then park in the kernel: an idle pool costs nothing. One caller at a time.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>

namespace cpu {

using Task = void(const void* args, int64_t begin, int64_t end);

class Pool {
 public:
  explicit Pool(int32_t threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  void for_range(int64_t count, int64_t grain, Task* task, const void* args);

 private:
  void work(int32_t piece);
  void run_piece(int32_t piece);

  int32_t threads_;
  std::thread* workers_;
  Task* task_ = nullptr;  // of the range that `generation_` announces
  const void* args_ = nullptr;
  int64_t count_ = 0;
  std::atomic<uint32_t> generation_{0};
  std::atomic<int32_t> unfinished_{0};
  std::atomic<bool> stop_{false};
};

}  // namespace cpu
