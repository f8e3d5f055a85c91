// The C++ library without Python, for the sanitizers: the pool, programs, and every op on every instruction set of this CPU.
// Buffers have the size that the contract says, to the byte, so that a read or write past one is seen; what the ops compute
// is checked in Python. Here they must give the same on one thread, on several, and in a program.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "ops.h"
#include "program.h"

extern "C" {
const char* vivace_isa_name(int32_t isa);
int32_t vivace_has_isa(int32_t isa);
void* vivace_context_create(int32_t isa, int32_t threads);
void vivace_context_destroy(void* context);
int64_t vivace_context_progress(void* context);
void* vivace_program_create(const cpu::Recording* recording);
void vivace_program_destroy(void* program);
void vivace_program_run(void* context, void* program, const int64_t* sizes, const cpu::Call* more, int64_t num_more,
                        double* seconds);
int64_t vivace_packed_int8_bytes(int64_t N, int64_t K);
int64_t vivace_packed_int4_bytes(int64_t N, int64_t K, int64_t group);
int32_t vivace_round_int8(uint8_t* out, const float* w, int64_t N, int64_t K, int64_t first, int64_t count);
int32_t vivace_round_int4(uint8_t* out, const float* w, int64_t N, int64_t K, int64_t group, int64_t first, int64_t count);
#define OP(name) void vivace_##name(void* context, const void* args);
OP(linear) OP(embed) OP(rmsnorm) OP(add_rmsnorm) OP(rope_table) OP(rope_kv_write) OP(attention) OP(kept_mass) OP(gated) OP(softcap)
OP(rmsnorm_quantize) OP(add_rmsnorm_quantize) OP(gated_quantize) OP(quantize) OP(linear_int8) OP(linear_int4) OP(embed_int8)
OP(expert_linear_int8) OP(expert_linear_int4) OP(block_meta_update) OP(block_score) OP(block_topk)
OP(add) OP(moe_route) OP(expert_linear) OP(moe_combine) OP(take_rows) OP(sample) OP(logprobs) OP(kv_read)
#undef OP
}

namespace {

#define CHECK(truth)                                              \
  do {                                                            \
    if (!(truth)) {                                               \
      std::printf("%s:%d: %s\n", __FILE__, __LINE__, #truth);     \
      std::exit(1);                                               \
    }                                                             \
  } while (false)

using Floats = std::vector<float>;
using Ints = std::vector<int32_t>;

Floats random(int64_t count) {
  static uint64_t state = 1;
  Floats found(static_cast<size_t>(count));
  for (float& one : found) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    one = float(int64_t(state >> 40) - (1 << 23)) * 0x1p-22f;  // -2..2
  }
  return found;
}

Ints counting(int64_t count, int64_t modulo) {
  Ints found(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) found[size_t(i)] = int32_t(i * 7 % modulo);
  return found;
}

// What the pieces of a range add up to, and which of them ran.
struct Range {
  const int32_t* in;
  int32_t* out;
  int64_t count;
};

void reverse(const void* args, int64_t begin, int64_t end) {  // reads what another thread wrote
  const auto& r = *static_cast<const Range*>(args);
  for (int64_t i = begin; i < end; ++i) r.out[i] = (r.out[i] + r.in[r.count - 1 - i] + 1) % 1000;
}

void pool_runs_every_index_once(int32_t threads) {
  cpu::Pool pool(threads);
  for (int64_t count : {0, 1, 2, 3, 7, 64, 1001}) {
    Ints one(size_t(count), 0), other(size_t(count), 0);
    const Range forth{one.data(), other.data(), count}, back{other.data(), one.data(), count};
    int32_t sums[2] = {0, 0};  // what each element of `other` and of `one` is
    for (int i = 0; i < 300; ++i) {
      if (i % 50 == 10) pool.begin();
      if (i % 100 == 99) std::this_thread::sleep_for(std::chrono::microseconds(400));  // workers park
      pool.for_range(count, 1, reverse, i % 2 ? &back : &forth);
      int32_t& sum = sums[i % 2];
      sum = (sum + sums[1 - i % 2] + 1) % 1000;
      for (int32_t got : i % 2 ? one : other) CHECK(got == sum);
      if (i % 50 == 30) pool.end();
    }
  }
}

void pools_end_at_once() {
  Ints in(64, 0), out(64, 0);
  const Range range{in.data(), out.data(), 64};
  for (int i = 0; i < 50; ++i) {
    cpu::Pool pool(1 + i % 4);
    if (i % 3) pool.begin();
    if (i % 2) pool.for_range(64, 1, reverse, &range);
  }
}

void pools_share_the_machine() {
  std::vector<std::thread> callers;
  for (int32_t i = 0; i < 3; ++i) callers.emplace_back(pool_runs_every_index_once, 2 + i);
  for (std::thread& caller : callers) caller.join();
}

// One call of an op: its struct, and what it writes.
struct Case {
  std::string name;
  cpu::Op* op;
  std::vector<uint8_t> args;
  std::vector<std::pair<void*, size_t>> outs;
};

template <typename Args>
std::vector<uint8_t> bytes(const Args& args) {
  std::vector<uint8_t> found(sizeof(args));
  std::memcpy(found.data(), &args, sizeof(args));
  return found;
}

template <typename T>
std::pair<void*, size_t> whole(std::vector<T>& out) {
  return {out.data(), out.size() * sizeof(T)};
}

std::vector<uint8_t> written(const Case& one) {
  std::vector<uint8_t> found;
  for (auto [data, size] : one.outs) {
    const auto* begin = static_cast<const uint8_t*>(data);
    found.insert(found.end(), begin, begin + size);
  }
  return found;
}

// All that the cases point to.
struct Buffers {
  std::deque<Floats> floats;
  std::deque<Ints> ints;
  std::deque<std::vector<int64_t>> longs;
  std::deque<std::vector<uint8_t>> raw;
  std::deque<std::vector<uint16_t>> shorts;
  std::vector<uint8_t>& u(int64_t count) { return raw.emplace_back(size_t(count), uint8_t(0)); }
  Floats& f(int64_t count) { return floats.emplace_back(random(count)); }
  Ints& i(Ints values) { return ints.emplace_back(std::move(values)); }
  Ints& i(int64_t count, int64_t modulo) { return i(counting(count, modulo)); }
};

// E matrices [N, K], one behind the other; group 0: int8.
std::vector<uint8_t>& packed(Buffers& b, const Floats& w, int64_t E, int64_t N, int64_t K, int64_t group) {
  const int64_t size = group ? vivace_packed_int4_bytes(N, K, group) : vivace_packed_int8_bytes(N, K);
  std::vector<uint8_t>& found = b.u(E * size);
  for (int64_t e = 0; e < E; ++e) {
    uint8_t* out = found.data() + e * size;
    const float* of_expert = w.data() + e * N * K;
    CHECK(group ? vivace_round_int4(out, of_expert, N, K, group, 0, N) : vivace_round_int8(out, of_expert, N, K, 0, N));
  }
  return found;
}

// The upper halves.
std::vector<uint8_t>& as_bf16(Buffers& b, const Floats& x) {
  std::vector<uint8_t>& found = b.u(int64_t(x.size()) * 2);
  for (size_t i = 0; i < x.size(); ++i) std::memcpy(&found[2 * i], reinterpret_cast<const uint8_t*>(&x[i]) + 2, 2);
  return found;
}

// What the ops of a model are called with.
struct Sizes {
  int64_t M, N, V, H, G, D, S, E, F, R;
  int64_t num_chosen;  // experts that tokens go to
  int64_t context;     // of the second request
  int64_t most_rows;   // of logits
};
constexpr Sizes kOdd{43, 37, 29, 6, 2, 20, 4, 5, 19, 12, 5, 49, 1000};
// Past what is kept at a time: blocks of inputs, rows of an expert, groups of splits, candidates of a row.
constexpr Sizes kLarge{1100, 35, 70001, 9, 1, 72, 16, 3, 1030, 64, 1, 4500, 2};

// Every op, with T rows, of two requests where there are any.
std::vector<Case> cases(Buffers& b, const Sizes& sizes, int64_t T) {
  const auto [M, N, V, H, G, D, S, E, F, R, num_chosen, context, most_rows] = sizes;
  constexpr int64_t kBlocks = 9, kTokens = 29, K = 3;
  const int64_t rows_of_logits = std::min(T, most_rows);
  std::vector<Case> found;
  const auto add = [&](const char* name, cpu::Op* op, const auto& args, auto&... outs) {
    found.push_back({name, op, bytes(args), {whole(outs)...}});
  };
  Floats &x = b.f(T * M), &residual = b.f(T * M), &norm = b.f(M), &out = b.f(T * M), &sum = b.f(T * M);
  Ints& rows = b.i(T, T);
  add("rmsnorm", vivace_rmsnorm, cpu::RmsnormArgs{out.data(), x.data(), norm.data(), T, M, 1e-6f}, out);
  add("add_rmsnorm", vivace_add_rmsnorm,
      cpu::AddRmsnormArgs{sum.data(), out.data(), x.data(), residual.data(), norm.data(), T, M, 1e-6f}, sum, out);
  add("add", vivace_add, cpu::AddArgs{out.data(), x.data(), residual.data(), T * M}, out);
  add("softcap", vivace_softcap, cpu::SoftcapArgs{out.data(), x.data(), T * M, 3}, out);
  add("take_rows", vivace_take_rows, cpu::TakeRowsArgs{out.data(), x.data(), rows.data(), T, M}, out);
  Ints& tokens = b.i(T, kTokens);
  Floats& table = b.f(kTokens * M);
  add("embed", vivace_embed, cpu::EmbedArgs{out.data(), tokens.data(), table.data(), T, M, 0, 2}, out);
  add("embed", vivace_embed, cpu::EmbedArgs{out.data(), tokens.data(), as_bf16(b, table).data(), T, M, 1, 2}, out);
  Floats &projected = b.f(T * N), &weight = b.f(N * M), &bias = b.f(N);
  add("linear", vivace_linear,
      cpu::LinearArgs{projected.data(), x.data(), weight.data(), bias.data(), T, N, M, 0}, projected);
  add("linear", vivace_linear,
      cpu::LinearArgs{projected.data(), x.data(), as_bf16(b, weight).data(), bias.data(), T, N, M, 1}, projected);
  Floats &act = b.f(T * F), &gate_up = b.f(T * 2 * F);
  for (int64_t activation = 0; activation < 4; ++activation)
    add("gated", vivace_gated, cpu::GatedArgs{act.data(), gate_up.data(), T, F, activation, 1.7f, 7}, act);

  Floats &chosen = b.f(T * K), &router = b.f(T * E), &expert_out = b.f(T * K * N), &combined = b.f(T * N);
  Ints &experts = b.i(T * K, num_chosen), &routed = b.i(T * K, E);
  Floats &expert_weight = b.f(E * N * M), &expert_bias = b.f(E * N), &shared = b.f(T * N), &gate = b.f(T);
  add("moe_route", vivace_moe_route,
      cpu::MoeRouteArgs{chosen.data(), routed.data(), router.data(), nullptr, nullptr, T, E, K, 1, 1, 1, 1, 1}, chosen, routed);
  add("expert_linear", vivace_expert_linear,
      cpu::ExpertLinearArgs{expert_out.data(), x.data(), experts.data(), expert_weight.data(), expert_bias.data(), T, K,
                            E, N, M, 0, 0}, expert_out);
  add("expert_linear", vivace_expert_linear,
      cpu::ExpertLinearArgs{expert_out.data(), x.data(), experts.data(), as_bf16(b, expert_weight).data(),
                            expert_bias.data(), T, K, E, N, M, 0, 1}, expert_out);
  add("moe_combine", vivace_moe_combine,
      cpu::MoeCombineArgs{combined.data(), expert_out.data(), chosen.data(), shared.data(), gate.data(), T, K, N},
      combined);

  std::vector<uint8_t> &bytes_of_x = b.u(T * M), &own_rows = b.u(T * K * M);
  Floats &params = b.f(T * 2), &own_params = b.f(T * K * 2), &x_of_experts = b.f(T * K * M);
  add("quantize", vivace_quantize, cpu::QuantizeArgs{bytes_of_x.data(), params.data(), x.data(), T, M}, bytes_of_x, params);
  add("quantize", vivace_quantize,
      cpu::QuantizeArgs{own_rows.data(), own_params.data(), x_of_experts.data(), T * K, M}, own_rows, own_params);
  std::vector<uint8_t>& gated_bytes = b.u(T * F);
  Floats& gated_params = b.f(T * 2);
  for (int64_t activation = 0; activation < 4; ++activation)
    add("gated_quantize", vivace_gated_quantize,
        cpu::GatedQuantizeArgs{gated_bytes.data(), gated_params.data(), {nullptr, gate_up.data(), T, F, activation, 1.7f, 7}},
        gated_bytes, gated_params);
  add("rmsnorm_quantize", vivace_rmsnorm_quantize,
      cpu::RmsnormQuantizeArgs{bytes_of_x.data(), params.data(), {nullptr, x.data(), norm.data(), T, M, 1e-6f}}, bytes_of_x,
      params);
  add("add_rmsnorm_quantize", vivace_add_rmsnorm_quantize,
      cpu::AddRmsnormQuantizeArgs{bytes_of_x.data(), params.data(),
                                  {sum.data(), nullptr, x.data(), residual.data(), norm.data(), T, M, 1e-6f}},
      bytes_of_x, params, sum);
  const auto& int8 = packed(b, weight, 1, N, M, 0);
  const auto &experts_int8 = packed(b, expert_weight, E, N, M, 0), &experts_int4 = packed(b, expert_weight, E, N, M, 32);
  add("embed_int8", vivace_embed_int8,
      cpu::EmbedInt8Args{out.data(), tokens.data(), packed(b, table, 1, kTokens, M, 0).data(), T, M, kTokens, 2}, out);
  add("linear_int8", vivace_linear_int8,
      cpu::LinearInt8Args{projected.data(), bytes_of_x.data(), params.data(), int8.data(), bias.data(), T, N, M}, projected);
  for (int64_t group : {32, 64, 128})
    add("linear_int4", vivace_linear_int4,
        cpu::LinearInt4Args{projected.data(), bytes_of_x.data(), params.data(), packed(b, weight, 1, N, M, group).data(),
                            bias.data(), T, N, M, group}, projected);
  for (int64_t has_own_rows : {0, 1}) {
    const uint8_t* rows_of = has_own_rows ? own_rows.data() : bytes_of_x.data();
    const float* params_of = has_own_rows ? own_params.data() : params.data();
    add("expert_linear_int8", vivace_expert_linear_int8,
        cpu::ExpertLinearInt8Args{expert_out.data(), rows_of, params_of, experts.data(), experts_int8.data(),
                                  expert_bias.data(), T, K, E, N, M, has_own_rows}, expert_out);
    add("expert_linear_int4", vivace_expert_linear_int4,
        cpu::ExpertLinearInt4Args{expert_out.data(), rows_of, params_of, experts.data(), experts_int4.data(),
                                  expert_bias.data(), T, K, E, N, M, has_own_rows, 32}, expert_out);
  }

  // The first request has T - 1 rows at the end of its context, the second one row.
  const int32_t first = int32_t(T > 1 ? T - 1 : 0), num_requests = T == 0 ? 0 : T > 1 ? 2 : 1;
  Ints starts{0}, lens, places, slots;
  if (T > 1) starts.push_back(first), lens.push_back(first + 3);
  if (T > 0) starts.push_back(int32_t(T)), lens.push_back(int32_t(context));
  const int64_t X = (std::max<int64_t>(context, first + 3) + S - 1) / S;
  for (int64_t t = 0; t < T; ++t) {
    places.push_back(t < first ? int32_t(t + 3) : int32_t(context - 1));
    slots.push_back(int32_t(t < first ? t + 3 : kBlocks * S - 1));
  }
  Floats &q = b.f(T * H * D), &heads = b.f(T * H * D), &sinks = b.f(H);
  Floats &qkv = b.f(T * (H + 2 * G) * D), &cos_sin = b.f(T * R), &inv_freq = b.f(R / 2);
  Floats &k = b.f(T * G * D), &v = b.f(T * G * D), &q_norm = b.f(D), &k_norm = b.f(D);
  Floats &q_row_norm = b.f(H * D), &k_row_norm = b.f(G * D);
  Ints &at = b.i(places), &slot = b.i(slots), &start = b.i(starts), &len = b.i(lens);
  Ints& blocks = b.i(num_requests * X, kBlocks);
  add("rope_table", vivace_rope_table,
      cpu::RopeTableArgs{cos_sin.data(), at.data(), inv_freq.data(), nullptr, T, R / 2, 1}, cos_sin);
  // Of each request one row; those that are long enough are sparse.
  const int64_t B = num_requests, Z = S % 16 ? 1 : S / 16, num_units = kBlocks * Z;
  Ints &units = b.i(num_units, num_units), &one_row = b.i(B + 1, B + 2), &budgets = b.i(Ints(size_t(B), 8));
  Ints &selected = b.i(B * G * X * Z, 1), &counts = b.i(B * G, 1), &none = b.i(B, 1), &all = b.i(Ints(size_t(B), 1));
  for (size_t i = 0; i < one_row.size(); ++i) one_row[i] = int32_t(i);
  units[0] = -1;
  for (int64_t kv_type : {0, 1, 2}) {  // fp32, bf16, int8 with scales
    const int64_t head_bytes = kv_type == 0 ? 4 * D : kv_type == 1 ? 2 * D : D + 4;
    std::vector<uint8_t>& cache = b.u(kBlocks * 2 * G * S * head_bytes);
    const bool is_row_norm = kv_type == 1;
    add("rope_kv_write", vivace_rope_kv_write,
        cpu::RopeKvWriteArgs{q.data(), cache.data(), qkv.data(), cos_sin.data(), slot.data(),
                             is_row_norm ? q_row_norm.data() : q_norm.data(),
                             is_row_norm ? k_row_norm.data() : k_norm.data(), T, H, G, S, D, R, is_row_norm, kv_type, 1e-6f},
        q, cache);
    add("kv_read", vivace_kv_read,
        cpu::KvReadArgs{k.data(), v.data(), cache.data(), slot.data(), T, G, S, D, kv_type}, k, v);
    for (int64_t window : {0, 5})
      add("attention", vivace_attention,
          cpu::AttentionArgs{heads.data(), q.data(), cache.data(), blocks.data(), start.data(), len.data(), sinks.data(),
                             nullptr, nullptr, T, H, G, S, D, B, X, window, kv_type, 0.2f, window ? 30.0f : 0.0f}, heads);
    auto& meta = b.shorts.emplace_back(size_t(num_units * G * 2 * D), uint16_t(0));
    Floats &unit_scores = b.f(B * G * X * Z), &mass = b.f(B * 2), &before = b.f(B * 2);
    add("block_meta_update", vivace_block_meta_update,
        cpu::BlockMetaUpdateArgs{meta.data(), cache.data(), units.data(), num_units, G, S, D, kv_type}, meta);
    add("block_score", vivace_block_score,
        cpu::BlockScoreArgs{unit_scores.data(), q.data(), meta.data(), blocks.data(), one_row.data(), len.data(),
                            budgets.data(), none.data(), H, G, S, D, B, X, 0, 0.2f}, unit_scores);
    add("block_topk", vivace_block_topk,
        cpu::BlockTopkArgs{selected.data(), counts.data(), unit_scores.data(), len.data(), budgets.data(), none.data(), G, S,
                           B, X, 0}, selected, counts);
    const cpu::AttentionArgs args{heads.data(), q.data(), cache.data(), blocks.data(), one_row.data(), len.data(),
                                  sinks.data(), selected.data(), counts.data(), B, H, G, S, D, B, X, 0, kv_type, 0.2f, 0};
    add("attention", vivace_attention, args, heads);
    add("kept_mass", vivace_kept_mass, cpu::KeptMassArgs{mass.data(), all.data(), before.data(), args}, mass);
  }

  T = rows_of_logits;
  Floats &logits = b.f(T * V), &scores = b.f(T * V), &ones = b.f(T), &halves = b.f(T), &zeros = b.f(T);
  std::fill(ones.begin(), ones.end(), 1.0f);
  std::fill(halves.begin(), halves.end(), 0.5f);
  std::fill(zeros.begin(), zeros.end(), 0.0f);
  Ints &drawn = b.i(T, V), &top_k = b.i(T, 9), &ranks = b.i(T, V), &top_ids = b.i(T * K, V);
  Floats &log_chosen = b.f(T), &log_top = b.f(T * K), &bias_values = b.f(T);
  auto& seeds = b.longs.emplace_back(size_t(T), 5);
  Ints &one_each = b.i(T + 1, T + 2), &ids = b.i(T, V);
  for (size_t t = 0; t < one_each.size(); ++t) one_each[t] = int32_t(t);
  add("sample", vivace_sample,
      cpu::SampleArgs{drawn.data(), scores.data(), logits.data(), halves.data(), top_k.data(), halves.data(),
                      zeros.data(), reinterpret_cast<const uint64_t*>(seeds.data()), at.data(), ones.data(), ones.data(),
                      ones.data(), one_each.data(), ids.data(), ids.data(), one_each.data(), ids.data(),
                      bias_values.data(), T, V}, drawn, scores);
  add("logprobs", vivace_logprobs,
      cpu::LogprobsArgs{log_chosen.data(), ranks.data(), top_ids.data(), log_top.data(), logits.data(), ids.data(), T, V,
                        K}, log_chosen, ranks, top_ids, log_top);
  return found;
}

// What every case leaves, one after another, on a new context.
std::vector<std::vector<uint8_t>> results(std::vector<Case>& all, int32_t isa, int32_t threads) {
  std::vector<std::vector<uint8_t>> found;
  void* context = vivace_context_create(isa, threads);
  for (Case& one : all) {
    one.op(context, one.args.data());
    found.push_back(written(one));
  }
  CHECK(vivace_context_progress(context) == int64_t(all.size()));
  vivace_context_destroy(context);
  return found;
}

void ops_give_the_same_on_threads_and_in_a_program(int32_t isa) {
  using Step = std::pair<Sizes, int64_t>;
  for (const auto& [sizes, T] :
       {Step(kOdd, 0), Step(kOdd, 1), Step(kOdd, 2), Step(kOdd, 5), Step(kOdd, 17), Step(kLarge, 17), Step(kLarge, 131)}) {
    Buffers buffers;
    std::vector<Case> all = cases(buffers, sizes, T);
    const auto want = results(all, isa, 1);
    for (int32_t threads : {2, 3}) {
      const auto got = results(all, isa, threads);
      for (size_t i = 0; i < all.size(); ++i)
        if (got[i] != want[i]) std::printf("%s differs on %d threads\n", all[i].name.c_str(), threads), std::exit(1);
    }
    std::vector<cpu::Op*> ops;
    std::vector<int64_t> starts;
    std::vector<uint8_t> args;
    for (const Case& one : all) {
      ops.push_back(one.op);
      starts.push_back(int64_t(args.size()));
      args.insert(args.end(), one.args.begin(), one.args.end());
      args.resize((args.size() + 7) / 8 * 8);  // as the recorder aligns them
    }
    const cpu::Recording recording{int64_t(all.size()), int64_t(args.size()), 0, 0, ops.data(), starts.data(),
                                   args.data(), nullptr};
    void* context = vivace_context_create(isa, 3);
    void* program = vivace_program_create(&recording);
    args.assign(args.size(), 0xff);  // the program has its own
    std::atomic<bool> stop{false};
    std::thread watchdog([&] {
      for (int64_t seen = 0; !stop.load();) {
        const int64_t now = vivace_context_progress(context);
        CHECK(now >= seen);
        seen = now;
      }
    });
    for (int i = 0; i < 3; ++i) vivace_program_run(context, program, nullptr, nullptr, 0, nullptr);
    stop.store(true);
    watchdog.join();
    CHECK(vivace_context_progress(context) == 3 * int64_t(all.size()));
    std::set<void*> later;  // what ops further on have written over
    for (size_t i = all.size(); i-- > 0;) {
      const bool is_last = std::none_of(all[i].outs.begin(), all[i].outs.end(),
                                        [&](const auto& out) { return later.contains(out.first); });
      if (is_last && written(all[i]) != want[i])
        std::printf("%s differs in a program\n", all[i].name.c_str()), std::exit(1);
      for (auto [data, size] : all[i].outs) later.insert(data);
    }
    vivace_program_destroy(program);
    vivace_context_destroy(context);
  }
}

void a_program_follows_its_sizes() {
  Floats x = random(40), out(40, -1), more(40, -1);
  const cpu::SoftcapArgs args{out.data(), x.data(), 0, 1}, last{more.data(), x.data(), 2, 1};
  cpu::Op* const op = vivace_softcap;
  const int64_t start = 0, patches[] = {offsetof(cpu::SoftcapArgs, count), 1, 2, 3};
  const cpu::Recording recording{1, sizeof(args), 1, 2, &op, &start, reinterpret_cast<const uint8_t*>(&args), patches};
  void* context = vivace_context_create(0, 2);
  void* program = vivace_program_create(&recording);
  const cpu::Call call{op, &last};
  for (const std::pair<int64_t, int64_t> sizes : {std::pair(0, 0), std::pair(4, 9), std::pair(1, 2), std::pair(1, 2)}) {
    std::fill(out.begin(), out.end(), -1);
    const int64_t both[] = {sizes.first, sizes.second};
    vivace_program_run(context, program, both, &call, sizes.first > 1, nullptr);
    for (int64_t i = 0; i < 40; ++i) CHECK((out[size_t(i)] != -1) == (i < 1 + 2 * both[0] + 3 * both[1]));
  }
  CHECK(more[1] != -1 && more[2] == -1);
  vivace_program_destroy(program);
  vivace_context_destroy(context);
}

}  // namespace

int main() {
  for (int32_t threads : {1, 2, 3, 5}) pool_runs_every_index_once(threads);
  pools_end_at_once();
  pools_share_the_machine();
  a_program_follows_its_sizes();
  for (int32_t isa = 0; vivace_isa_name(isa) != nullptr; ++isa)
    if (vivace_has_isa(isa)) ops_give_the_same_on_threads_and_in_a_program(isa), std::puts(vivace_isa_name(isa));
  std::puts("passed");
}
