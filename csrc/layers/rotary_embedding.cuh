// One element of a rotary embedding.
#pragma once

#include "common/cuda_common.cuh"

namespace nano_vllm::cuda {

// x of a pair (x, y) turned by an angle; y is rotate(y, x, cos, sin), x is rotate(x, y, cos, -sin).
// Which product is fused with the sum is fixed here, so that all kernels give the same bits.
template <class T>
__device__ inline T rotate(T x, T partner, float cos, float sin) {
  return from_float<T>(__fmaf_rn(to_float(x), cos, __fmul_rn(to_float(partner), sin)));
}

}  // namespace nano_vllm::cuda
