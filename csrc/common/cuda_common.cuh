// What every CUDA kernel file needs: conversions, 128-bit vectors, warp and block reductions, dtype
// dispatch, the launch check.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/error.h"
#include "common/types.h"

namespace nano_vllm::cuda {

constexpr int kWarpSize = 32;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ inline T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// 16 bytes of T, moved by one instruction.
template <class T>
struct alignas(16) Vec {
  static constexpr int kSize = 16 / sizeof(T);
  T value[kSize];
};

template <class T>
__device__ inline Vec<T> load_vec(const T* address) {
  return *reinterpret_cast<const Vec<T>*>(address);
}

template <class T>
__device__ inline void store_vec(T* address, const Vec<T>& vec) {
  *reinterpret_cast<Vec<T>*>(address) = vec;
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
    x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
  return x;
}

// Calls run(T{}) with the CUDA type of dtype.
template <class Run>
void dispatch_dtype(DType dtype, Run&& run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(float{});
    case DType::kFloat16:
      return run(__half{});
    case DType::kBFloat16:
      return run(__nv_bfloat16{});
  }
}

// A launch that the driver refused must not pass for one that ran.
inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  check(error == cudaSuccess, kernel, ": launch failed: ", cudaGetErrorString(error));
}

}  // namespace nano_vllm::cuda
