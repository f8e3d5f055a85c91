#include "probe.h"

#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <memory>
#include <thread>

namespace cpu {

constexpr int64_t kHugeBytes = 2 << 20;

static double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Threads are kept to the CPUs of the process in turn: left alone, two may share one for a good part of a short probe.
static void pin(int32_t thread) {
  cpu_set_t all, one;
  if (sched_getaffinity(0, sizeof(all), &all) != 0) return;
  int skip = thread % CPU_COUNT(&all), cpu = 0;
  while (!CPU_ISSET(cpu, &all) || skip-- > 0) ++cpu;
  CPU_ZERO(&one);
  CPU_SET(cpu, &one);
  sched_setaffinity(0, sizeof(one), &one);
}

// Seconds from the first start of `work(thread)` to the last end.
template <typename Work>
static double timed(int32_t threads, const Work& work) {
  const std::unique_ptr<std::thread[]> workers(new std::thread[size_t(threads)]);
  const std::unique_ptr<double[]> starts(new double[size_t(threads)]), ends(new double[size_t(threads)]);
  std::barrier gate(threads);
  for (int32_t i = 0; i < threads; ++i)
    workers[i] = std::thread([&, i] {
      pin(i);
      gate.arrive_and_wait();
      starts[i] = now();
      work(i);
      ends[i] = now();
    });
  for (int32_t i = 0; i < threads; ++i) workers[i].join();
  return *std::max_element(&ends[0], &ends[threads]) - *std::min_element(&starts[0], &starts[threads]);
}

// Of one thread, in huge pages, first written by it. Random: a host may merge pages that are the same.
struct Area {
  ~Area() {
    if (whole) munmap(whole, size_t(bytes + kHugeBytes));
  }
  bool take(int64_t wanted) {
    bytes = wanted;
    void* found = mmap(nullptr, size_t(bytes + kHugeBytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) return false;
    whole = static_cast<uint8_t*>(found);
    data = whole + (kHugeBytes - reinterpret_cast<uintptr_t>(whole) % kHugeBytes) % kHugeBytes;
    madvise(data, size_t(bytes), MADV_HUGEPAGE);
    return true;
  }
  void fill(uint64_t seed) {
    uint64_t* words = reinterpret_cast<uint64_t*>(data);
    for (int64_t i = 0; i < bytes / 8; ++i) {
      seed = seed * 6364136223846793005u + 1442695040888963407u;
      words[i] = seed ^ seed >> 33;
    }
  }
  uint8_t* whole = nullptr;
  uint8_t* data = nullptr;
  int64_t bytes = 0;
};

bool probe_read(const Probes& probes, int32_t threads, int64_t bytes, int32_t repeats, double* rates) {
  const std::unique_ptr<Area[]> areas(new Area[size_t(threads)]);
  for (int32_t i = 0; i < threads; ++i)
    if (!areas[i].take(bytes)) return false;
  timed(threads, [&](int32_t i) { areas[i].fill(uint64_t(i)); });
  for (int32_t r = 0; r < repeats; ++r)
    rates[r] = double(threads) * double(bytes) /
               timed(threads, [&](int32_t i) { probes.read(areas[i].data, bytes); });
  return true;
}

void probe_steps(const Steps& steps, int32_t threads, double seconds, int32_t repeats, double* rates) {
  int64_t count = 1000;
  const auto once = [&] { return timed(threads, [&](int32_t) { steps.run(count); }); };
  for (double took; (took = once()) < seconds;)
    count = took < seconds / 8 ? count * 4 : int64_t(double(count) * seconds / took * 1.1) + 1;
  for (int32_t r = 0; r < repeats; ++r) rates[r] = double(threads) * double(count) * double(steps.ops) / once();
}

}  // namespace cpu
