#include "cache/prepare_batch.h"

#include <algorithm>
#include <numeric>

namespace nano_vllm {

BatchBounds prepare_batch(const PrepareBatchParams& p) {
  BatchBounds bounds;
  int64_t row = 0;
  p.query_start_loc[0] = 0;
  for (int64_t s = 0; s < p.num_seqs; ++s) {
    const int32_t* block_table = p.block_tables + s * p.block_tables_stride;
    const int64_t seq_len = p.num_computed[s] + p.num_tokens[s];
    // One run of consecutive slots for each block: no division for each token.
    for (int64_t position = p.num_computed[s]; position < seq_len;) {
      const int64_t block = position / p.block_size, offset = position % p.block_size;
      const int64_t run = std::min(p.block_size - offset, seq_len - position);
      const int64_t slot = block_table[block] * p.block_size + offset;
      std::iota(p.positions + row, p.positions + row + run, position);
      std::iota(p.slot_mapping + row, p.slot_mapping + row + run, slot);
      position += run;
      row += run;
    }
    p.query_start_loc[s + 1] = static_cast<int32_t>(row);
    p.seq_lens[s] = static_cast<int32_t>(seq_len);
    bounds.max_query_len = std::max(bounds.max_query_len, p.num_tokens[s]);
    bounds.max_seq_len = std::max(bounds.max_seq_len, seq_len);
  }
  return bounds;
}

}  // namespace nano_vllm
