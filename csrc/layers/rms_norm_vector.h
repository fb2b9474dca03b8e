// The RMSNorm of one vector, for the CPU kernels that normalise on the way.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/simd_convert.h"

namespace nano_vllm::cpu {

// The vector's elements squared and summed, after residual += input where there is a residual.
template <int kLanes, class T>
NANO_VLLM_INLINE float sum_of_squares(const T* input, T* residual, int64_t size) {
  constexpr int kSums = 4;  // independent additions in flight
  simd::Float<kLanes> sums[kSums] = {};
  for (int64_t i = 0; i < size; i += kSums * kLanes) {
    for (int j = 0; j < kSums; ++j) {
      const int64_t at = i + j * kLanes;
      if (at >= size) break;
      simd::Float<kLanes> x = simd::load_partial<kLanes>(input + at, size - at);
      if (residual != nullptr) {
        x += simd::load_partial<kLanes>(residual + at, size - at);
        simd::store_partial(residual + at, x, size - at);
        x = simd::load_partial<kLanes>(residual + at, size - at);  // as it was rounded
      }
      sums[j] += x * x;
    }
  }
  return simd::sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Of input, or of residual += input unless residual is nullptr. out may be input.
template <int kLanes, class T>
NANO_VLLM_INLINE void normalise(T* out, const T* input, T* residual, const T* weight, int64_t size,
                                float eps) {
  const float mean = sum_of_squares<kLanes>(input, residual, size) / static_cast<float>(size);
  const float inverse = 1.0f / std::sqrt(mean + eps);
  const T* source = residual != nullptr ? residual : input;
  for (int64_t i = 0; i < size; i += kLanes) {
    const simd::Float<kLanes> x = simd::load_partial<kLanes>(source + i, size - i);
    const simd::Float<kLanes> w = simd::load_partial<kLanes>(weight + i, size - i);
    simd::store_partial(out + i, x * inverse * w, size - i);
  }
}

}  // namespace nano_vllm::cpu
