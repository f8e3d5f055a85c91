// The C ABI: contexts, one function per op, and programs of ops. No exceptions, no printing. The caller has checked the shapes.
#include <cstring>
#include <new>

#include "ops.h"
#include "probe.h"
#include "program.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Raised with every change of a struct or of what a function means.
constexpr int32_t kAbi = 7;

// What the instruction sets below start from; each replaces the ops that it has of its own.
constexpr cpu::Kernels kPortable = {
    .linear = cpu::linear_portable,
    .quantize = cpu::quantize_portable,
    .linear_int8 = cpu::linear_int8_portable,
    .linear_int4 = cpu::linear_int4_portable,
    .embed = cpu::embed_portable,
    .embed_int8 = cpu::embed_int8_portable,
    .rmsnorm = cpu::rmsnorm_portable,
    .add_rmsnorm = cpu::add_rmsnorm_portable,
    .rmsnorm_quantize = cpu::rmsnorm_quantize_portable,
    .add_rmsnorm_quantize = cpu::add_rmsnorm_quantize_portable,
    .rope_table = cpu::rope_table_portable,
    .rope_kv_write = cpu::rope_kv_write_portable,
    .attention = cpu::attention_portable,
    .kept_mass = cpu::kept_mass_portable,
    .block_meta_update = cpu::block_meta_update_portable,
    .block_score = cpu::block_score_portable,
    .block_topk = cpu::block_topk_portable,
    .gated = cpu::gated_portable,
    .gated_quantize = cpu::gated_quantize_portable,
    .softcap = cpu::softcap_portable,
    .add = cpu::add_portable,
    .moe_route = cpu::moe_route_portable,
    .expert_linear = cpu::expert_linear_portable,
    .expert_linear_int8 = cpu::expert_linear_int8_portable,
    .expert_linear_int4 = cpu::expert_linear_int4_portable,
    .moe_combine = cpu::moe_combine_portable,
    .take_rows = cpu::take_rows_portable,
    .sample = cpu::sample_portable,
    .logprobs = cpu::logprobs_portable,
    .kv_read = cpu::kv_read_portable,
};

#ifdef VIVACE_X86
constexpr cpu::Kernels avx2() {
  cpu::Kernels k = kPortable;
  k.gated = cpu::gated_avx2;
  k.gated_quantize = cpu::gated_quantize_avx2;
  k.softcap = cpu::softcap_avx2;
  k.add = cpu::add_avx2;
  k.embed = cpu::embed_avx2;
  k.take_rows = cpu::take_rows_avx2;
  k.rmsnorm = cpu::rmsnorm_avx2;
  k.add_rmsnorm = cpu::add_rmsnorm_avx2;
  k.rmsnorm_quantize = cpu::rmsnorm_quantize_avx2;
  k.add_rmsnorm_quantize = cpu::add_rmsnorm_quantize_avx2;
  k.kv_read = cpu::kv_read_avx2;
  k.rope_table = cpu::rope_table_avx2;
  k.rope_kv_write = cpu::rope_kv_write_avx2;
  k.sample = cpu::sample_avx2;
  k.logprobs = cpu::logprobs_avx2;
  k.attention = cpu::attention_avx2;
  k.kept_mass = cpu::kept_mass_avx2;
  k.block_meta_update = cpu::block_meta_update_avx2;
  k.block_score = cpu::block_score_avx2;
  k.block_topk = cpu::block_topk_avx2;
  k.linear = cpu::linear_avx2;
  k.expert_linear = cpu::expert_linear_avx2;
  k.quantize = cpu::quantize_avx2;
  k.linear_int8 = cpu::linear_int8_avx2;
  k.linear_int4 = cpu::linear_int4_avx2;
  k.expert_linear_int8 = cpu::expert_linear_int8_avx2;
  k.expert_linear_int4 = cpu::expert_linear_int4_avx2;
  return k;
}

constexpr cpu::Kernels avx512() {
  cpu::Kernels k = avx2();
  k.gated = cpu::gated_avx512;
  k.gated_quantize = cpu::gated_quantize_avx512;
  k.softcap = cpu::softcap_avx512;
  k.add = cpu::add_avx512;
  k.embed = cpu::embed_avx512;
  k.take_rows = cpu::take_rows_avx512;
  k.rmsnorm = cpu::rmsnorm_avx512;
  k.add_rmsnorm = cpu::add_rmsnorm_avx512;
  k.rmsnorm_quantize = cpu::rmsnorm_quantize_avx512;
  k.add_rmsnorm_quantize = cpu::add_rmsnorm_quantize_avx512;
  k.kv_read = cpu::kv_read_avx512;
  k.rope_table = cpu::rope_table_avx512;
  k.rope_kv_write = cpu::rope_kv_write_avx512;
  k.sample = cpu::sample_avx512;
  k.logprobs = cpu::logprobs_avx512;
  k.attention = cpu::attention_avx512;
  k.kept_mass = cpu::kept_mass_avx512;
  k.block_meta_update = cpu::block_meta_update_avx512;
  k.block_score = cpu::block_score_avx512;
  k.block_topk = cpu::block_topk_avx512;
  k.linear = cpu::linear_avx512;
  k.expert_linear = cpu::expert_linear_avx512;
  k.quantize = cpu::quantize_avx512;
  k.linear_int8 = cpu::linear_int8_avx512;
  k.linear_int4 = cpu::linear_int4_avx512;
  k.expert_linear_int8 = cpu::expert_linear_int8_avx512;
  k.expert_linear_int4 = cpu::expert_linear_int4_avx512;
  return k;
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

bool has_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#else
bool has_bf16() { return false; }
#endif

bool has_any() { return true; }

struct Isa {
  const char* name;
  cpu::Kernels kernels;
  const cpu::Probes* probes;
  bool (*is_there)();  // on this CPU
};

// Best last.
constexpr Isa kIsas[] = {
    {"portable", kPortable, &cpu::kProbesPortable, has_any},
#ifdef VIVACE_X86
    {"avx2", avx2(), &cpu::kProbesAvx2, has_avx2},
    {"avx512", avx512(), &cpu::kProbesAvx512, has_avx512},
#endif
};
constexpr int32_t kNumIsas = sizeof(kIsas) / sizeof(kIsas[0]);

struct Context {
  Context(const cpu::Kernels& chosen, int32_t threads) : kernels(chosen), pool(threads) {}
  const cpu::Kernels& kernels;
  cpu::Pool pool;
  std::atomic<int64_t> finished{0};  // ops
};

}  // namespace

EXPORT int32_t vivace_abi() { return kAbi; }

EXPORT const char* vivace_isa_name(int32_t isa) { return isa >= 0 && isa < kNumIsas ? kIsas[isa].name : nullptr; }

EXPORT int32_t vivace_has_isa(int32_t isa) { return isa >= 0 && isa < kNumIsas && kIsas[isa].is_there(); }

EXPORT void* vivace_context_create(int32_t isa, int32_t threads) {
  if (!vivace_has_isa(isa) || threads < 1) return nullptr;
  return new (std::nothrow) Context(kIsas[isa].kernels, threads);
}

EXPORT void vivace_context_destroy(void* context) { delete static_cast<Context*>(context); }

EXPORT int64_t vivace_packed_int8_bytes(int64_t N, int64_t K) { return cpu::packed_int8_bytes(N, K); }

EXPORT void vivace_pack_int8(uint8_t* out, const int8_t* q, const float* scales, int64_t N, int64_t K) {
  cpu::pack_int8(out, q, scales, N, K);
}

EXPORT int64_t vivace_packed_int4_bytes(int64_t N, int64_t K, int64_t group) {
  return cpu::packed_int4_bytes(N, K, group);
}

EXPORT void vivace_pack_int4(uint8_t* out, const int8_t* q, const uint16_t* scales, int64_t N, int64_t K,
                             int64_t group) {
  cpu::pack_int4(out, q, scales, N, K, group);
}

// What the machine can do at most with an instruction set: see probe.h. 0 if that has no such instruction, or memory is short.
EXPORT int32_t vivace_probe_read(int32_t isa, int32_t threads, int64_t bytes, int32_t repeats, double* rates) {
  if (!vivace_has_isa(isa) || threads < 1) return 0;
  return cpu::probe_read(*kIsas[isa].probes, threads, bytes, repeats, rates);
}

// `what`: 0 fp32, 1 int8, 2 bf16.
EXPORT int32_t vivace_probe_steps(int32_t isa, int32_t what, int32_t threads, double seconds, int32_t repeats,
                                  double* rates) {
  if (!vivace_has_isa(isa) || threads < 1 || (what == 2 && !has_bf16())) return 0;
  const cpu::Probes& probes = *kIsas[isa].probes;
  const cpu::Steps& steps = what == 0 ? probes.fp32 : what == 1 ? probes.int8 : probes.bf16;
  if (!steps.run) return 0;
  cpu::probe_steps(steps, threads, seconds, repeats, rates);
  return 1;
}

// How many ops have finished. Any thread may ask, while another is in an op.
EXPORT int64_t vivace_context_progress(void* context) {
  return static_cast<Context*>(context)->finished.load(std::memory_order_relaxed);
}

EXPORT void* vivace_program_create(const cpu::Recording* recording) {
  return cpu::Program::make(*recording).release();
}

EXPORT void vivace_program_destroy(void* program) { delete static_cast<cpu::Program*>(program); }

EXPORT void vivace_program_run(void* context, void* program, const int64_t* sizes, const cpu::Call* more,
                               int64_t num_more, double* seconds) {
  Context& c = *static_cast<Context*>(context);
  c.pool.begin();
  static_cast<cpu::Program*>(program)->run(context, sizes, more, num_more, seconds);
  c.pool.end();
}

EXPORT int32_t vivace_round_int8(uint8_t* out, const float* w, int64_t N, int64_t K, int64_t first, int64_t count) {
  return cpu::round_int8(out, w, N, K, first, count);
}

EXPORT int32_t vivace_round_int4(uint8_t* out, const float* w, int64_t N, int64_t K, int64_t group, int64_t first,
                                 int64_t count) {
  return cpu::round_int4(out, w, N, K, group, first, count);
}

#define OP(op, Args)                                                                  \
  EXPORT int64_t vivace_##op##_size() { return int64_t(sizeof(cpu::Args)); }          \
  EXPORT void vivace_##op(void* context, const void* args) {                          \
    Context& c = *static_cast<Context*>(context);                                     \
    c.kernels.op(c.pool, *static_cast<const cpu::Args*>(args));                       \
    c.finished.fetch_add(1, std::memory_order_relaxed);                               \
  }

OP(linear, LinearArgs)
OP(quantize, QuantizeArgs)
OP(linear_int8, LinearInt8Args)
OP(linear_int4, LinearInt4Args)
OP(embed, EmbedArgs)
OP(embed_int8, EmbedInt8Args)
OP(rmsnorm, RmsnormArgs)
OP(add_rmsnorm, AddRmsnormArgs)
OP(rmsnorm_quantize, RmsnormQuantizeArgs)
OP(add_rmsnorm_quantize, AddRmsnormQuantizeArgs)
OP(rope_table, RopeTableArgs)
OP(rope_kv_write, RopeKvWriteArgs)
OP(attention, AttentionArgs)
OP(kept_mass, KeptMassArgs)
OP(block_meta_update, BlockMetaUpdateArgs)
OP(block_score, BlockScoreArgs)
OP(block_topk, BlockTopkArgs)
OP(gated, GatedArgs)
OP(gated_quantize, GatedQuantizeArgs)
OP(softcap, SoftcapArgs)
OP(add, AddArgs)
OP(moe_route, MoeRouteArgs)
OP(expert_linear, ExpertLinearArgs)
OP(expert_linear_int8, ExpertLinearInt8Args)
OP(expert_linear_int4, ExpertLinearInt4Args)
OP(moe_combine, MoeCombineArgs)
OP(take_rows, TakeRowsArgs)
OP(sample, SampleArgs)
OP(logprobs, LogprobsArgs)
OP(kv_read, KvReadArgs)
