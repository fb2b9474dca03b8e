// Root-mean-square normalisation, plain and fused with the addition of the residual stream.
#pragma once

#include <cstdint>

#include "common/stream.h"
#include "common/types.h"

namespace nano_vllm {

// With residual == nullptr: out = input / sqrt(mean(input^2) + eps) * weight.
// Otherwise residual += input first (rounded to dtype, as the sum is stored), and out =
// norm(residual). out may be input. Sums are float32. A row may be any [hidden_size] vector: one
// head of a query normalises so too.
struct RmsNormParams {
  DType dtype;
  void* out;           // [num_rows, num_heads, hidden_size]
  const void* input;   // [num_rows, num_heads, hidden_size]
  void* residual;      // [num_rows, num_heads, hidden_size] or nullptr
  const void* weight;  // [hidden_size]

  // Strides in elements; hidden_size is contiguous. Ops on [num_rows, hidden_size] have num_heads
  // = 1.
  int64_t out_stride_row, out_stride_head;
  int64_t input_stride_row, input_stride_head;
  int64_t residual_stride_row, residual_stride_head;

  int32_t num_rows, num_heads, hidden_size;
  float eps;
};

namespace cpu {
void rms_norm(const RmsNormParams& params);
}
namespace cuda {
void rms_norm(const RmsNormParams& params, cudaStream_t stream);
}

}  // namespace nano_vllm
