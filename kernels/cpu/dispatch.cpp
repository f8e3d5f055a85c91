// The C ABI: contexts, and one function per op. No exceptions, no printing. The caller has checked the shapes.
#include <cstring>
#include <new>

#include "ops.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Raised with every change of a struct or of what a function means.
constexpr int32_t kAbi = 3;

struct Isa {
  const char* name;
  cpu::Kernels kernels;
};

// Best last. A CPU that lacks an entry's instructions is asked for it nowhere but in `vivace_best_isa`.
constexpr Isa kIsas[] = {
    {"portable",
     {cpu::linear_portable, cpu::embed_portable, cpu::rmsnorm_portable, cpu::add_rmsnorm_portable,
      cpu::rope_table_portable, cpu::rope_kv_write_portable, cpu::attention_portable, cpu::gated_portable,
      cpu::softcap_portable, cpu::add_portable, cpu::moe_route_portable, cpu::expert_linear_portable,
      cpu::moe_combine_portable, cpu::take_rows_portable, cpu::sample_portable, cpu::logprobs_portable,
      cpu::kv_read_portable}},
};
constexpr int32_t kNumIsas = sizeof(kIsas) / sizeof(kIsas[0]);

struct Context {
  Context(const cpu::Kernels& chosen, int32_t threads) : kernels(chosen), pool(threads) {}
  const cpu::Kernels& kernels;
  cpu::Pool pool;
};

}  // namespace

EXPORT int32_t vivace_abi() { return kAbi; }

EXPORT const char* vivace_isa_name(int32_t isa) { return isa >= 0 && isa < kNumIsas ? kIsas[isa].name : nullptr; }

EXPORT int32_t vivace_best_isa() { return kNumIsas - 1; }

EXPORT void* vivace_context_create(int32_t isa, int32_t threads) {
  if (isa < 0 || isa >= kNumIsas || threads < 1) return nullptr;
  return new (std::nothrow) Context(kIsas[isa].kernels, threads);
}

EXPORT void vivace_context_destroy(void* context) { delete static_cast<Context*>(context); }

#define OP(op, Args)                                                                  \
  EXPORT int64_t vivace_##op##_size() { return int64_t(sizeof(cpu::Args)); }          \
  EXPORT void vivace_##op(void* context, const cpu::Args* args) {                     \
    Context& c = *static_cast<Context*>(context);                                     \
    c.kernels.op(c.pool, *args);                                                      \
  }

OP(linear, LinearArgs)
OP(embed, EmbedArgs)
OP(rmsnorm, RmsnormArgs)
OP(add_rmsnorm, AddRmsnormArgs)
OP(rope_table, RopeTableArgs)
OP(rope_kv_write, RopeKvWriteArgs)
OP(attention, AttentionArgs)
OP(gated, GatedArgs)
OP(softcap, SoftcapArgs)
OP(add, AddArgs)
OP(moe_route, MoeRouteArgs)
OP(expert_linear, ExpertLinearArgs)
OP(moe_combine, MoeCombineArgs)
OP(take_rows, TakeRowsArgs)
OP(sample, SampleArgs)
OP(logprobs, LogprobsArgs)
OP(kv_read, KvReadArgs)
