// A small thread pool. Splits a range into one piece per thread, always the same way, and waits.
//
//   for_range(count, grain, task, args) calls task(args, begin, end) on disjoint pieces of 0..count-1.
//
// The caller works too: it takes pieces from the first on, workers from the last on, until none is left. So a worker that is
// late, because it was asleep or because another process has its core, holds up nothing but the piece it has begun, and
// which thread runs a piece is usually the same. Ranges of `grain` or fewer run on the caller alone.
//
// Workers spin for some microseconds after a piece, then park in the kernel: an idle pool costs nothing. From `begin` to
// `end` ranges follow each other closely: workers are woken at once and spin longer. One caller at a time.
//
// Workers are kept off the caller's CPU. Left to itself the kernel of a virtual machine wakes them there, where they wait for
// the caller, who waits for them: it takes a CPU that sleeps for one that the host has taken away.
#pragma once
#include <sched.h>

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
  void begin();
  void end();
  int64_t threads() const { return threads_; }

 private:
  void work();
  void place();
  void publish(uint32_t pieces);
  bool run_piece(uint64_t step);
  void await_ticket(uint64_t seen);

  const int32_t threads_;
  std::thread* workers_;
  cpu_set_t allowed_;  // CPUs of this process
  int caller_cpu_ = -1;
  Task* task_ = nullptr;  // of the range that `ticket_` announces; stable while a piece of it is unfinished
  const void* args_ = nullptr;
  int64_t count_ = 0;
  // Apart, so that who waits for one does not slow down those who write the other.
  alignas(64) std::atomic<uint64_t> ticket_{0};  // number of the range << 32 | pieces not taken: end << 16 | begin
  alignas(64) std::atomic<int32_t> unfinished_{0};
  alignas(64) std::atomic<bool> is_busy_{false};  // between `begin` and `end`
  std::atomic<bool> stop_{false};
};

}  // namespace cpu
