// CPU: threads share the rows.
#include <cmath>
#include <limits>
#include <vector>

#include "common/parallel.h"
#include "common/simd_convert.h"
#include "sampling/adjust_logits.h"

namespace nano_vllm::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Calls visit(index) for the entries of a list.
template <class Visit>
void for_list(const TokenLists& lists, int64_t list, const Visit& visit) {
  for (int32_t i = lists.starts[list]; i < lists.starts[list + 1]; ++i) visit(i);
}

void adjust_row(const AdjustLogitsParams& p, int64_t r, float* out) {
  const int32_t row = p.rows[r], seq_len = p.seq_lens[row], prompt_len = p.prompt_lens[r];
  const int32_t* said = nullptr;
  if (p.slots[r] >= 0) {
    int32_t* const tokens = p.token_ids + p.slots[r] * p.token_ids_stride;
    tokens[seq_len - 1] = static_cast<int32_t>(p.new_token_ids[row]);
    said = tokens;
  }
  float largest = -kInfinity;
  for (int64_t token = 0; token < p.vocab_size; ++token) {
    if (!(out[token] < kInfinity)) largest = kInfinity;
    if (out[token] > largest) largest = out[token];
  }
  if (std::isinf(largest)) {
    std::fill(out, out + p.vocab_size, std::numeric_limits<float>::quiet_NaN());
    return;
  }

  if (said != nullptr) {
    const float repetition = p.repetition_penalties[r];
    if (repetition != 1) {
      std::vector<bool> seen(static_cast<size_t>(p.vocab_size));
      for (int32_t i = 0; i < seq_len; ++i) {
        if (seen[said[i]]) continue;
        seen[said[i]] = true;
        float& logit = out[said[i]];
        logit = logit > 0 ? logit / repetition : logit * repetition;
      }
    }
    const float frequency = p.frequency_penalties[r], presence = p.presence_penalties[r];
    for (int32_t i = prompt_len; frequency != 0 && i < seq_len; ++i) out[said[i]] -= frequency;
    if (presence != 0) {
      std::vector<bool> seen(static_cast<size_t>(p.vocab_size));
      for (int32_t i = prompt_len; i < seq_len; ++i) {
        if (!seen[said[i]]) out[said[i]] -= presence;
        seen[said[i]] = true;
      }
    }
  }
  for_list(p.bias, r, [&](int32_t i) { out[p.bias.tokens[i]] += p.bias_values[i]; });
  if (p.allowed.starts[r] < p.allowed.starts[r + 1]) {
    std::vector<bool> is_allowed(static_cast<size_t>(p.vocab_size));
    for_list(p.allowed, r, [&](int32_t i) { is_allowed[p.allowed.tokens[i]] = true; });
    for (int64_t token = 0; token < p.vocab_size; ++token) {
      if (!is_allowed[token]) out[token] = -kInfinity;
    }
  }
  if (seq_len - prompt_len < p.min_tokens[r]) {
    for_list(p.ends, r, [&](int32_t i) { out[p.ends.tokens[i]] = -kInfinity; });
  }
  for (int32_t word = p.bad_word_starts[r]; word < p.bad_word_starts[r + 1]; ++word) {
    const int32_t first = p.bad_words.starts[word], last = p.bad_words.starts[word + 1] - 1;
    const int32_t length = last - first;
    // All of a bad word counts, not a tail whose beginning is in the prompt.
    if (length <= seq_len - prompt_len &&
        std::equal(said + seq_len - length, said + seq_len, p.bad_words.tokens + first)) {
      out[p.bad_words.tokens[last]] = -kInfinity;
    }
  }
}

template <class T>
struct AdjustRows {
  template <int kLanes>
  static NANO_VLLM_INLINE void run(const AdjustLogitsParams& p, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* const logits = static_cast<const T*>(p.logits) + p.rows[r] * p.logits_stride_row;
      float* const out = p.out + r * p.out_stride_row;
      for (int64_t i = 0; i < p.vocab_size; i += kLanes) {
        const int64_t size = p.vocab_size - i;
        simd::store_partial(out + i, simd::load_partial<kLanes>(logits + i, size), size);
      }
      adjust_row(p, r, out);
    }
  }
};

}  // namespace

void adjust_logits(const AdjustLogitsParams& params) {
  dispatch_dtype(params.dtype, [&](auto element) {
    parallel_for(params.num_rows, 1, [&](int64_t begin, int64_t end) {
      simd::run<AdjustRows<decltype(element)>>(params, begin, end);
    });
  });
}

}  // namespace nano_vllm::cpu
