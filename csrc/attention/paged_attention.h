// Attention of variable-length queries over a paged KV cache: decode, prefill, chunked prefill and
// mixed batches.
#pragma once

#include <cstdint>

#include "common/stream.h"
#include "common/types.h"

namespace nano_vllm {

// Sequence s owns query rows [query_start_loc[s], query_start_loc[s + 1]) and seq_lens[s] cached
// tokens, its own queries included; its last query sits at position seq_lens[s] - 1. The query at
// position p attends to positions max(0, p - sliding_window + 1) .. p. Token t of a sequence lies
// in block block_tables[s][t / block_size], row t % block_size. Rows past seq_lens[s] may hold
// anything, NaN included, and never reach the result. Query rows at or past
// query_start_loc[num_seqs] are padding: their output is not written. What a cache of kFloat8E4M3
// holds counts times the scale of its head.
struct PagedAttentionParams {
  DType dtype;                     // of query and out
  DType cache_dtype;               // of both caches: dtype or kFloat8E4M3
  void* out;                       // [num_tokens, num_heads, head_dim]
  const void* query;               // [num_tokens, num_heads, head_dim]
  const void* key_cache;           // [num_blocks, block_size, num_kv_heads, head_dim]
  const void* value_cache;         // [num_blocks, block_size, num_kv_heads, head_dim]
  const float* key_scale;          // [num_kv_heads], positive; nullptr for 1
  const float* value_scale;        // [num_kv_heads], likewise
  const int32_t* block_tables;     // [num_seqs, max_blocks_per_seq]
  const int32_t* query_start_loc;  // [num_seqs + 1]
  const int32_t* seq_lens;         // [num_seqs]
  // Which decodes begin with the same blocks; nullptr for none. A sequence of one query token has
  // its first prefix_lens[s] tokens, fewer than seq_lens[s], where those of prefix_leaders[s] are,
  // which has as many and leads itself.
  const int32_t* prefix_leaders;  // [num_seqs]
  const int32_t* prefix_lens;     // [num_seqs]; 0: shares nothing
  float* workspace;  // [workspace_numel]; a plan and partial results of split sequences (CUDA only)
  int64_t workspace_numel;
  bool is_planned;  // whether plan_attention has filled the workspace for this batch

  // Strides in elements; head_dim is contiguous everywhere.
  int64_t out_stride_token, out_stride_head;
  int64_t query_stride_token, query_stride_head;
  int64_t key_stride_block, key_stride_token, key_stride_head;
  int64_t value_stride_block, value_stride_token, value_stride_head;
  int64_t block_tables_stride;

  int32_t num_seqs, num_heads, num_kv_heads, head_dim, block_size;
  int32_t num_tokens;      // rows of query and out, padding included; sizes the CUDA grid
  int32_t min_query_len;   // lower bound of the query lengths; from 9 on nothing is a decode
  int32_t max_query_len;   // upper bound of the query lengths; 1 selects decode alone
  int32_t max_seq_len;     // upper bound of seq_lens
  int32_t sliding_window;  // tokens a query sees, itself included; 0 = all
  float scale;             // multiplies query . key
  float softcap;           // scores become softcap * tanh(score / softcap); 0 = off
};

// A decode's KV range is cut into at most this many splits, at places that depend on its own length
// alone: the result does not change with the rest of the batch.
constexpr int32_t kMaxKvSplits = 16;
constexpr int32_t kMaxPlannedSplits = 32;  // where blocks share the work by a plan (sm_90)

// Persistent blocks at the most, and the query rows of each: for sm_90, with 144 SMs on a whole
// die.
constexpr int32_t kMaxPlannedBlocks = 288;
constexpr int32_t kMaxPlannedRows = 16;
constexpr int64_t kPlanNumel = 4096;

// Splits of a prefix that decodes share, and rows of results over one: for each query row, and
// where these are few for as many splits as fill the GPU.
constexpr int32_t kMaxPrefixSplits = 16;
constexpr int64_t prefix_rows(int64_t num_seqs, int64_t num_heads) {
  constexpr int64_t kTileRows = 192;
  const int64_t rows = num_seqs * num_heads, enough = kMaxPlannedBlocks / 2 * kTileRows;
  return rows > enough ? rows : enough;
}
constexpr int64_t prefix_plan_numel(int64_t num_seqs) { return (num_seqs + 1) * 12; }
constexpr int64_t prefill_plan_numel(int64_t num_seqs) { return (num_seqs + 1) * 2; }

// Floats of workspace that the decodes of a batch may need: a plan and, per split and row, one
// output row and its (max, sum) ...
constexpr int64_t decode_workspace_numel(int64_t num_seqs, int64_t num_heads, int64_t head_dim) {
  const int64_t rows = num_seqs * num_heads * kMaxKvSplits;
  const int64_t planned_rows = int64_t{kMaxPlannedBlocks} * kMaxPlannedSplits * kMaxPlannedRows;
  return kPlanNumel + (rows > planned_rows ? rows : planned_rows) * (head_dim + 2);
}
// ... with the same for what they share, and the plan of the prefills.
constexpr int64_t paged_attention_workspace_numel(int64_t num_seqs, int64_t num_heads,
                                                  int64_t head_dim) {
  return decode_workspace_numel(num_seqs, num_heads, head_dim) + prefix_plan_numel(num_seqs) +
         prefix_rows(num_seqs, num_heads) * (head_dim + 2) + prefill_plan_numel(num_seqs);
}

// Tokens behind the window of a sequence's queries that the CUDA kernels may read, as they read
// whole tiles: their blocks must be the sequence's still.
constexpr int32_t kReadBehindWindow = 128;

namespace cpu {
inline void plan_attention(const PagedAttentionParams&) {}  // threads take tasks as they come
void paged_attention(const PagedAttentionParams& params);
}  // namespace cpu
namespace cuda {
// Shares out the batch's work among thread blocks, into the workspace: once a step, for all layers
// alike. Reads query_start_loc, seq_lens and the plain numbers, not the tensors of a layer.
void plan_attention(const PagedAttentionParams& params, cudaStream_t stream);
void paged_attention(const PagedAttentionParams& params, cudaStream_t stream);
}  // namespace cuda

}  // namespace nano_vllm
