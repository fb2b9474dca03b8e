// Writes new keys and values into their slots of the paged KV cache.
#pragma once

#include <cstdint>

#include "common/stream.h"
#include "common/types.h"

namespace nano_vllm {

// Token i goes to block slot_mapping[i] / block_size, row slot_mapping[i] % block_size; a negative
// slot is padding. A cache of kFloat8E4M3 gets the elements divided by the scale of their head,
// rounded to nearest even; what exceeds its range becomes the largest number of that sign.
struct ReshapeAndCacheParams {
  DType dtype;                  // of key and value
  DType cache_dtype;            // of both caches: dtype or kFloat8E4M3
  const void* key;              // [num_tokens, num_kv_heads, head_dim]
  const void* value;            // [num_tokens, num_kv_heads, head_dim]
  void* key_cache;              // [num_blocks, block_size, num_kv_heads, head_dim]
  void* value_cache;            // [num_blocks, block_size, num_kv_heads, head_dim]
  const float* key_scale;       // [num_kv_heads], positive; nullptr for 1; for kFloat8E4M3 alone
  const float* value_scale;     // [num_kv_heads], likewise
  const int64_t* slot_mapping;  // [num_tokens]

  // Strides in elements; head_dim is contiguous everywhere.
  int64_t key_stride_token, key_stride_head;
  int64_t value_stride_token, value_stride_head;
  int64_t key_cache_stride_block, key_cache_stride_token, key_cache_stride_head;
  int64_t value_cache_stride_block, value_cache_stride_token, value_cache_stride_head;

  int32_t num_tokens, num_kv_heads, head_dim, block_size;
};

namespace cpu {
void reshape_and_cache(const ReshapeAndCacheParams& params);
}
namespace cuda {
void reshape_and_cache(const ReshapeAndCacheParams& params, cudaStream_t stream);
}

}  // namespace nano_vllm
