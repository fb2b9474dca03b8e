// The steps of an RMSNorm on vectors in registers, for the kernels that normalise on the way.
#pragma once

#include "common/cuda_common.cuh"

namespace nano_vllm::cuda {

// sum plus the vector's elements squared, one after the other.
template <class T>
__device__ inline float add_squares(float sum, const Vec<T>& vec) {
  float x[Vec<T>::kSize];
  to_floats(x, vec);
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; ++i) sum += x[i] * x[i];
  return sum;
}

// What a row of that many elements is multiplied with.
__device__ inline float inverse_rms(float sum_of_squares, int size, float eps) {
  return rsqrtf(sum_of_squares / static_cast<float>(size) + eps);
}

template <class T>
__device__ inline Vec<T> normalise(const Vec<T>& vec, float inverse, const Vec<T>& weight) {
  float x[Vec<T>::kSize], weights[Vec<T>::kSize];
  to_floats(x, vec);
  to_floats(weights, weight);
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; ++i) x[i] = x[i] * inverse * weights[i];
  return from_floats<T>(x);
}

}  // namespace nano_vllm::cuda
