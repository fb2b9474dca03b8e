// A token drawn from each row of logits, by a number from [0, 1) that comes with the row.
//
// A token's weight is exp((logit - largest) / temperature) in units of 2^-43, an integer. Sums of
// integers are the same in any order, so a draw does not depend on how a row is cut up: the token
// is the first one before which, and with it, more than uniform * (sum of all) has come together.
#pragma once

#include <cstdint>

#include "common/stream.h"
#include "common/types.h"

namespace nano_vllm {

constexpr float kSampleUnits = 0x1p43f;              // weight of the likeliest token
constexpr int64_t kMaxVocabSize = int64_t{1} << 20;  // the sum of so many stays below 2^64

struct SampleTokensParams {
  DType dtype;
  int64_t* out;                // [num_rows]; -1 where the largest logit is NaN or infinite
  const void* logits;          // [num_rows, vocab_size]
  const double* temperatures;  // [num_rows]; 0 takes the likeliest token, the first of equal ones
  const double* floors;        // [num_rows]; tokens whose exponent is below have no weight
  const double* uniforms;      // [num_rows], in [0, 1)

  int64_t logits_stride_row;  // in elements; the last dimension is contiguous

  int32_t num_rows, vocab_size;
};

namespace cpu {
void sample_tokens(const SampleTokensParams& params);
}
namespace cuda {
void sample_tokens(const SampleTokensParams& params, cudaStream_t stream);
}

}  // namespace nano_vllm
