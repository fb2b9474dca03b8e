// The integer inputs of a step: where each scheduled token sits in its sequence, in the batch and
// in the KV cache.
#pragma once

#include <cstdint>

namespace nano_vllm {

// Sequence s advances from num_computed[s] by num_tokens[s] tokens; the batch holds the sequences'
// tokens one after the other. Counts are not negative and neither the tokens of the batch nor those
// of a sequence reach 2^31.
struct PrepareBatchParams {
  const int64_t* num_computed;  // [num_seqs]
  const int64_t* num_tokens;    // [num_seqs]
  const int32_t* block_tables;  // [num_seqs, max_blocks_per_seq]; covers the scheduled tokens
  int64_t block_tables_stride;  // in elements
  int64_t num_seqs, block_size;

  // Written:
  int64_t* positions;        // [sum of num_tokens]; in the sequence
  int64_t* slot_mapping;     // [sum of num_tokens]; block * block_size + row in the block
  int32_t* query_start_loc;  // [num_seqs + 1]; where a sequence's tokens begin in the batch
  int32_t* seq_lens;         // [num_seqs]; num_computed + num_tokens
};

struct BatchBounds {
  int64_t max_query_len = 0;
  int64_t max_seq_len = 0;
};

BatchBounds prepare_batch(const PrepareBatchParams& params);

}  // namespace nano_vllm
