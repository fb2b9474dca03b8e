// CUDA paged attention: checks, and which kernels a batch needs. Each kernel takes the sequences of
// its kind from the device's own query_start_loc, so nothing waits for the host.
#include "attention/attention_kernels.cuh"

namespace nano_vllm::cuda {
namespace {

void check_params(const PagedAttentionParams& p) {
  check(p.num_kv_heads > 0 && p.num_heads % p.num_kv_heads == 0,
        "paged_attention: num_heads must be a multiple of num_kv_heads, got ", p.num_heads, " and ",
        p.num_kv_heads);
  check(p.block_size > 0 && p.block_size % kRunTokens == 0,
        "paged_attention: block_size must be a multiple of ", kRunTokens, ", got ", p.block_size);
  const int64_t needed = paged_attention_workspace_numel(p.num_seqs, p.num_heads, p.head_dim);
  check(p.workspace_numel >= needed, "paged_attention: workspace must hold at least ", needed,
        " floats, got ", p.workspace_numel);
}

}  // namespace

void paged_attention(const PagedAttentionParams& params, cudaStream_t stream) {
  if (params.num_seqs == 0 || params.num_tokens == 0 || params.num_heads == 0) return;
  check_params(params);
  const bool is_fp32 = params.dtype == DType::kFloat32;
  (is_fp32 ? launch_decode_fp32 : launch_decode)(params, stream);
  launch_merge_splits(params, stream);
  if (params.max_query_len > 1) {
    (is_fp32 ? launch_prefill_fp32 : launch_prefill)(params, stream);
  }
}

}  // namespace nano_vllm::cuda
