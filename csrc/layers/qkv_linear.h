// The product that makes queries, keys and values, with all that happens to them before attention.
#pragma once

#include "cache/rotary_reshape_and_cache.h"
#include "layers/linear.h"

namespace nano_vllm {

// rotary_reshape_and_cache of what linear gives: the heads of the query, the key and the value,
// one behind the other, are the weight's rows. Nothing in between is rounded to dtype.
struct QkvLinearParams {
  LinearParams linear;  // of float16 or bfloat16; without out
  // The query is what is written; without key and value. Heads of 64 or 128 elements, all of them
  // rotated, in pairs as neox has them.
  RotaryReshapeAndCacheParams rotary;
};

namespace cuda {
// For what can_linear takes; rows, heads and caches lie at multiples of 16 bytes, or of 8 elements.
void qkv_linear(const QkvLinearParams& params, cudaStream_t stream);
// Whether it is faster than torch's product and the kernel behind it.
bool qkv_linear_pays(int num_rows, int in_features, int out_features);
}  // namespace cuda

}  // namespace nano_vllm
