#include "program.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>

namespace cpu {

template <typename T>
static std::unique_ptr<T[]> copied(const T* from, int64_t count) {
  std::unique_ptr<T[]> to(new (std::nothrow) T[size_t(count)]);
  if (to) std::copy(from, from + count, to.get());
  return to;
}

std::unique_ptr<Program> Program::make(const Recording& r) {
  std::unique_ptr<Program> program(new (std::nothrow) Program);
  if (!program) return nullptr;
  program->num_calls_ = r.num_calls;
  program->num_patches_ = r.num_patches;
  program->num_sizes_ = r.num_sizes;
  program->ops_ = copied(r.ops, r.num_calls);
  program->starts_ = copied(r.starts, r.num_calls);
  program->args_ = copied(r.args, r.num_bytes);
  program->patches_ = copied(r.patches, r.num_patches * (2 + r.num_sizes));
  program->sizes_.reset(new (std::nothrow) int64_t[size_t(r.num_sizes)]);
  const bool is_whole =
      program->ops_ && program->starts_ && program->args_ && program->patches_ && program->sizes_;
  if (!is_whole) return nullptr;
  std::fill_n(program->sizes_.get(), r.num_sizes, -1);  // no step has these
  return program;
}

void Program::patch(const int64_t* sizes) {
  std::copy(sizes, sizes + num_sizes_, sizes_.get());
  const int64_t* p = patches_.get();
  for (int64_t i = 0; i < num_patches_; ++i, p += 2 + num_sizes_) {
    int64_t value = p[1];
    for (int64_t s = 0; s < num_sizes_; ++s) value += p[2 + s] * sizes[s];
    std::memcpy(args_.get() + p[0], &value, sizeof(value));
  }
}

static void call(void* context, const Call& one, double* seconds) {
  if (!seconds) return one.op(context, one.args);
  const auto start = std::chrono::steady_clock::now();
  one.op(context, one.args);
  *seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void Program::run(void* context, const int64_t* sizes, const Call* more, int64_t num_more, double* seconds) {
  if (!std::equal(sizes, sizes + num_sizes_, sizes_.get())) patch(sizes);
  for (int64_t i = 0; i < num_calls_; ++i)
    call(context, {ops_[i], args_.get() + starts_[i]}, seconds ? seconds + i : nullptr);
  for (int64_t i = 0; i < num_more; ++i) call(context, more[i], seconds ? seconds + num_calls_ + i : nullptr);
}

}  // namespace cpu
