// What the ops that multiply by a weight check alike.
#pragma once

#include <optional>

#include "bindings/tensor_checks.h"
#include "layers/linear.h"

namespace nano_vllm {

// All but the output. weight [of whose rows, -1 for any, in_features].
inline LinearParams linear_params_of(const Tensor& input, const Tensor& weight,
                                     const std::optional<Tensor>& bias, int64_t weight_rows) {
  LinearParams params{};
  params.dtype = float_dtype("input", input);
  const ScalarType dtype = input.scalar_type();
  check_shape("input", input, {-1, -1});
  check_last_contiguous("input", input);
  check_tensor("weight", weight, input, dtype, {weight_rows, input.size(1)});
  if (bias.has_value()) check_tensor("bias", *bias, input, dtype, {weight.size(0)});
  params.input = input.const_data_ptr();
  params.weight = weight.const_data_ptr();
  params.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  params.input_stride_row = input.stride(0);
  params.weight_stride_row = weight.stride(0);
  params.num_rows = to_int32("num_rows", input.size(0));
  params.in_features = to_int32("in_features", input.size(1));
  params.out_features = to_int32("out_features", weight.size(0));
  return params;
}

#ifdef NANO_VLLM_CUDA
inline void check_on_cuda(const LinearParams& params, const Tensor& weight) {
  check(cuda::can_linear(params.dtype, params.in_features, params.out_features),
        "linear on CUDA needs sm_90, float16 or bfloat16, and features in multiples of 8, got ",
        name_of(params.dtype), " and a weight of ", shape_of(weight));
}

// Multiples of 8 elements are multiples of 16 bytes.
inline void check_in_vectors(const char* name, const Tensor& tensor) {
  check(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0 && tensor.stride(0) % 8 == 0,
        name, " must begin at a multiple of 16 bytes and have rows that do, got a stride of ",
        tensor.stride(0));
}
#endif

}  // namespace nano_vllm
