// The rotary embedding of one pair, for the CUDA kernels.
#pragma once

#include "common/cuda_common.cuh"

namespace nano_vllm::cuda {

template <int kCount>
__device__ inline void load_floats(float (&floats)[kCount], const float* address) {
  if constexpr (kCount % Vec<float>::kSize == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += Vec<float>::kSize) {
      const Vec<float> vec = load_vec(address + i);
#pragma unroll
      for (int j = 0; j < Vec<float>::kSize; ++j) floats[i + j] = vec.value[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) floats[i] = address[i];
  }
}

// x of a pair (x, y) turned by an angle: rotate(x, y, cos, -sin), and y: rotate(y, x, cos, sin).
// Which product is fused with the sum is fixed, so that every kernel here gives the same bits.
__device__ inline float rotate(float x, float partner, float cos, float sin) {
  return __fmaf_rn(x, cos, __fmul_rn(partner, sin));
}

}  // namespace nano_vllm::cuda
