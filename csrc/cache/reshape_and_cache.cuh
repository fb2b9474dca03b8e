// What the CUDA kernels that write into the KV cache share.
#pragma once

#include <cuda_fp8.h>

#include "cache/reshape_and_cache.h"
#include "common/cuda_common.cuh"

namespace nano_vllm::cuda {

// What a Vec<T> becomes in a cache of float8.
template <class T>
struct alignas(Vec<T>::kSize) Float8Vec {
  Float8E4M3 value[Vec<T>::kSize];
};

// x / scale as a cache of float8 holds it: the largest number for what is larger.
__device__ inline Float8E4M3 quantize(float x, float scale) {
  return {__nv_cvt_float_to_fp8(x / scale, __NV_SATFINITE, __NV_E4M3)};
}

template <class T>
__device__ inline Float8Vec<T> quantize(const Vec<T>& x, float scale) {
  Float8Vec<T> vec;
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; i += 2) {
    const __nv_fp8x2_storage_t pair = __nv_cvt_float2_to_fp8x2(
        make_float2(to_float(x.value[i]) / scale, to_float(x.value[i + 1]) / scale), __NV_SATFINITE,
        __NV_E4M3);
    vec.value[i].bits = static_cast<uint8_t>(pair);
    vec.value[i + 1].bits = static_cast<uint8_t>(pair >> 8);
  }
  return vec;
}

// The first `count` elements of a vector; kIsAligned: all, and the address is a multiple of as
// many.
template <bool kIsAligned, class T>
__device__ inline void store_quantized(Float8E4M3* address, const Vec<T>& vec, float scale,
                                       int64_t count) {
  if constexpr (kIsAligned) {
    *reinterpret_cast<Float8Vec<T>*>(address) = quantize(vec, scale);
  } else {
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize; ++i) {
      if (i < count) address[i] = quantize(to_float(vec.value[i]), scale);
    }
  }
}

__device__ inline float scale_of_head(const float* scales, int64_t head) {
  return scales == nullptr ? 1 : scales[head];
}

// Whether keys, values and caches may be moved in vectors of T, or in what they become.
template <class T>
bool fits_vectors(const ReshapeAndCacheParams& p) {
  const size_t cached_bytes = Vec<T>::kSize * size_of(p.cache_dtype);
  return p.head_dim % Vec<T>::kSize == 0 &&
         is_vec_aligned<T>(p.key, p.key_stride_token, p.key_stride_head) &&
         is_vec_aligned<T>(p.value, p.value_stride_token, p.value_stride_head) &&
         reinterpret_cast<uintptr_t>(p.key_cache) % cached_bytes == 0 &&
         reinterpret_cast<uintptr_t>(p.value_cache) % cached_bytes == 0 &&
         is_vec_aligned<T>(nullptr, p.key_cache_stride_block, p.key_cache_stride_token,
                           p.key_cache_stride_head, p.value_cache_stride_block,
                           p.value_cache_stride_token, p.value_cache_stride_head);
}

}  // namespace nano_vllm::cuda
