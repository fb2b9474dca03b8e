// Matrix product with few rows, as a decode step has them, on a CPU: it streams the weights once at
// memory speed. There is no CUDA twin: on a GPU the product is cuBLAS's, through torch.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace nano_vllm {

// out[m, n] = sum_k input[m, k] * weight[n, k] (+ bias[n]), accumulated in float32 in an order that
// depends on in_features alone: a row's result does not change with the number of rows.
struct LinearParams {
  DType dtype;         // of everything
  void* out;           // [num_rows, out_features]
  const void* input;   // [num_rows, in_features]
  const void* weight;  // [out_features, in_features]
  const void* bias;    // [out_features] or nullptr

  // Strides in elements; the last dimension is contiguous.
  int64_t out_stride_row, input_stride_row, weight_stride_row;

  int32_t num_rows, in_features, out_features;
};

namespace cpu {
void linear(const LinearParams& params);
}

}  // namespace nano_vllm
