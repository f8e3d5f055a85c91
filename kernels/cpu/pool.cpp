#include "pool.h"

#include <new>

namespace cpu {

// The gap between two ops of a step: 15 us where a pause takes 40 cycles, 50 us where it takes 140. Longer would
// take a core from whoever else needs it.
constexpr int kSpins = 1000;

static inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Returns once `value` is no longer `old`.
template <typename T>
static void wait_while(const std::atomic<T>& value, T old) {
  for (int i = 0; i < kSpins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    relax();
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

Pool::Pool(int32_t threads)
    : threads_(threads), workers_(threads > 1 ? new std::thread[threads - 1] : nullptr) {
  for (int32_t i = 1; i < threads_; ++i) workers_[i - 1] = std::thread(&Pool::work, this, i);
}

Pool::~Pool() {
  stop_.store(true, std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  for (int32_t i = 1; i < threads_; ++i) workers_[i - 1].join();
  delete[] workers_;
}

void Pool::for_range(int64_t count, int64_t grain, Task* task, const void* args) {
  if (count <= 0) return;
  if (threads_ == 1 || count <= grain) return task(args, 0, count);
  task_ = task;
  args_ = args;
  count_ = count;
  unfinished_.store(threads_ - 1, std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  run_piece(0);
  for (int32_t left; (left = unfinished_.load(std::memory_order_acquire)) != 0;)
    wait_while(unfinished_, left);
}

void Pool::run_piece(int32_t piece) {
  const int64_t begin = count_ * piece / threads_, end = count_ * (piece + 1) / threads_;
  if (begin < end) task_(args_, begin, end);
}

void Pool::work(int32_t piece) {
  for (uint32_t seen = 0;;) {
    wait_while(generation_, seen);
    ++seen;  // the caller waits for every piece, so no generation is ever skipped
    if (stop_.load(std::memory_order_relaxed)) return;
    run_piece(piece);
    if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished_.notify_one();
  }
}

}  // namespace cpu
