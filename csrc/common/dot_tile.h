// The inner loop of the matrix products: a few rows times four rows, along their contiguous
// dimension.
#pragma once

#include <cstdint>

#include "common/simd_convert.h"

namespace nano_vllm::cpu {

// Rows of x that one tile takes. Three by four accumulators leave AVX2's 16 registers one for each
// row of x and one for w, and two multiply-adds a cycle need eight accumulators to hide their
// latency.
constexpr int kDotRows = 3;
constexpr int kDotColumns = 4;

// sums[i][j] += x[i] * w[j], kLanes products at a time.
template <int kLanes, int kRows, class T>
NANO_VLLM_INLINE void dot_step(const float* const* x, const T* const* w, int64_t k,
                               simd::Float<kLanes> (&sums)[kRows][kDotColumns]) {
  simd::Float<kLanes> x_lanes[kRows];
  for (int i = 0; i < kRows; ++i) x_lanes[i] = simd::load<kLanes>(x[i] + k);
  for (int j = 0; j < kDotColumns; ++j) {
    const simd::Float<kLanes> w_lanes = simd::load<kLanes>(w[j] + k);
    for (int i = 0; i < kRows; ++i) sums[i][j] += x_lanes[i] * w_lanes;
  }
}

// out[i] = (x[i] . w[0], ..., x[i] . w[3]) for i < kRows. Lane l of an accumulator adds the
// products k = l, l + kLanes, ... in order, then the lanes are summed: a result depends on its two
// rows alone.
template <int kLanes, int kRows, class T>
NANO_VLLM_INLINE void dot_tile(const float* const* x, const T* const* w, int64_t size,
                               simd::Float<4>* out) {
  simd::Float<kLanes> sums[kRows][kDotColumns] = {};
  int64_t k = 0;
  for (; k + kLanes <= size; k += kLanes) dot_step<kLanes, kRows>(x, w, k, sums);
  if (k < size) {
    // The rest, filled up with zeros.
    float x_rest[kRows][kLanes] = {};
    T w_rest[kDotColumns][kLanes] = {};
    const float* x_rows[kRows];
    const T* w_rows[kDotColumns];
    for (int i = 0; i < kRows; ++i) {
      std::memcpy(x_rest[i], x[i] + k, static_cast<size_t>(size - k) * sizeof(float));
      x_rows[i] = x_rest[i];
    }
    for (int j = 0; j < kDotColumns; ++j) {
      std::memcpy(w_rest[j], w[j] + k, static_cast<size_t>(size - k) * sizeof(T));
      w_rows[j] = w_rest[j];
    }
    dot_step<kLanes, kRows>(x_rows, w_rows, 0, sums);
  }
  for (int i = 0; i < kRows; ++i) {
    out[i] = simd::sum_4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
  }
}

// dot_tile for a number of rows known only at run time, 1 to kDotRows.
template <int kLanes, class T>
NANO_VLLM_INLINE void dot_tile(int rows, const float* const* x, const T* const* w, int64_t size,
                               simd::Float<4>* out) {
  static_assert(kDotRows == 3);
  if (rows == 3) return dot_tile<kLanes, 3>(x, w, size, out);
  if (rows == 2) return dot_tile<kLanes, 2>(x, w, size, out);
  return dot_tile<kLanes, 1>(x, w, size, out);
}

}  // namespace nano_vllm::cpu
