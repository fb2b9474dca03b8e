// reshape_and_cache with what comes before it: the norms of query and key heads, if the model has
// them, and the rotary position embedding (RoFormer, arXiv 2104.09864).
#pragma once

#include <cstdint>

#include "cache/reshape_and_cache.h"

namespace nano_vllm {

constexpr int32_t kMaxRotaryHeadDim = 256;

// Each query and key head is divided by its root mean square and multiplied by the weights (as
// rms_norm does, rounded to dtype), then its first rotary_dim elements rotate by the angles of the
// token's position: neox pairs element i with i + rotary_dim / 2, gptj pairs 2i with 2i + 1. The
// query changes in place, padding too; the key goes to the cache and stays as it is. head_dim is at
// most kMaxRotaryHeadDim, num_kv_heads at least 1, and slots are less than 2^32. On CUDA strides
// are, too.
struct RotaryReshapeAndCacheParams {
  ReshapeAndCacheParams kv;
  void* query;               // [num_tokens, num_heads, head_dim]
  const int64_t* positions;  // [num_tokens], each in [0, max_position)
  const float*
      cos_sin_cache;  // [max_position, rotary_dim]: rotary_dim / 2 cosines, then as many sines
  const void* query_norm_weight;  // [head_dim], or nullptr for no norm
  const void* key_norm_weight;    // [head_dim], or nullptr for no norm

  int64_t query_stride_token, query_stride_head;  // in elements; head_dim is contiguous

  int32_t num_heads, rotary_dim;
  float norm_eps;
  bool is_neox;
};

namespace cpu {
void rotary_reshape_and_cache(const RotaryReshapeAndCacheParams& params);
}
namespace cuda {
void rotary_reshape_and_cache(const RotaryReshapeAndCacheParams& params, cudaStream_t stream);
}

}  // namespace nano_vllm
