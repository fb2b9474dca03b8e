// Caches of float8_e4m3: their elements as wider ones, their scales.
#pragma once

#include "common/cuda_common.cuh"

namespace nano_vllm::cuda {

template <class Cache>
constexpr bool kIsFloat8 = std::is_same_v<Cache, Float8E4M3>;

// What multiplies the keys or values of a head, as the cache holds them.
template <class Cache>
__device__ inline float scale_of_head(const float* scales, int kv_head) {
  if constexpr (kIsFloat8<Cache>) return scales == nullptr ? 1 : scales[kv_head];
  return 1;
}

__device__ inline float to_float(Float8E4M3 x) {
  const uint32_t magnitude = x.bits & 0x7f;
  // The exponents' biases differ by 120; as a product the shift makes subnormals normal.
  const float finite = __uint_as_float(magnitude << 20) * 0x1p120f;
  const float value = magnitude == 0x7f ? __uint_as_float(0x7fc00000) : finite;
  return x.bits & 0x80 ? -value : value;
}

// Four elements, the first in the lowest byte, as two pairs of float16.
__device__ inline void widen_to_half(uint32_t (&pairs)[2], uint32_t four) {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 890
  asm("{\n"
      ".reg .b16 low, high;\n"
      "mov.b32 {low, high}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n"
      "cvt.rn.f16x2.e4m3x2 %1, high;\n"
      "}"
      : "=r"(pairs[0]), "=r"(pairs[1])
      : "r"(four));
#else
  float x[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = to_float(Float8E4M3{static_cast<uint8_t>(four >> 8 * i)});
  pairs[0] = pack<__half>(x[0], x[1]);
  pairs[1] = pack<__half>(x[2], x[3]);
#endif
}

// The same as pairs of T, 16 bits each.
template <class T>
__device__ inline void widen(uint32_t (&pairs)[2], uint32_t four) {
  widen_to_half(pairs, four);
  if constexpr (!std::is_same_v<T, __half>) {
#pragma unroll
    for (uint32_t& pair : pairs) {
      const __half2 half = reinterpret_cast<const __half2&>(pair);
      pair = pack<T>(__half2float(half.x), __half2float(half.y));
    }
  }
}

// The elements of a cache that become a Vec<T>. Aligned: at a multiple of as many bytes.
template <class T>
struct alignas(Vec<T>::kSize) Float8Chunk {
  uint32_t four[Vec<T>::kSize / 4];

  // Zeros if not valid: then nothing is read.
  __device__ static Float8Chunk load_aligned(const Float8E4M3* from, bool valid) {
    return valid ? *reinterpret_cast<const Float8Chunk*>(from) : Float8Chunk{};
  }
  __device__ static Float8Chunk load_elements(const Float8E4M3* from, bool valid) {
    Float8Chunk chunk{};
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize; ++i) {
      if (valid) chunk.four[i / 4] |= static_cast<uint32_t>(from[i].bits) << 8 * (i % 4);
    }
    return chunk;
  }

  __device__ Vec<T> widened() const {
    Vec<T> vec;
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize / 4; ++i) {
      if constexpr (std::is_same_v<T, float>) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          vec.value[4 * i + j] = to_float(Float8E4M3{static_cast<uint8_t>(four[i] >> 8 * j)});
        }
      } else {
        widen<T>(reinterpret_cast<uint32_t (&)[2]>(vec.value[4 * i]), four[i]);
      }
    }
    return vec;
  }
};

}  // namespace nano_vllm::cuda
