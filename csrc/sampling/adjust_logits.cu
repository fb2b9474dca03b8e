// CUDA: one block a row, whose steps follow one another. Tokens that count once are told by a bit
// each, in shared memory.
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "sampling/adjust_logits.h"

namespace nano_vllm::cuda {
namespace {

constexpr int kNumThreads = 1024;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// A set of tokens.
struct TokenBits {
  uint32_t* words;
  int num_words;

  __device__ void clear() const {
    __syncthreads();
    for (int i = threadIdx.x; i < num_words; i += kNumThreads) words[i] = 0;
    __syncthreads();
  }
  // Whether it is new.
  __device__ bool add(int token) const {
    const uint32_t bit = 1u << token % 32;
    return (atomicOr(words + token / 32, bit) & bit) == 0;
  }
  __device__ bool has(int token) const { return (words[token / 32] >> token % 32 & 1) != 0; }
};

// Calls visit(index) for this thread's share of a list.
template <class Visit>
__device__ void for_list(const TokenLists& lists, int list, const Visit& visit) {
  for (int i = lists.starts[list] + threadIdx.x; i < lists.starts[list + 1]; i += kNumThreads) {
    visit(i);
  }
}

template <class T>
__global__ void __launch_bounds__(kNumThreads) adjust_logits_kernel(AdjustLogitsParams p) {
  const TokenBits bits{reinterpret_cast<uint32_t*>(dynamic_shared()), ceil_div(p.vocab_size, 32)};
  const int r = blockIdx.x, row = p.rows[r];
  const T* const logits = static_cast<const T*>(p.logits) + row * p.logits_stride_row;
  float* const out = p.out + r * p.out_stride_row;
  const int slot = p.slots[r], seq_len = p.seq_lens[row], prompt_len = p.prompt_lens[r];
  int32_t* const said = p.token_ids + max(slot, 0) * p.token_ids_stride;
  if (slot >= 0 && threadIdx.x == 0) {
    said[seq_len - 1] = static_cast<int32_t>(p.new_token_ids[row]);
  }

  bool is_bad = false, has_any = false;
  for (int token = threadIdx.x; token < p.vocab_size; token += kNumThreads) {
    const float logit = to_float(logits[token]);
    is_bad |= !(logit < kInfinity);
    has_any |= logit > -kInfinity;
    out[token] = logit;
  }
  is_bad = __syncthreads_or(is_bad);
  if (is_bad || !__syncthreads_or(has_any)) {
    for (int token = threadIdx.x; token < p.vocab_size; token += kNumThreads) {
      out[token] = kNan;
    }
    return;
  }

  // Each step comes behind a barrier, and changes a token once or, many times, by the same number.
  if (slot >= 0) {
    const float repetition = p.repetition_penalties[r];
    if (repetition != 1) {
      bits.clear();
      for (int i = threadIdx.x; i < seq_len; i += kNumThreads) {
        const int token = said[i];
        if (!bits.add(token)) continue;
        const float logit = out[token];
        out[token] = logit > 0 ? logit / repetition : logit * repetition;
      }
      __syncthreads();
    }
    const float frequency = p.frequency_penalties[r], presence = p.presence_penalties[r];
    if (frequency != 0) {
      for (int i = prompt_len + threadIdx.x; i < seq_len; i += kNumThreads) {
        atomicAdd(out + said[i], -frequency);
      }
      __syncthreads();
    }
    if (presence != 0) {
      bits.clear();
      for (int i = prompt_len + threadIdx.x; i < seq_len; i += kNumThreads) {
        if (bits.add(said[i])) out[said[i]] -= presence;
      }
      __syncthreads();
    }
  }
  for_list(p.bias, r, [&](int i) { out[p.bias.tokens[i]] += p.bias_values[i]; });
  if (p.allowed.starts[r] < p.allowed.starts[r + 1]) {
    bits.clear();
    for_list(p.allowed, r, [&](int i) { bits.add(p.allowed.tokens[i]); });
    __syncthreads();
    for (int token = threadIdx.x; token < p.vocab_size; token += kNumThreads) {
      if (!bits.has(token)) out[token] = -kInfinity;
    }
  }
  __syncthreads();
  if (seq_len - prompt_len < p.min_tokens[r]) {
    for_list(p.ends, r, [&](int i) { out[p.ends.tokens[i]] = -kInfinity; });
  }
  for (int word = p.bad_word_starts[r] + threadIdx.x; word < p.bad_word_starts[r + 1];
       word += kNumThreads) {
    const int first = p.bad_words.starts[word], last = p.bad_words.starts[word + 1] - 1;
    const int length = last - first;
    // All of a bad word counts, not a tail whose beginning is in the prompt.
    bool is_there = length <= seq_len - prompt_len;
    for (int i = 0; is_there && i < length; ++i) {
      is_there = said[seq_len - length + i] == p.bad_words.tokens[first + i];
    }
    if (is_there) out[p.bad_words.tokens[last]] = -kInfinity;
  }
}

}  // namespace

void adjust_logits(const AdjustLogitsParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return;
  dispatch_dtype(params.dtype, [&](auto element) {
    launch_kernel("adjust_logits", adjust_logits_kernel<decltype(element)>,
                  dim3(static_cast<unsigned>(params.num_rows)), kNumThreads,
                  sizeof(uint32_t) * ceil_div(params.vocab_size, 32), stream, params);
  });
}

}  // namespace nano_vllm::cuda
