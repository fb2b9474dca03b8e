// The rotary embedding of one pair, for the CUDA kernels.
#pragma once

#include "common/cuda_common.cuh"

namespace nano_vllm::cuda {

// x of a pair (x, y) turned by an angle: rotate(x, y, cos, -sin), and y: rotate(y, x, cos, sin).
// Which product is fused with the sum is fixed, so that every kernel here gives the same bits.
__device__ inline float rotate(float x, float partner, float cos, float sin) {
  return __fmaf_rn(x, cos, __fmul_rn(partner, sin));
}

}  // namespace nano_vllm::cuda
