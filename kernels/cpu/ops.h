// The C ABI: one packed struct and one function per op. kernels/<op>/cpu.py has the same struct; loading compares sizes.
// Mathematics, shapes and ties: kernels/<op>/__init__.py. All arrays are dense and row-major; fp32 unless a type says other.
// The KV cache: kv.h. `kv_type` is the type of its elements.
#pragma once
#include <cstdint>

#include "pool.h"

namespace cpu {

constexpr int64_t kMostInputs = 1 << 16;  // of a row that becomes bytes: kernels.quantized.MAX_INPUTS

#pragma pack(push, 1)
struct LinearArgs {
  float* out;           // [T, N]
  const float* x;       // [T, K]
  const void* weight;   // [N, K], fp32 or bf16
  const float* bias;    // [N] or null
  int64_t T, N, K;
  int64_t is_bf16;
};
struct QuantizeArgs {
  uint8_t* q;      // [T, K]
  float* params;   // [T, 2]: scale, zero
  const float* x;  // [T, K]
  int64_t T, K;
};
struct LinearInt8Args {
  float* out;             // [T, N]
  const uint8_t* q;       // [T, K]
  const float* params;    // [T, 2]
  const uint8_t* weight;  // packed.h
  const float* bias;      // [N] or null
  int64_t T, N, K;
};
struct LinearInt4Args {
  float* out;             // [T, N]
  const uint8_t* q;       // [T, K]
  const float* params;    // [T, 2]
  const uint8_t* weight;  // packed.h
  const float* bias;      // [N] or null
  int64_t T, N, K, group;
};
struct EmbedInt8Args {
  float* out;             // [T, M]
  const int32_t* tokens;  // [T]
  const uint8_t* table;   // packed.h, [V, M]
  int64_t T, M, V;
  float scale;
};
struct EmbedArgs {
  float* out;             // [T, M]
  const int32_t* tokens;  // [T]
  const void* table;      // [V, M], fp32 or bf16
  int64_t T, M;
  int64_t is_bf16;
  float scale;
};
struct RmsnormArgs {
  float* out;           // [T, M]
  const float* x;       // [T, M]
  const float* weight;  // [M]
  int64_t T, M;
  float eps;
};
struct AddRmsnormArgs {
  float* sum;             // [T, M]
  float* out;             // [T, M]
  const float* x;         // [T, M]
  const float* residual;  // [T, M]
  const float* weight;    // [M]
  int64_t T, M;
  float eps;
};
struct RmsnormQuantizeArgs {
  uint8_t* q;      // [T, M]
  float* params;   // [T, 2]: scale, zero
  RmsnormArgs of;  // its `out` is not written
};
struct AddRmsnormQuantizeArgs {
  uint8_t* q;         // [T, M]
  float* params;      // [T, 2]: scale, zero
  AddRmsnormArgs of;  // its `out` is not written
};
struct RopeTableArgs {
  float* cos_sin;            // [T, 2 * half]
  const int32_t* positions;  // [T]
  const float* inv_freq;     // [W, half]
  const int32_t* variants;   // [T] or null
  int64_t T, half;
  float scale;
};
struct RopeKvWriteArgs {
  float* q;              // [T, H, D]
  void* kv_cache;        // kv.h
  const float* qkv;      // [T, (H + 2G) * D]
  const float* cos_sin;  // [T, R]
  const int32_t* slots;  // [T]
  const float* q_norm;   // [D], [H * D] or null
  const float* k_norm;   // [D], [G * D] or null
  int64_t T, H, G, S, D, R;
  int64_t is_row_norm;  // 1: the norms are over all heads of a row
  int64_t kv_type;
  float eps;
};
struct AttentionArgs {
  float* out;                   // [T, H, D]
  const float* q;               // [T, H, D]
  const void* kv_cache;         // kv.h
  const int32_t* block_tables;  // [B, X]
  const int32_t* query_starts;  // [B + 1]
  const int32_t* context_lens;  // [B]
  const float* sinks;           // [H] or null
  const int32_t* selected;      // [B, G, X * Z] or null, units: kv.h
  const int32_t* num_selected;  // [B, G], with `selected`; -1: all
  int64_t T, H, G, S, D, B, X;
  int64_t window;  // 0: none
  int64_t kv_type;
  float scale, softcap;  // softcap 0: none
};
struct KeptMassArgs {
  float* mass;              // [B, 2]
  const int32_t* measured;  // [B]
  const float* before;      // [B, 2] or null
  AttentionArgs of;         // its out, T, sinks and window are not used
};
struct BlockMetaUpdateArgs {
  uint16_t* meta;        // bf16 [N * Z, G, 2, D]
  const void* kv_cache;  // kv.h
  const int32_t* units;  // [count]
  int64_t count, G, S, D;
  int64_t kv_type;
};
struct BlockScoreArgs {
  float* scores;                // [B, G, X * Z]
  const float* q;               // [T, H, D]
  const uint16_t* meta;         // bf16 [N * Z, G, 2, D]
  const int32_t* block_tables;  // [B, X]
  const int32_t* query_starts;  // [B + 1]
  const int32_t* context_lens;  // [B]
  const int32_t* budgets;       // [B]
  const int32_t* dense_layers;  // [B]
  int64_t H, G, S, D, B, X, layer;
  float scale;
};
struct BlockTopkArgs {
  int32_t* selected;            // [B, G, X * Z]
  int32_t* num_selected;        // [B, G]
  const float* scores;          // [B, G, X * Z]
  const int32_t* context_lens;  // [B]
  const int32_t* budgets;       // [B]
  const int32_t* dense_layers;  // [B]
  int64_t G, S, B, X, layer;
};
struct GatedArgs {
  float* out;            // [T, F]
  const float* gate_up;  // [T, 2F]
  int64_t T, F;
  int64_t activation;  // its place in kernels.gated.ACTIVATIONS
  float alpha, limit;
};
struct GatedQuantizeArgs {
  uint8_t* q;     // [T, F]
  float* params;  // [T, 2]: scale, zero
  GatedArgs of;   // its `out` is not written
};
struct SoftcapArgs {
  float* out;      // [count]
  const float* x;  // [count]
  int64_t count;
  float cap;
};
struct AddArgs {
  float* out;             // [count]
  const float* x;         // [count]
  const float* residual;  // [count]
  int64_t count;
};
struct MoeRouteArgs {
  float* weights;       // [T, K]
  int32_t* experts;     // [T, K]
  const float* logits;  // [T, E]
  int64_t* loads;       // [E] or null; added to
  const float* bias;    // [E] or null
  int64_t T, E, K, num_groups, top_groups;
  int64_t is_softmax;  // 0: sigmoid
  int64_t renormalize;
  float scale;
};
struct ExpertLinearArgs {
  float* out;              // [T, K, N]
  const float* x;          // [T, I], or [T, K, I]
  const int32_t* experts;  // [T, K]
  const void* weight;      // [E, N, I], fp32 or bf16
  const float* bias;       // [E, N] or null
  int64_t T, K, E, N, I;
  int64_t has_own_rows;  // 1: x is [T, K, I]
  int64_t is_bf16;
};
struct ExpertLinearInt8Args {
  float* out;              // [T, K, N]
  const uint8_t* q;        // [T, I], or [T, K, I]
  const float* params;     // [T, 2], or [T, K, 2]
  const int32_t* experts;  // [T, K]
  const uint8_t* weight;   // packed.h, a matrix for each expert
  const float* bias;       // [E, N] or null
  int64_t T, K, E, N, I;
  int64_t has_own_rows;  // 1: q is [T, K, I]
};
struct ExpertLinearInt4Args {
  float* out;              // [T, K, N]
  const uint8_t* q;        // [T, I], or [T, K, I]
  const float* params;     // [T, 2], or [T, K, 2]
  const int32_t* experts;  // [T, K]
  const uint8_t* weight;   // packed.h, a matrix for each expert
  const float* bias;       // [E, N] or null
  int64_t T, K, E, N, I;
  int64_t has_own_rows;  // 1: q is [T, K, I]
  int64_t group;
};
struct MoeCombineArgs {
  float* out;                // [T, M]
  const float* y;            // [T, K, M]
  const float* weights;      // [T, K]
  const float* shared;       // [T, M] or null
  const float* shared_gate;  // [T] or null
  int64_t T, K, M;
};
struct TakeRowsArgs {
  float* out;           // [R, M]
  const float* x;       // [T, M]
  const int32_t* rows;  // [R]
  int64_t R, M;
};
struct SampleArgs {
  int32_t* tokens;                // [R]
  float* scores;                  // [R, V]
  const float* logits;            // [R, V]
  const float* temperature;       // [R]
  const int32_t* top_k;           // [R]
  const float* top_p;             // [R]
  const float* min_p;             // [R]
  const uint64_t* seeds;          // [R]
  const int32_t* positions;       // [R]
  const float* repetition;        // [R]
  const float* frequency;         // [R]
  const float* presence;          // [R]
  const int32_t* penalty_starts;  // [R + 1]
  const int32_t* penalty_ids;     // [P]
  const int32_t* penalty_counts;  // [P]
  const int32_t* bias_starts;     // [R + 1]
  const int32_t* bias_ids;        // [X]
  const float* bias_values;       // [X]
  int64_t R, V;
};
struct LogprobsArgs {
  float* chosen;          // [R]
  int32_t* ranks;         // [R]
  int32_t* top_ids;       // [R, K]
  float* top_logprobs;    // [R, K]
  const float* logits;    // [R, V]
  const int32_t* tokens;  // [R]
  int64_t R, V, K;
};
struct KvReadArgs {
  float* k;               // [T, G, D]
  float* v;               // [T, G, D]
  const void* kv_cache;   // kv.h
  const int32_t* slots;   // [T]
  int64_t T, G, S, D;
  int64_t kv_type;
};
#pragma pack(pop)

// One table per instruction set: what runs on this CPU is looked up once, when the library is loaded.
struct Kernels {
  void (*linear)(Pool&, const LinearArgs&);
  void (*quantize)(Pool&, const QuantizeArgs&);
  void (*linear_int8)(Pool&, const LinearInt8Args&);
  void (*linear_int4)(Pool&, const LinearInt4Args&);
  void (*embed)(Pool&, const EmbedArgs&);
  void (*embed_int8)(Pool&, const EmbedInt8Args&);
  void (*rmsnorm)(Pool&, const RmsnormArgs&);
  void (*add_rmsnorm)(Pool&, const AddRmsnormArgs&);
  void (*rmsnorm_quantize)(Pool&, const RmsnormQuantizeArgs&);
  void (*add_rmsnorm_quantize)(Pool&, const AddRmsnormQuantizeArgs&);
  void (*rope_table)(Pool&, const RopeTableArgs&);
  void (*rope_kv_write)(Pool&, const RopeKvWriteArgs&);
  void (*attention)(Pool&, const AttentionArgs&);
  void (*kept_mass)(Pool&, const KeptMassArgs&);
  void (*block_meta_update)(Pool&, const BlockMetaUpdateArgs&);
  void (*block_score)(Pool&, const BlockScoreArgs&);
  void (*block_topk)(Pool&, const BlockTopkArgs&);
  void (*gated)(Pool&, const GatedArgs&);
  void (*gated_quantize)(Pool&, const GatedQuantizeArgs&);
  void (*softcap)(Pool&, const SoftcapArgs&);
  void (*add)(Pool&, const AddArgs&);
  void (*moe_route)(Pool&, const MoeRouteArgs&);
  void (*expert_linear)(Pool&, const ExpertLinearArgs&);
  void (*expert_linear_int8)(Pool&, const ExpertLinearInt8Args&);
  void (*expert_linear_int4)(Pool&, const ExpertLinearInt4Args&);
  void (*moe_combine)(Pool&, const MoeCombineArgs&);
  void (*take_rows)(Pool&, const TakeRowsArgs&);
  void (*sample)(Pool&, const SampleArgs&);
  void (*logprobs)(Pool&, const LogprobsArgs&);
  void (*kv_read)(Pool&, const KvReadArgs&);
};

void linear_portable(Pool&, const LinearArgs&);
void linear_avx2(Pool&, const LinearArgs&);
void linear_avx512(Pool&, const LinearArgs&);
void quantize_portable(Pool&, const QuantizeArgs&);
void quantize_avx2(Pool&, const QuantizeArgs&);
void quantize_avx512(Pool&, const QuantizeArgs&);
void linear_int8_portable(Pool&, const LinearInt8Args&);
void linear_int8_avx2(Pool&, const LinearInt8Args&);
void linear_int8_avx512(Pool&, const LinearInt8Args&);
void linear_int4_portable(Pool&, const LinearInt4Args&);
void linear_int4_avx2(Pool&, const LinearInt4Args&);
void linear_int4_avx512(Pool&, const LinearInt4Args&);
void embed_portable(Pool&, const EmbedArgs&);
void embed_avx2(Pool&, const EmbedArgs&);
void embed_avx512(Pool&, const EmbedArgs&);
void embed_int8_portable(Pool&, const EmbedInt8Args&);
void rmsnorm_portable(Pool&, const RmsnormArgs&);
void rmsnorm_avx2(Pool&, const RmsnormArgs&);
void rmsnorm_avx512(Pool&, const RmsnormArgs&);
void add_rmsnorm_portable(Pool&, const AddRmsnormArgs&);
void add_rmsnorm_avx2(Pool&, const AddRmsnormArgs&);
void add_rmsnorm_avx512(Pool&, const AddRmsnormArgs&);
void rmsnorm_quantize_portable(Pool&, const RmsnormQuantizeArgs&);
void rmsnorm_quantize_avx2(Pool&, const RmsnormQuantizeArgs&);
void rmsnorm_quantize_avx512(Pool&, const RmsnormQuantizeArgs&);
void add_rmsnorm_quantize_portable(Pool&, const AddRmsnormQuantizeArgs&);
void add_rmsnorm_quantize_avx2(Pool&, const AddRmsnormQuantizeArgs&);
void add_rmsnorm_quantize_avx512(Pool&, const AddRmsnormQuantizeArgs&);
void gated_quantize_portable(Pool&, const GatedQuantizeArgs&);
void gated_quantize_avx2(Pool&, const GatedQuantizeArgs&);
void gated_quantize_avx512(Pool&, const GatedQuantizeArgs&);
void rope_table_portable(Pool&, const RopeTableArgs&);
void rope_table_avx2(Pool&, const RopeTableArgs&);
void rope_table_avx512(Pool&, const RopeTableArgs&);
void rope_kv_write_portable(Pool&, const RopeKvWriteArgs&);
void rope_kv_write_avx2(Pool&, const RopeKvWriteArgs&);
void rope_kv_write_avx512(Pool&, const RopeKvWriteArgs&);
void attention_portable(Pool&, const AttentionArgs&);
void attention_avx2(Pool&, const AttentionArgs&);
void attention_avx512(Pool&, const AttentionArgs&);
void kept_mass_portable(Pool&, const KeptMassArgs&);
void kept_mass_avx2(Pool&, const KeptMassArgs&);
void kept_mass_avx512(Pool&, const KeptMassArgs&);
void block_meta_update_portable(Pool&, const BlockMetaUpdateArgs&);
void block_meta_update_avx2(Pool&, const BlockMetaUpdateArgs&);
void block_meta_update_avx512(Pool&, const BlockMetaUpdateArgs&);
void block_score_portable(Pool&, const BlockScoreArgs&);
void block_score_avx2(Pool&, const BlockScoreArgs&);
void block_score_avx512(Pool&, const BlockScoreArgs&);
void block_topk_portable(Pool&, const BlockTopkArgs&);
void block_topk_avx2(Pool&, const BlockTopkArgs&);
void block_topk_avx512(Pool&, const BlockTopkArgs&);
void gated_portable(Pool&, const GatedArgs&);
void gated_avx2(Pool&, const GatedArgs&);
void gated_avx512(Pool&, const GatedArgs&);
void softcap_portable(Pool&, const SoftcapArgs&);
void softcap_avx2(Pool&, const SoftcapArgs&);
void softcap_avx512(Pool&, const SoftcapArgs&);
void add_portable(Pool&, const AddArgs&);
void add_avx2(Pool&, const AddArgs&);
void add_avx512(Pool&, const AddArgs&);
void moe_route_portable(Pool&, const MoeRouteArgs&);
void expert_linear_portable(Pool&, const ExpertLinearArgs&);
void expert_linear_avx2(Pool&, const ExpertLinearArgs&);
void expert_linear_avx512(Pool&, const ExpertLinearArgs&);
void expert_linear_int8_portable(Pool&, const ExpertLinearInt8Args&);
void expert_linear_int8_avx2(Pool&, const ExpertLinearInt8Args&);
void expert_linear_int8_avx512(Pool&, const ExpertLinearInt8Args&);
void expert_linear_int4_portable(Pool&, const ExpertLinearInt4Args&);
void expert_linear_int4_avx2(Pool&, const ExpertLinearInt4Args&);
void expert_linear_int4_avx512(Pool&, const ExpertLinearInt4Args&);
void moe_combine_portable(Pool&, const MoeCombineArgs&);
void take_rows_portable(Pool&, const TakeRowsArgs&);
void take_rows_avx2(Pool&, const TakeRowsArgs&);
void take_rows_avx512(Pool&, const TakeRowsArgs&);
void sample_portable(Pool&, const SampleArgs&);
void sample_avx2(Pool&, const SampleArgs&);
void sample_avx512(Pool&, const SampleArgs&);
void logprobs_portable(Pool&, const LogprobsArgs&);
void logprobs_avx2(Pool&, const LogprobsArgs&);
void logprobs_avx512(Pool&, const LogprobsArgs&);
void kv_read_portable(Pool&, const KvReadArgs&);
void kv_read_avx2(Pool&, const KvReadArgs&);
void kv_read_avx512(Pool&, const KvReadArgs&);

// Quantized matrices in the layout that the ops read (packed.h); `out` has as many bytes as the first function says.
int64_t packed_int8_bytes(int64_t N, int64_t K);
void pack_int8(uint8_t* out, const int8_t* q, const float* scales, int64_t N, int64_t K);
int64_t packed_int4_bytes(int64_t N, int64_t K, int64_t group);
void pack_int4(uint8_t* out, const int8_t* q, const uint16_t* scales, int64_t N, int64_t K, int64_t group);
// The same from fp32, by rows: rounds `count` rows w [count, K], which are those from `first` on. `out` was zero before the
// first of them. False: a number is not finite, or so large that its scale is not; then some rows are not written.
bool round_int8(uint8_t* out, const float* w, int64_t N, int64_t K, int64_t first, int64_t count);
bool round_int4(uint8_t* out, const float* w, int64_t N, int64_t K, int64_t group, int64_t first, int64_t count);

}  // namespace cpu
