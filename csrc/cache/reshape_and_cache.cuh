// What the CUDA kernels that write into the KV cache share.
#pragma once

#include "cache/reshape_and_cache.h"
#include "common/cuda_common.cuh"

namespace nano_vllm::cuda {

// Whether keys, values and caches may be moved in vectors of T.
template <class T>
bool fits_vectors(const ReshapeAndCacheParams& p) {
  return p.head_dim % Vec<T>::kSize == 0 &&
         is_vec_aligned<T>(p.key, p.key_stride_token, p.key_stride_head) &&
         is_vec_aligned<T>(p.value, p.value_stride_token, p.value_stride_head) &&
         is_vec_aligned<T>(p.key_cache, p.key_cache_stride_block, p.key_cache_stride_token,
                           p.key_cache_stride_head) &&
         is_vec_aligned<T>(p.value_cache, p.value_cache_stride_block, p.value_cache_stride_token,
                           p.value_cache_stride_head);
}

}  // namespace nano_vllm::cuda
