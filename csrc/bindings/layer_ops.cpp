#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "bindings/device.h"
#include "bindings/linear_params.h"
#include "bindings/ops.h"
#include "bindings/tensor_checks.h"
#include "layers/activation.h"
#include "layers/rms_norm.h"

namespace nano_vllm {
namespace {

struct RowStrides {
  int64_t row, head;
};

RowStrides row_strides(const Tensor& tensor) {
  return {tensor.stride(0), tensor.dim() == 3 ? tensor.stride(1) : 0};
}

void check_like(const char* name, const Tensor& tensor, const Tensor& input) {
  check_device(name, tensor, input);
  check_dtype(name, tensor, input.scalar_type());
  if (input.dim() == 3) {
    check_shape(name, tensor, {input.size(0), input.size(1), input.size(2)});
  } else {
    check_shape(name, tensor, {input.size(0), input.size(1)});
  }
  check_last_contiguous(name, tensor);
}

void normalise(const Tensor& out, const Tensor& input, const Tensor* residual, const Tensor& weight,
               double eps) {
  RmsNormParams params{};
  params.dtype = float_dtype("input", input);
  check(input.dim() == 2 || input.dim() == 3,
        "input must have shape [num_rows, hidden_size] or [num_rows, num_heads, hidden_size], got ",
        shape_of(input));
  check_last_contiguous("input", input);
  check_like("out", out, input);
  if (residual != nullptr) check_like("residual", *residual, input);
  const int64_t hidden_size = input.size(input.dim() - 1);
  check_tensor("weight", weight, input, input.scalar_type(), {hidden_size});
  check(hidden_size > 0, "hidden_size must be positive, got ", hidden_size);
  check(eps >= 0, "eps must be at least 0, got ", eps);

  params.out = out.mutable_data_ptr();
  params.input = input.const_data_ptr();
  params.weight = weight.const_data_ptr();
  params.out_stride_row = row_strides(out).row;
  params.out_stride_head = row_strides(out).head;
  params.input_stride_row = row_strides(input).row;
  params.input_stride_head = row_strides(input).head;
  if (residual != nullptr) {
    params.residual = residual->mutable_data_ptr();
    params.residual_stride_row = row_strides(*residual).row;
    params.residual_stride_head = row_strides(*residual).head;
  }
  params.num_rows = to_int32("num_rows", input.size(0));
  params.num_heads = input.dim() == 3 ? to_int32("num_heads", input.size(1)) : 1;
  params.hidden_size = to_int32("hidden_size", hidden_size);
  params.eps = static_cast<float>(eps);
  if (params.num_rows == 0 || params.num_heads == 0) return;
  NANO_VLLM_DISPATCH(rms_norm, input, params);
}

void activate(const Tensor& out, const Tensor& input, Activation activation) {
  ActivationParams params{};
  params.dtype = float_dtype("input", input);
  params.activation = activation;
  check_shape("input", input, {-1, -1});
  check_last_contiguous("input", input);
  check(input.size(1) % 2 == 0, "input must hold gate and up side by side, got ", input.size(1),
        " columns");
  check_tensor("out", out, input, input.scalar_type(), {input.size(0), input.size(1) / 2});
  params.out = out.mutable_data_ptr();
  params.input = input.const_data_ptr();
  params.out_stride_token = out.stride(0);
  params.input_stride_token = input.stride(0);
  params.num_tokens = to_int32("num_tokens", input.size(0));
  params.intermediate_size = to_int32("intermediate_size", input.size(1) / 2);
  if (params.num_tokens == 0 || params.intermediate_size == 0) return;
  NANO_VLLM_DISPATCH(activation_and_mul, input, params);
}

#ifdef NANO_VLLM_CUDA
void multiply_on_cuda(const LinearParams& params, const Tensor& out, const Tensor& input,
                      const Tensor& weight) {
  const CudaScope cuda_scope(input);
  check_on_cuda(params, weight);
  check(params.is_gated || params.num_rows <= kLinearMaxRows, "linear takes at most ",
        kLinearMaxRows, " rows on CUDA, got ", params.num_rows);
  check(params.num_rows <= kLinearMaxRows || cuda::can_gated_linear(params.out_features),
        "linear_silu_and_mul of ", params.num_rows,
        " rows needs an intermediate size in multiples of 32, got ", params.out_features);
  check_in_vectors("out", out);
  check_in_vectors("input", input);
  check_in_vectors("weight", weight);
  cuda::linear(params, cuda_scope.stream());
}
#endif

void multiply(const Tensor& out, const Tensor& input, const Tensor& weight,
              const std::optional<Tensor>& bias, bool is_gated) {
  LinearParams params = linear_params_of(input, weight, bias, -1);
  check(!is_gated || weight.size(0) % 2 == 0, "weight must hold gate and up, got ", weight.size(0),
        " rows");
  if (is_gated) params.out_features /= 2;
  check_tensor("out", out, input, input.scalar_type(), {input.size(0), params.out_features});
  params.out = out.mutable_data_ptr();
  params.out_stride_row = out.stride(0);
  params.is_gated = is_gated;
  if (params.num_rows == 0 || params.out_features == 0) return;
#ifdef NANO_VLLM_CUDA
  if (input.is_cuda()) return multiply_on_cuda(params, out, input, weight);
#endif
  check(input.is_cpu(), "linear: this build has no CUDA kernels; got a tensor on ",
        device_of(input), "; rebuild with NANO_VLLM_BUILD=cuda");
  cpu::linear(params);
}

}  // namespace

void rms_norm(const Tensor& out, const Tensor& input, const Tensor& weight, double eps) {
  normalise(out, input, nullptr, weight, eps);
}

void fused_add_rms_norm(const Tensor& out, const Tensor& input, const Tensor& residual,
                        const Tensor& weight, double eps) {
  normalise(out, input, &residual, weight, eps);
}

void silu_and_mul(const Tensor& out, const Tensor& input) {
  activate(out, input, Activation::kSilu);
}

void gelu_and_mul(const Tensor& out, const Tensor& input, const std::string& approximate) {
  check(approximate == "none" || approximate == "tanh", "approximate must be none or tanh, got ",
        approximate);
  activate(out, input, approximate == "tanh" ? Activation::kGeluTanh : Activation::kGelu);
}

void linear(const Tensor& out, const Tensor& input, const Tensor& weight,
            const std::optional<Tensor>& bias) {
  multiply(out, input, weight, bias, false);
}

void linear_silu_and_mul(const Tensor& out, const Tensor& input, const Tensor& weight) {
  check(input.is_cuda(), "linear_silu_and_mul runs on CUDA alone, got a tensor on ",
        device_of(input));
  multiply(out, input, weight, std::nullopt, true);
}

bool linear_silu_and_mul_pays(const Tensor& weight, int64_t num_rows) {
  check_shape("weight", weight, {-1, -1});
  const int32_t rows = to_int32("num_rows", num_rows);
#ifdef NANO_VLLM_CUDA
  if (weight.is_cuda()) {
    const CudaScope cuda_scope(weight);
    const int32_t in_features = to_int32("in_features", weight.size(1));
    const int32_t out_features = to_int32("out_features", weight.size(0) / 2);
    return cuda::can_linear(float_dtype("weight", weight), in_features, out_features) &&
           (rows <= kLinearMaxRows || cuda::gated_linear_pays(rows, in_features, out_features));
  }
#endif
  return false;
}

int64_t linear_max_rows(const Tensor& weight) {
  check_shape("weight", weight, {-1, -1});
  if (weight.is_cpu()) return kLinearMaxRows;
#ifdef NANO_VLLM_CUDA
  if (weight.is_cuda()) {
    const CudaScope cuda_scope(weight);
    const DType dtype = float_dtype("weight", weight);
    return cuda::can_linear(dtype, weight.size(1), weight.size(0)) ? kLinearMaxRows : 0;
  }
#endif
  return 0;
}

}  // namespace nano_vllm
