#include <torch/csrc/stable/tensor.h>

#include "bindings/device.h"
#include "bindings/ops.h"
#include "bindings/tensor_checks.h"
#include "sampling/adjust_logits.h"
#include "sampling/sample_tokens.h"

namespace nano_vllm {
namespace {

int32_t vocab_size_of(const Tensor& logits) {
  check_shape("logits", logits, {-1, -1});
  check_last_contiguous("logits", logits);
  const int64_t vocab_size = logits.size(1);
  check(vocab_size > 0 && vocab_size <= kMaxVocabSize, "vocab_size must be in [1, ", kMaxVocabSize,
        "], got ", vocab_size);
  return static_cast<int32_t>(vocab_size);
}

// Vectors beside the tensor `like`, of a size each.
struct VectorsLike {
  const Tensor& like;

  const double* doubles(const char* name, const Tensor& tensor, int64_t size) const {
    return data<double>(name, tensor, ScalarType::Double, size);
  }
  const int64_t* longs(const char* name, const Tensor& tensor, int64_t size) const {
    return data<int64_t>(name, tensor, ScalarType::Long, size);
  }
  const int32_t* ints(const char* name, const Tensor& tensor, int64_t size) const {
    return data<int32_t>(name, tensor, ScalarType::Int, size);
  }
  const float* floats(const char* name, const Tensor& tensor, int64_t size) const {
    return data<float>(name, tensor, ScalarType::Float, size);
  }

 private:
  template <class T>
  const T* data(const char* name, const Tensor& tensor, ScalarType dtype, int64_t size) const {
    check_tensor(name, tensor, like, dtype, {size});
    return static_cast<const T*>(tensor.const_data_ptr());
  }
};

}  // namespace

void adjust_logits(const Tensor& out, const Tensor& logits, const Tensor& rows,
                   const Tensor& token_ids, const Tensor& slots, const Tensor& new_token_ids,
                   const Tensor& seq_lens, const Tensor& prompt_lens,
                   const Tensor& repetition_penalties, const Tensor& frequency_penalties,
                   const Tensor& presence_penalties, const Tensor& bias_starts,
                   const Tensor& bias_token_ids, const Tensor& bias_values,
                   const Tensor& allowed_starts, const Tensor& allowed_token_ids,
                   const Tensor& end_starts, const Tensor& end_token_ids, const Tensor& min_tokens,
                   const Tensor& bad_word_starts, const Tensor& bad_word_token_starts,
                   const Tensor& bad_word_token_ids) {
  AdjustLogitsParams params{};
  params.dtype = float_dtype("logits", logits);
  params.vocab_size = vocab_size_of(logits);
  const int64_t num_logits_rows = logits.size(0), num_rows = rows.size(0);
  check_tensor("out", out, logits, ScalarType::Float, {num_rows, params.vocab_size});
  check_tensor("token_ids", token_ids, logits, ScalarType::Int, {-1, -1});
  const VectorsLike vectors{logits};
  const auto lists = [&](const char* starts_name, const Tensor& starts, int64_t count,
                         const char* tokens_name, const Tensor& tokens) {
    return TokenLists{vectors.ints(starts_name, starts, count + 1),
                      vectors.ints(tokens_name, tokens, -1)};
  };
  params.out = static_cast<float*>(out.mutable_data_ptr());
  params.logits = logits.const_data_ptr();
  params.rows = vectors.ints("rows", rows, num_rows);
  params.token_ids = static_cast<int32_t*>(token_ids.mutable_data_ptr());
  params.slots = vectors.ints("slots", slots, num_rows);
  params.new_token_ids = vectors.longs("new_token_ids", new_token_ids, num_logits_rows);
  params.seq_lens = vectors.ints("seq_lens", seq_lens, num_logits_rows);
  params.prompt_lens = vectors.ints("prompt_lens", prompt_lens, num_rows);
  params.repetition_penalties =
      vectors.floats("repetition_penalties", repetition_penalties, num_rows);
  params.frequency_penalties = vectors.floats("frequency_penalties", frequency_penalties, num_rows);
  params.presence_penalties = vectors.floats("presence_penalties", presence_penalties, num_rows);
  params.bias = lists("bias_starts", bias_starts, num_rows, "bias_token_ids", bias_token_ids);
  params.bias_values = vectors.floats("bias_values", bias_values, bias_token_ids.size(0));
  params.allowed =
      lists("allowed_starts", allowed_starts, num_rows, "allowed_token_ids", allowed_token_ids);
  params.ends = lists("end_starts", end_starts, num_rows, "end_token_ids", end_token_ids);
  params.min_tokens = vectors.ints("min_tokens", min_tokens, num_rows);
  params.bad_word_starts = vectors.ints("bad_word_starts", bad_word_starts, num_rows + 1);
  check(bad_word_token_starts.dim() == 1 && bad_word_token_starts.size(0) > 0,
        "bad_word_token_starts must have at least one element, got ",
        shape_of(bad_word_token_starts));
  params.bad_words =
      lists("bad_word_token_starts", bad_word_token_starts, bad_word_token_starts.size(0) - 1,
            "bad_word_token_ids", bad_word_token_ids);
  params.logits_stride_row = logits.stride(0);
  params.out_stride_row = out.stride(0);
  params.token_ids_stride = token_ids.stride(0);
  params.num_rows = to_int32("num_rows", num_rows);
  if (params.num_rows == 0) return;
  NANO_VLLM_DISPATCH(adjust_logits, logits, params);
}

void sample_tokens(const Tensor& out, const Tensor& logits, const Tensor& temperatures,
                   const Tensor& top_k, const Tensor& top_p, const Tensor& min_p,
                   const Tensor& seeds, const Tensor& streams, const Tensor& seq_lens,
                   const Tensor& prompt_lens, const std::optional<Tensor>& adjusted,
                   const std::optional<Tensor>& adjusted_rows) {
  SampleTokensParams params{};
  params.dtype = float_dtype("logits", logits);
  params.vocab_size = vocab_size_of(logits);
  const int64_t num_rows = logits.size(0);
  check_tensor("out", out, logits, ScalarType::Long, {num_rows});
  const VectorsLike vectors{logits};
  params.out = static_cast<int64_t*>(out.mutable_data_ptr());
  params.logits = logits.const_data_ptr();
  params.temperatures = vectors.doubles("temperatures", temperatures, num_rows);
  params.top_k = vectors.ints("top_k", top_k, num_rows);
  params.top_p = vectors.doubles("top_p", top_p, num_rows);
  params.min_p = vectors.doubles("min_p", min_p, num_rows);
  params.seeds = vectors.longs("seeds", seeds, num_rows);
  params.streams = vectors.longs("streams", streams, num_rows);
  params.seq_lens = vectors.ints("seq_lens", seq_lens, num_rows);
  params.prompt_lens = vectors.ints("prompt_lens", prompt_lens, num_rows);
  check(adjusted.has_value() == adjusted_rows.has_value(),
        "adjusted and adjusted_rows come together, got one of them");
  if (adjusted.has_value()) {
    check_tensor("adjusted", *adjusted, logits, ScalarType::Float, {-1, params.vocab_size});
    params.adjusted = static_cast<const float*>(adjusted->const_data_ptr());
    params.adjusted_stride_row = adjusted->stride(0);
    params.adjusted_rows = vectors.ints("adjusted_rows", *adjusted_rows, num_rows);
  }
  params.logits_stride_row = logits.stride(0);
  params.num_rows = to_int32("num_rows", num_rows);
  if (params.num_rows == 0) return;
  NANO_VLLM_DISPATCH(sample_tokens, logits, params);
}

}  // namespace nano_vllm
