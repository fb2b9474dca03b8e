// Matrix product with weights of 4 or 8 bits in groups of 32, on a CPU. The input is rounded to 8
// bits in the same groups, so that integers multiply; groups are added up in float32.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace nano_vllm {

constexpr int32_t kGroupSize = 32;  // columns with a scale and a minimum in common
constexpr int32_t kPackedRows = 16;

// Bytes of one group of 16 rows: quants, then 16 scales and 16 minima in float16. A weight is
// scale * quant + minimum. With 8 bits, quants are [8 steps, 16 rows, 4 columns]; with 4 bits
// [4 steps, 16 rows, 4 columns], of which the low halves are columns 8 step .. + 3 of the group and
// the high halves the four columns after them.
constexpr int64_t packed_group_bytes(int32_t bits) {
  return kPackedRows * (kGroupSize * bits / 8 + 4);
}

// out[m, n] = sum_k input[m, k] * weight[n, k] (+ bias[n]). A row's result does not depend on the
// other rows. A row with an element that is not finite becomes NaN.
struct QuantizedLinearParams {
  DType dtype;            // of input, out and bias
  void* out;              // [num_rows, out_features]
  const void* input;      // [num_rows, in_features]
  const uint8_t* weight;  // [ceil(out_features / 16), in_features / 32, packed_group_bytes(bits)]
  const void* bias;       // [out_features] or nullptr

  // Strides in elements; the last dimension is contiguous.
  int64_t out_stride_row, input_stride_row;

  int32_t num_rows, in_features, out_features, bits;
};

namespace cpu {
void quantized_linear(const QuantizedLinearParams& params);
}

}  // namespace nano_vllm
