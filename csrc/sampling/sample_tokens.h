// A token drawn from each row of logits.
//
// A token's weight is exp((logit - largest) / temperature) in units of 2^-43, an integer. Sums of
// integers are the same in any order, so a draw does not depend on how a row is cut up.
//
// What top-k, top-p and min-p keep of a row are the tokens from some logit upward: those equal to
// the k-th largest and above; of these, down to the largest logit with which the weights so far
// reach top_p * (sum of their weights); and those whose exponent is at least log(min_p). So tokens
// of equal logits stay or go together.
//
// The draw: the token is the first one before which, and with it, more than number * (sum of kept
// weights) has come together, where the number is in [0, 1) and a function of the row's seed,
// stream and position alone.
#pragma once

#include <cstdint>

#include "common/stream.h"
#include "common/types.h"

namespace nano_vllm {

constexpr float kSampleUnits = 0x1p43f;              // weight of the likeliest token
constexpr int64_t kMaxVocabSize = int64_t{1} << 20;  // the sum of so many stays below 2^64

constexpr int64_t kNotFinite = -1;       // in place of a token: the largest logit is NaN or inf
constexpr int64_t kNothingAllowed = -2;  // all logits are -inf

struct SampleTokensParams {
  DType dtype;
  int64_t* out;                  // [num_rows]
  const void* logits;            // [num_rows, vocab_size]
  const float* adjusted;         // [num_adjusted, vocab_size], drawn from in place of `logits`
  const int32_t* adjusted_rows;  // [num_rows]: the row of `adjusted`, -1 for none; or nullptr

  const double* temperatures;  // [num_rows]; 0 takes the likeliest token, the first of equal ones
  const int32_t* top_k;        // [num_rows]; 0 for all
  const double* top_p;         // [num_rows]; 1 for all
  const double* min_p;         // [num_rows]: temperature * log(min_p); -inf for all
  const int64_t* seeds;        // [num_rows]
  const int64_t* streams;      // [num_rows]
  const int32_t* seq_lens;     // [num_rows]; the position is seq_len - prompt_len
  const int32_t* prompt_lens;  // [num_rows]

  int64_t logits_stride_row, adjusted_stride_row;  // in elements; the last dimension is contiguous

  int32_t num_rows, vocab_size;
};

namespace cpu {
void sample_tokens(const SampleTokensParams& params);
}
namespace cuda {
void sample_tokens(const SampleTokensParams& params, cudaStream_t stream);
}

}  // namespace nano_vllm
