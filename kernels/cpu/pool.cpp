#include "pool.h"

#include <pthread.h>

#include <chrono>
#include <new>

namespace cpu {

using Clock = std::chrono::steady_clock;

// Longer would take a core from whoever else needs it, shorter would put threads to sleep between two ops: waking one takes
// as long as many an op.
constexpr std::chrono::microseconds kSpin{20};
constexpr int kBusySpins = 10;  // times kSpin that a worker waits in the middle of a program: for what the caller does alone
constexpr int kCallerSpins = 3;  // that the caller waits for the others' pieces

constexpr uint64_t kFirst = 1, kLast = uint64_t(1) << 16;  // what taking the first piece adds to a ticket, the last one takes away

static inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Whether `value` is no longer `old`, waiting for at most kSpin.
template <typename T>
static bool spin(const std::atomic<T>& value, T old) {
  const Clock::time_point end = Clock::now() + kSpin;
  do {
    for (int i = 0; i < 16; ++i) {
      if (value.load(std::memory_order_acquire) != old) return true;
      relax();
    }
  } while (Clock::now() < end);
  return false;
}

static uint64_t left(uint64_t ticket) { return (ticket >> 16 & 0xffff) - (ticket & 0xffff); }

Pool::Pool(int32_t threads)
    : threads_(threads), workers_(threads > 1 ? new std::thread[size_t(threads - 1)] : nullptr) {
  CPU_ZERO(&allowed_);
  sched_getaffinity(0, sizeof(allowed_), &allowed_);
  for (int32_t i = 1; i < threads_; ++i) workers_[i - 1] = std::thread(&Pool::work, this);
}

Pool::~Pool() {
  stop_.store(true, std::memory_order_relaxed);
  publish(0);
  for (int32_t i = 1; i < threads_; ++i) workers_[i - 1].join();
  delete[] workers_;
}

void Pool::begin() {
  if (threads_ == 1) return;
  is_busy_.store(true, std::memory_order_relaxed);
  publish(0);
}

void Pool::end() { is_busy_.store(false, std::memory_order_relaxed); }

void Pool::for_range(int64_t count, int64_t grain, Task* task, const void* args) {
  if (count <= 0) return;
  if (threads_ == 1 || count <= grain) return task(args, 0, count);
  task_ = task;
  args_ = args;
  count_ = count;
  unfinished_.store(threads_, std::memory_order_relaxed);
  publish(uint32_t(threads_));
  while (run_piece(kFirst)) {
  }
  for (int32_t still; (still = unfinished_.load(std::memory_order_acquire)) != 0;) {
    bool changed = false;
    for (int i = 0; i < kCallerSpins && !changed; ++i) changed = spin(unfinished_, still);
    if (!changed) unfinished_.wait(still, std::memory_order_acquire);
  }
}

// Gives the workers all CPUs but the caller's; one each if there are just enough. Not done if the kernel refuses: slower only.
void Pool::place() {
  const int caller_cpu = sched_getcpu(), num_cpus = CPU_COUNT(&allowed_);
  if (caller_cpu == caller_cpu_ || num_cpus < 2) return;
  caller_cpu_ = caller_cpu;
  cpu_set_t others = allowed_;
  CPU_CLR(caller_cpu, &others);
  for (int32_t i = 1, cpu = 0; i < threads_; ++i, ++cpu) {
    cpu_set_t mine = others;
    if (threads_ == num_cpus) {
      while (!CPU_ISSET(cpu, &others)) ++cpu;
      CPU_ZERO(&mine);
      CPU_SET(cpu, &mine);
    }
    pthread_setaffinity_np(workers_[i - 1].native_handle(), sizeof(mine), &mine);
  }
}

// Announces a range of so many pieces; none: only wakes the workers. seq_cst: a worker about to park must either see the
// ticket or be seen by the notification.
void Pool::publish(uint32_t pieces) {
  place();
  const uint64_t number = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
  ticket_.store(number << 32 | uint64_t(pieces) << 16, std::memory_order_seq_cst);
  ticket_.notify_all();
}

// Takes the first or the last piece that nobody has, by what that adds to the ticket, and runs it. False if there is none.
// The range is read once a piece of it is taken, for until then it may be gone.
bool Pool::run_piece(uint64_t step) {
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  do {
    if (left(ticket) == 0) return false;
  } while (!ticket_.compare_exchange_weak(ticket, ticket + step, std::memory_order_acq_rel, std::memory_order_acquire));
  const int64_t piece = int64_t(step == kFirst ? ticket & 0xffff : (ticket >> 16 & 0xffff) - 1);
  const int64_t begin = count_ * piece / threads_, end = count_ * (piece + 1) / threads_;
  if (begin < end) task_(args_, begin, end);
  if (unfinished_.fetch_sub(1, std::memory_order_seq_cst) == 1) unfinished_.notify_one();
  return true;
}

// Returns once the ticket is another.
void Pool::await_ticket(uint64_t seen) {
  int spins = 0;
  do {
    if (spin(ticket_, seen)) return;
  } while (++spins < kBusySpins && is_busy_.load(std::memory_order_relaxed));
  ticket_.wait(seen, std::memory_order_acquire);
}

void Pool::work() {
  for (;;) {
    while (run_piece(-kLast)) {
    }
    const uint64_t seen = ticket_.load(std::memory_order_acquire);
    if (stop_.load(std::memory_order_relaxed)) return;  // after the ticket: the last one is published after `stop_` is set
    if (left(seen) == 0) await_ticket(seen);
  }
}

}  // namespace cpu
