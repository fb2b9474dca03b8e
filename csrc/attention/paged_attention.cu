// CUDA paged attention: checks, and which kernels a batch needs. Each kernel takes the sequences of
// its kind from the device's own query_start_loc, so nothing waits for the host.
#include "attention/prefix_plan.cuh"

namespace nano_vllm::cuda {
namespace {

// Up to which number of query tokens the planned kernel is the faster one; more are a prefill.
constexpr int kMaxPlannedQueries = 8;

void check_params(const PagedAttentionParams& p) {
  check(p.num_kv_heads > 0 && p.num_heads % p.num_kv_heads == 0,
        "paged_attention: num_heads must be a multiple of num_kv_heads, got ", p.num_heads, " and ",
        p.num_kv_heads);
  const int64_t needed = paged_attention_workspace_numel(p.num_seqs, p.num_heads, p.head_dim);
  check(p.workspace_numel >= needed, "paged_attention: workspace must hold at least ", needed,
        " floats, got ", p.workspace_numel);
}

AttentionLaunch launch_of(const PagedAttentionParams& params, int max_decode_queries) {
  AttentionLaunch launch{};
  static_cast<PagedAttentionParams&>(launch) = params;
  launch.max_decode_queries = max_decode_queries;
  launch.plan = reinterpret_cast<int32_t*>(params.workspace);
  launch.partial_results = params.workspace + kPlanNumel;
  launch.prefix_memory = reinterpret_cast<int32_t*>(
      params.workspace +
      decode_workspace_numel(params.num_seqs, params.num_heads, params.head_dim));
  launch.prefill_memory = reinterpret_cast<int32_t*>(
      params.workspace +
      paged_attention_workspace_numel(params.num_seqs, params.num_heads, params.head_dim) -
      prefill_plan_numel(params.num_seqs));
  return launch;
}

// Whether decodes may read a prefix that they share together, as far as a step knows.
bool can_share_prefix(const PagedAttentionParams& p) {
  return p.prefix_leaders != nullptr && p.sliding_window == 0 && p.min_query_len <= 1 &&
         p.num_heads / p.num_kv_heads <= prefill_tile_rows(p.head_dim);
}

bool has_decodes(const AttentionLaunch& p) { return p.min_query_len <= p.max_decode_queries; }
bool has_prefills(const AttentionLaunch& p) { return p.max_query_len > p.max_decode_queries; }

// What decodes share, then what is left of them, and prefills.
void launch_plans(AttentionLaunch& launch, bool shares_prefix, cudaStream_t stream) {
  launch.prefix_of_seq = shares_prefix ? PrefixPlan(launch).of_seq : nullptr;
  if (shares_prefix) launch_plan_prefix(launch, stream);
  if (has_decodes(launch)) launch_plan_decode(launch, stream);
  if (has_prefills(launch)) launch_plan_prefill(launch, stream);
}

}  // namespace

void plan_attention(const PagedAttentionParams& params, cudaStream_t stream) {
  if (params.num_seqs == 0 || params.num_heads == 0) return;
  check_params(params);
  if (compute_capability() != 90) return;
  AttentionLaunch launch = launch_of(params, kMaxPlannedQueries);
  launch_plans(launch, can_share_prefix(params), stream);
}

void paged_attention(const PagedAttentionParams& params, cudaStream_t stream) {
  if (params.num_seqs == 0 || params.num_tokens == 0 || params.num_heads == 0) return;
  check_params(params);
  check(params.block_size > 0 && params.block_size % kRunTokens == 0,
        "paged_attention: block_size must be a multiple of ", kRunTokens, ", got ",
        params.block_size);
  AttentionLaunch launch = launch_of(params, kMaxPlannedQueries);
  const bool is_fp32 = params.dtype == DType::kFloat32;
  if (can_decode_sm90(launch)) {
    const bool shares_prefix = can_share_prefix(params) && can_prefill_sm90(launch);
    if (params.is_planned && shares_prefix == can_share_prefix(params)) {
      launch.prefix_of_seq = shares_prefix ? PrefixPlan(launch).of_seq : nullptr;
    } else {
      launch_plans(launch, shares_prefix, stream);
    }
    if (shares_prefix) launch_prefix_sm90(launch, stream);
    // Decodes come behind prefills: their many small parts fill the multiprocessors that the last
    // tiles leave idle.
    launch.is_beside_prefill = has_prefills(launch) && can_prefill_sm90(launch);
    if (launch.is_beside_prefill) launch_prefill_sm90(launch, stream);
    if (has_decodes(launch)) launch_decode_sm90(launch, stream);
    if (launch.is_beside_prefill) return;
  } else {
    launch.max_decode_queries = 1;
    if (has_decodes(launch)) {
      (is_fp32 ? launch_decode_fp32 : launch_decode)(launch, stream);
      launch_merge_splits(launch, stream);
    }
  }
  if (has_prefills(launch)) (is_fp32 ? launch_prefill_fp32 : launch_prefill)(launch, stream);
}

}  // namespace nano_vllm::cuda
