// Matrix product with few rows, as a decode step has them: it streams the weights once at memory
// speed. Products of more rows are torch's, but for those by gate and up and those of qkv_linear.h.
#pragma once

#include <cstdint>

#include "common/stream.h"
#include "common/types.h"

namespace nano_vllm {

// out[m, n] = sum_k input[m, k] * weight[n, k] (+ bias[n]), accumulated in float32 in an order that
// depends on the weight's shape alone (on CUDA, on the number of SMs too): a row's result does not
// change with the number of rows. Gated, out = silu(gate) * up, both such products.
struct LinearParams {
  DType dtype;         // of everything
  void* out;           // [num_rows, out_features]
  const void* input;   // [num_rows, in_features]
  const void* weight;  // [out_features, in_features]; gated, twice as many rows: gate, then up
  const void* bias;    // [out_features] or nullptr; nullptr where gated

  // Strides in elements; the last dimension is contiguous.
  int64_t out_stride_row, input_stride_row, weight_stride_row;

  int32_t num_rows, in_features, out_features;
  bool is_gated;  // on CUDA
};

constexpr int kLinearMaxRows = 32;  // torch is faster beyond, on both devices

namespace cpu {
void linear(const LinearParams& params);
}
namespace cuda {
// Whether there is a kernel for a weight of this dtype and shape on the current device.
bool can_linear(DType dtype, int64_t in_features, int64_t out_features);
// Rows and bases lie at multiples of 16 bytes. More rows than kLinearMaxRows only where gated.
void linear(const LinearParams& params, cudaStream_t stream);

// Of more rows than kLinearMaxRows; called by linear, for what can_gated_linear takes.
bool can_gated_linear(int out_features);
void gated_linear(const LinearParams& params, cudaStream_t stream);
// Whether that is faster than torch's product and the activation behind it.
bool gated_linear_pays(int num_rows, int in_features, int out_features);
}  // namespace cuda

}  // namespace nano_vllm
