// What every CUDA kernel file needs: conversions, 128-bit vectors, warp and block reductions, dtype
// dispatch, the launch check.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/error.h"
#include "common/types.h"

namespace nano_vllm::cuda {

constexpr int kWarpSize = 32;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ inline T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// Two 16-bit elements as one register holds them.
template <class T>
__device__ inline uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 packed = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(packed);
  } else {
    const __nv_bfloat162 packed = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(packed);
  }
}

// 16 bytes of T, moved by one instruction.
template <class T>
struct alignas(16) Vec {
  static constexpr int kSize = 16 / sizeof(T);
  T value[kSize];
};

// The elements as floats, and back, a word at a time: to take 16-bit elements out of their words
// one by one, and to put them back, costs more than the conversion.
template <class T>
__device__ inline void to_floats(float (&floats)[Vec<T>::kSize], const Vec<T>& vec) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const auto& words = reinterpret_cast<const uint32_t (&)[Vec<T>::kSize / 2]>(vec);
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize / 2; ++i) {
      floats[2 * i] = __uint_as_float(words[i] << 16);
      floats[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize; ++i) floats[i] = to_float(vec.value[i]);
  }
}

template <class T>
__device__ inline Vec<T> from_floats(const float (&floats)[Vec<T>::kSize]) {
  Vec<T> vec;
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize; ++i) vec.value[i] = floats[i];
  } else {
    using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    auto& pairs = reinterpret_cast<Pair(&)[Vec<T>::kSize / 2]>(vec);
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize / 2; ++i) {
      if constexpr (std::is_same_v<T, __half>) {
        pairs[i] = __floats2half2_rn(floats[2 * i], floats[2 * i + 1]);
      } else {
        pairs[i] = __floats2bfloat162_rn(floats[2 * i], floats[2 * i + 1]);
      }
    }
  }
  return vec;
}

template <class T>
__device__ inline Vec<T> load_vec(const T* address) {
  return *reinterpret_cast<const Vec<T>*>(address);
}

template <class T>
__device__ inline void store_vec(T* address, const Vec<T>& vec) {
  *reinterpret_cast<Vec<T>*>(address) = vec;
}

// The first `count` elements at the address, the others zero. kIsAligned: the address is a multiple
// of 16 bytes and the whole vector is there.
template <bool kIsAligned, class T>
__device__ inline Vec<T> load_elements(const T* address, int64_t count) {
  if constexpr (kIsAligned) {
    return load_vec(address);
  } else {
    Vec<T> vec;
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize; ++i) {
      vec.value[i] = i < count ? address[i] : from_float<T>(0.0f);
    }
    return vec;
  }
}

template <bool kIsAligned, class T>
__device__ inline void store_elements(T* address, const Vec<T>& vec, int64_t count) {
  if constexpr (kIsAligned) {
    store_vec(address, vec);
  } else {
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize; ++i) {
      if (i < count) address[i] = vec.value[i];
    }
  }
}

// Whether vectors of T may be read at base plus any multiple of the strides, in elements.
template <class T, class... Strides>
bool is_vec_aligned(const void* base, Strides... strides) {
  return reinterpret_cast<uintptr_t>(base) % sizeof(Vec<T>) == 0 &&
         ((strides % Vec<T>::kSize == 0) && ...);
}

// The sums below add in an order that depends on the number of threads alone.
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

// The sum over a block of whole warps, given to each thread. Between two calls lies a barrier: the
// second writes what slow warps still read.
__device__ inline float block_sum(float x) {
  __shared__ float warp_sums[kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int num_warps = blockDim.x / kWarpSize;
  x = warp_sum(x);
  if (lane == 0) warp_sums[warp] = x;
  __syncthreads();
  return warp_sum(lane < num_warps ? warp_sums[lane] : 0.0f);
}

template <class Int>
__host__ __device__ constexpr Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}

// The x dimension of a grid.
inline unsigned grid_x(const char* kernel, int64_t num_blocks) {
  check(num_blocks <= std::numeric_limits<int32_t>::max(), kernel,
        ": a grid has at most 2^31 - 1 blocks, needs ", num_blocks);
  return static_cast<unsigned>(num_blocks);
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
    case DType::kFloat8E4M3:
      break;
  }
  fail("nothing is computed in ", name_of(dtype));
}

// An attribute of the current device, asked for once.
template <cudaDeviceAttr kAttribute>
int device_attribute() {
  constexpr int kMaxDevices = 64;
  static std::atomic<int> known[kMaxDevices];  // the value plus one
  int device = 0, value = 0;
  check(cudaGetDevice(&device) == cudaSuccess, "CUDA: no current device");
  if (device < kMaxDevices && known[device] != 0) return known[device] - 1;
  const cudaError_t error = cudaDeviceGetAttribute(&value, kAttribute, device);
  check(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
  if (device < kMaxDevices) known[device] = value + 1;
  return value;
}

inline int num_multiprocessors() { return device_attribute<cudaDevAttrMultiProcessorCount>(); }

// 90 for sm_90.
inline int compute_capability() {
  return 10 * device_attribute<cudaDevAttrComputeCapabilityMajor>() +
         device_attribute<cudaDevAttrComputeCapabilityMinor>();
}

// A launch that the driver refused must not pass for one that ran.
inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  check(error == cudaSuccess, kernel, ": launch failed: ", cudaGetErrorString(error));
}

}  // namespace nano_vllm::cuda
