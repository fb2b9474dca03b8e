#include <torch/csrc/stable/tensor.h>

#include "bindings/device.h"
#include "bindings/ops.h"
#include "bindings/tensor_checks.h"
#include "sampling/sample_tokens.h"

namespace nano_vllm {

void sample_tokens(const Tensor& out, const Tensor& logits, const Tensor& temperatures,
                   const Tensor& floors, const Tensor& uniforms) {
  SampleTokensParams params{};
  params.dtype = float_dtype("logits", logits);
  check_shape("logits", logits, {-1, -1});
  check_last_contiguous("logits", logits);
  const int64_t num_rows = logits.size(0), vocab_size = logits.size(1);
  check(vocab_size > 0 && vocab_size <= kMaxVocabSize, "vocab_size must be in [1, ", kMaxVocabSize,
        "], got ", vocab_size);
  check_tensor("out", out, logits, ScalarType::Long, {num_rows});
  const auto doubles = [&](const char* name, const Tensor& tensor) {
    check_tensor(name, tensor, logits, ScalarType::Double, {num_rows});
    return static_cast<const double*>(tensor.const_data_ptr());
  };
  params.out = static_cast<int64_t*>(out.mutable_data_ptr());
  params.logits = logits.const_data_ptr();
  params.temperatures = doubles("temperatures", temperatures);
  params.floors = doubles("floors", floors);
  params.uniforms = doubles("uniforms", uniforms);
  params.logits_stride_row = logits.stride(0);
  params.num_rows = to_int32("num_rows", num_rows);
  params.vocab_size = static_cast<int32_t>(vocab_size);
  if (params.num_rows == 0) return;
  NANO_VLLM_DISPATCH(sample_tokens, logits, params);
}

}  // namespace nano_vllm
