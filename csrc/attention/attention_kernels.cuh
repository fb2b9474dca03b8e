// The kernels behind paged_attention.cu, one launcher each. They only queue work; all checks are
// made before.
#pragma once

#include "attention/kv_tile.cuh"
#include "common/launch.cuh"

namespace nano_vllm::cuda {

// What a decode shares with others.
struct PrefixOfSequence {
  int num_tokens, num_splits;
};

// Params, and what paged_attention.cu decides for the batch.
struct AttentionLaunch : PagedAttentionParams {
  int32_t max_decode_queries;  // sequences with more query tokens are prefills, the others decodes
  int32_t* plan;               // head of the workspace
  float* partial_results;      // what follows it
  int32_t* prefix_memory;      // and that, where decodes that share a prefix read it once
  int32_t* prefill_memory;     // and that
  const PrefixOfSequence* prefix_of_seq;  // [num_seqs]; nullptr: none does
  bool is_beside_prefill;  // the kernel before is the batch's prefill, which decodes don't wait for
};

// Decodes. Those with more than one split leave partial rows in the workspace.
void launch_decode(const AttentionLaunch& p, cudaStream_t stream);  // 16-bit dtypes
void launch_decode_fp32(const AttentionLaunch& p, cudaStream_t stream);

// Merges the partial rows of the launch before, if there can be any.
void launch_merge_splits(const AttentionLaunch& p, cudaStream_t stream);

// Decodes on sm_90, 16-bit dtypes: blocks share the work by a plan and merge what they split.
bool can_decode_sm90(const AttentionLaunch& p);
void launch_plan_decode(const AttentionLaunch& p, cudaStream_t stream);
void launch_decode_sm90(const AttentionLaunch& p, cudaStream_t stream);

// Prefills.
void launch_prefill(const AttentionLaunch& p, cudaStream_t stream);  // 16-bit dtypes
void launch_prefill_fp32(const AttentionLaunch& p, cudaStream_t stream);

// Prefills on sm_90, 16-bit dtypes: planned once a step, as decodes are.
bool can_prefill_sm90(const AttentionLaunch& p);
void launch_plan_prefill(const AttentionLaunch& p, cudaStream_t stream);
void launch_prefill_sm90(const AttentionLaunch& p, cudaStream_t stream);
// The query rows of a tile, and its tokens: as many as registers allow.
constexpr int prefill_tile_rows(int head_dim) { return head_dim == 64 ? 192 : 128; }
constexpr int prefill_tile_tokens(int head_dim) {
  return head_dim == 64 || head_dim == 192 ? 96 : head_dim == 256 ? 64 : 128;
}

// On sm_90: prefixes that decodes share, see prefix_plan.cuh.
void launch_plan_prefix(const AttentionLaunch& p, cudaStream_t stream);
void launch_prefix_sm90(const AttentionLaunch& p, cudaStream_t stream);

// Calls run(std::integral_constant<int, head_dim>{}).
template <class Run>
void dispatch_head_dim(int head_dim, const Run& run) {
  switch (head_dim) {
    case 64:
      return run(std::integral_constant<int, 64>{});
    case 80:
      return run(std::integral_constant<int, 80>{});
    case 96:
      return run(std::integral_constant<int, 96>{});
    case 128:
      return run(std::integral_constant<int, 128>{});
    case 192:
      return run(std::integral_constant<int, 192>{});
    case 256:
      return run(std::integral_constant<int, 256>{});
  }
  fail("paged_attention: head_dim must be 64, 80, 96, 128, 192 or 256, got ", head_dim);
}

// Calls run(T{}) or, for caches of float8, run(Float8E4M3{}).
template <class T, class Run>
void dispatch_cache(const AttentionLaunch& p, const Run& run) {
  if (p.cache_dtype == DType::kFloat8E4M3) {
    run(Float8E4M3{});
  } else {
    run(T{});
  }
}

// dispatch_head_dim with the 16-bit element type of dtype and the caches':
// run(T{}, Cache{}, integral_constant).
template <class Run>
void dispatch_16_bit(const AttentionLaunch& p, const Run& run) {
  dispatch_head_dim(p.head_dim, [&](auto head_dim) {
    const auto with = [&](auto element) {
      dispatch_cache<decltype(element)>(p, [&](auto cache) { run(element, cache, head_dim); });
    };
    p.dtype == DType::kFloat16 ? with(__half{}) : with(__nv_bfloat16{});
  });
}

}  // namespace nano_vllm::cuda
