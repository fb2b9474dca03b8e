// Rotary position embedding (RoFormer, arXiv 2104.09864), in place on queries and keys.
#pragma once

#include <cstdint>

#include "common/stream.h"
#include "common/types.h"

namespace nano_vllm {

// The first rotary_dim elements of each head rotate by the angles of the token's position; the rest
// stay. neox pairs element i with i + rotary_dim / 2, gptj pairs 2i with 2i + 1.
struct RotaryEmbeddingParams {
  DType dtype;
  const int64_t* positions;  // [num_tokens], each in [0, max_position)
  void* query;               // [num_tokens, num_heads, head_dim]
  void* key;                 // [num_tokens, num_kv_heads, head_dim]
  const float*
      cos_sin_cache;  // [max_position, rotary_dim]: rotary_dim / 2 cosines, then as many sines

  // Strides in elements; head_dim is contiguous.
  int64_t query_stride_token, query_stride_head;
  int64_t key_stride_token, key_stride_head;

  int32_t num_tokens, num_heads, num_kv_heads, rotary_dim;
  bool is_neox;
};

namespace cpu {
void rotary_embedding(const RotaryEmbeddingParams& params);
}
namespace cuda {
void rotary_embedding(const RotaryEmbeddingParams& params, cudaStream_t stream);
}

}  // namespace nano_vllm
