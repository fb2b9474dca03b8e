// Gated activations: out = activation(gate) * up, for gate and up side by side in one row.
#pragma once

#include <cstdint>

#include "common/stream.h"
#include "common/types.h"

namespace nano_vllm {

enum class Activation { kSilu, kGelu, kGeluTanh };

struct ActivationParams {
  DType dtype;
  Activation activation;
  void* out;          // [num_tokens, intermediate_size]
  const void* input;  // [num_tokens, 2 * intermediate_size]: gate, then up

  // Strides in elements; the last dimension is contiguous.
  int64_t out_stride_token, input_stride_token;

  int32_t num_tokens, intermediate_size;
};

namespace cpu {
void activation_and_mul(const ActivationParams& params);
}
namespace cuda {
void activation_and_mul(const ActivationParams& params, cudaStream_t stream);
}

}  // namespace nano_vllm
