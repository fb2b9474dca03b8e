// What the attention kernels ask about a sequence: its query rows, what they see, how that is
// split.
#pragma once

#include <algorithm>

#include "attention/paged_attention.h"
#include "common/cuda_common.cuh"

namespace nano_vllm::cuda {

struct TokenRange {
  int begin, end;  // positions in the sequence
};

// A sequence as one KV head sees it. Its query_len * group rows: row r is query token r / group
// with query head r % group of the group that shares the KV head.
struct SequenceRows {
  int64_t query_start;
  int query_len, seq_len, group;
  int begin = 0;  // tokens before are not looked at here: others have them too

  __device__ SequenceRows(const PagedAttentionParams& p, int seq)
      : query_start(p.query_start_loc[seq]),
        query_len(p.query_start_loc[seq + 1] - p.query_start_loc[seq]),
        seq_len(p.seq_lens[seq]),
        group(p.num_heads / p.num_kv_heads) {}

  __device__ SequenceRows(int64_t query_start, int query_len, int seq_len, int group, int begin)
      : query_start(query_start),
        query_len(query_len),
        seq_len(seq_len),
        group(group),
        begin(begin) {}

  __device__ bool is_decode(int max_queries) const {
    return query_len >= 1 && query_len <= max_queries;
  }
  __device__ int num_rows() const { return query_len * group; }
  __device__ int position(int row) const { return seq_len - query_len + row / group; }

  // Positions that any of the rows first_row .. last_row sees.
  __device__ TokenRange visible(int first_row, int last_row, int sliding_window) const {
    const int first = sliding_window > 0 ? position(first_row) - sliding_window + 1 : 0;
    return {max(first, begin), position(last_row) + 1};
  }

  // Offset of a row from the start of query or out.
  __device__ int64_t offset(int row, int kv_head, int64_t stride_token, int64_t stride_head) const {
    return (query_start + row / group) * stride_token +
           (int64_t{kv_head} * group + row % group) * stride_head;
  }
};

// The splits of a decode start at a multiple of this many tokens; shorter ones than kMinSplitTokens
// cost more in merging than they win in parallelism.
constexpr int kSplitAlignment = 16;
constexpr int kMinSplitTokens = 128;

// How the range that a decode sees is split: a function of the range alone.
struct KvSplits {
  int count, begin, end, length;

  __device__ explicit KvSplits(TokenRange visible)
      : begin(visible.begin / kSplitAlignment * kSplitAlignment), end(visible.end) {
    const int tokens = max(end - begin, 0);
    length = max(kMinSplitTokens, ceil_div(ceil_div(tokens, kMaxKvSplits), 64) * 64);
    count = ceil_div(tokens, length);
  }

  // The first token is a multiple of kSplitAlignment, visible or not.
  __device__ TokenRange tokens(int split) const {
    return {begin + split * length, min(begin + (split + 1) * length, end)};
  }
};

// The most splits that any sequence of the batch can have.
inline int max_kv_splits(const PagedAttentionParams& p) {
  int64_t tokens = p.max_seq_len;
  if (p.sliding_window > 0) {
    tokens = std::min<int64_t>(tokens, int64_t{p.sliding_window} + kSplitAlignment - 1);
  }
  const int64_t splits = ceil_div<int64_t>(tokens, kMinSplitTokens);
  return static_cast<int>(std::clamp<int64_t>(splits, 1, kMaxKvSplits));
}

// A split's share of a row, in the workspace: the values weighted by 2^(score - max), not divided
// by the sum of the weights. All outputs come first, [num_seqs, num_heads, kMaxKvSplits, head_dim].
struct PartialRow {
  float* out;      // [head_dim]
  float* max_sum;  // [2]

  __device__ PartialRow(const PagedAttentionParams& p, int seq, int head, int split) {
    const int64_t rows = int64_t{p.num_seqs} * p.num_heads * kMaxKvSplits;
    const int64_t row = (int64_t{seq} * p.num_heads + head) * kMaxKvSplits + split;
    float* const memory = p.workspace + kPlanNumel;
    out = memory + row * p.head_dim;
    max_sum = memory + rows * p.head_dim + row * 2;
  }
};

// The last index below count whose value, not falling with the index, is at most x; 0 if there is
// none. A 32-fold search by a whole warp.
template <class Value>
__device__ inline int last_at_most(int64_t x, int count, const Value& value) {
  const int lane = threadIdx.x % kWarpSize;
  int begin = 0, end = count;
  while (end - begin > 1) {
    const int step = ceil_div(end - begin, kWarpSize), probe = begin + lane * step;
    const unsigned at_most = __ballot_sync(~0u, probe < end && value(probe) <= x);
    begin += max(__popc(at_most) - 1, 0) * step;
    end = min(end, begin + step);
  }
  return begin;
}

// Row tiles of the sequences with more than one query token. They are numbered so that those of
// sequence s start at (rows of the sequences before) / tile_rows + s, which leaves gaps but needs
// no table: a block finds its tile from query_start_loc alone.
struct PrefillTile {
  int seq, first_row;  // first_row may lie outside the sequence: an empty tile

  static int64_t max_tiles(const PagedAttentionParams& p, int tile_rows) {
    return int64_t{p.num_tokens} * (p.num_heads / p.num_kv_heads) / tile_rows + p.num_seqs;
  }

  // Called by whole warps.
  __device__ PrefillTile(const PagedAttentionParams& p, int64_t tile, int tile_rows) {
    const int group = p.num_heads / p.num_kv_heads;
    const auto first_tile = [&](int s) {
      return int64_t{p.query_start_loc[s]} * group / tile_rows + s;
    };
    seq = last_at_most(tile, p.num_seqs, first_tile);
    const int64_t row = (tile - first_tile(seq)) * tile_rows;
    first_row = row < 0 || row != static_cast<int>(row) ? -1 : static_cast<int>(row);
  }
};

}  // namespace nano_vllm::cuda
