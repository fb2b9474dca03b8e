#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "bindings/device.h"
#include "bindings/ops.h"
#include "bindings/tensor_checks.h"
#include "quantization/quantized_linear.h"

namespace nano_vllm {

void quantized_linear(const Tensor& out, const Tensor& input, const Tensor& weight,
                      const std::optional<Tensor>& bias) {
  QuantizedLinearParams params{};
  check(input.is_cpu(), "quantized_linear runs on the CPU alone, got a tensor on ",
        device_of(input));
  params.dtype = float_dtype("input", input);
  const ScalarType dtype = input.scalar_type();
  check_shape("input", input, {-1, -1});
  check_last_contiguous("input", input);
  const int64_t in_features = input.size(1);
  check(in_features > 0 && in_features % kGroupSize == 0,
        "input must have a multiple of 32 columns, got ", in_features);
  check_tensor("weight", weight, input, ScalarType::Byte, {-1, in_features / kGroupSize, -1});
  const int64_t group_bytes = weight.size(2);
  check(group_bytes == packed_group_bytes(4) || group_bytes == packed_group_bytes(8),
        "weight must have groups of ", packed_group_bytes(4), " or ", packed_group_bytes(8),
        " bytes, got ", group_bytes);
  params.bits = group_bytes == packed_group_bytes(4) ? 4 : 8;
  check(weight.is_contiguous(), "weight must be contiguous");
  check_tensor("out", out, input, dtype, {input.size(0), -1});
  const int64_t blocks = (out.size(1) + kPackedRows - 1) / kPackedRows;
  check(weight.size(0) == blocks, "weight must have ", blocks, " blocks of 16 rows for the ",
        out.size(1), " columns of out, got ", weight.size(0));
  if (bias.has_value()) check_tensor("bias", *bias, input, dtype, {out.size(1)});
  params.out = out.mutable_data_ptr();
  params.input = input.const_data_ptr();
  params.weight = static_cast<const uint8_t*>(weight.const_data_ptr());
  params.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  params.out_stride_row = out.stride(0);
  params.input_stride_row = input.stride(0);
  params.num_rows = to_int32("num_rows", input.size(0));
  params.in_features = to_int32("in_features", in_features);
  params.out_features = to_int32("out_features", out.size(1));
  if (params.num_rows == 0 || params.out_features == 0) return;
  cpu::quantized_linear(params);
}

}  // namespace nano_vllm
