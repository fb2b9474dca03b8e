// Which sequences of a step begin with the same blocks.
#pragma once

#include <cstdint>

namespace nano_vllm {

struct SharedPrefixParams {
  const int32_t* query_start_loc;      // [num_seqs + 1]; null where each has one query token
  const int32_t* seq_lens;             // [num_seqs]
  const int32_t* const* block_tables;  // [num_seqs], each of as many blocks as it has tokens for
  int64_t num_seqs, block_size;
  int64_t min_saved_tokens;  // what must be saved for the effort to pay

  // Written, as paged_attention's shared_prefix has them:
  int32_t* leaders;  // [num_seqs]
  int32_t* lens;     // [num_seqs]
};

// Tokens that need not be read, because sequences with one query token read them together; 0, and
// nothing shared, if these are fewer than min_saved_tokens.
int64_t find_shared_prefixes(const SharedPrefixParams& params);

}  // namespace nano_vllm
