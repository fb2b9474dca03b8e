// How the decodes of a batch are shared out among thread blocks.
//
// A decode is a sequence with 1 to max_decode_queries query tokens. For each KV head, its query
// rows are cut into tiles of tile_rows; a (sequence, head, tile) is a *unit*: rows that attend over
// the sequence's tokens in their KV head. The tokens are cut into splits, at places that depend on
// the sequence alone, and the unit's result is the fold of its splits' results in their order. So
// it is the same bits however the splits are shared out.
//
// All splits of all units stand in one line, which is cut into parts alike in cost, one for each
// block. A unit that lies in one part is folded by its block. The splits of one that is cut go to
// the workspace, and the last of its blocks to finish folds them.
#pragma once

#include "attention/attention_kernels.cuh"

namespace nano_vllm::cuda {

constexpr int kStageTokens = 64;  // what a block takes at a time; splits are whole stages

// Rows of query and head that a decode can have in the batch.
inline int max_decode_rows(const AttentionLaunch& p) {
  return p.num_heads / p.num_kv_heads * std::min(p.max_query_len, p.max_decode_queries);
}

// Query rows of a tile: 8, or 16 if some sequence may have more; beside prefills 8 all the same.
// Those of 16 cost decodes of a few rows a quarter more, and there hardly a sequence has more.
inline int plan_tile_rows(const AttentionLaunch& p) {
  const bool is_mixed = p.max_query_len > p.max_decode_queries;
  return is_mixed || max_decode_rows(p) <= 8 ? 8 : kMaxPlannedRows;
}

constexpr int plan_blocks_per_sm(int head_dim) { return head_dim <= 128 ? 2 : 1; }

// Token numbers to block numbers, by multiplying: exact below 2^29 tokens and up to 256 a block.
struct BlockDivisor {
  int groups;  // of 8 tokens, in a block
  uint32_t reciprocal;

  explicit BlockDivisor(int block_size)
      : groups(block_size / 8), reciprocal((1u << 31) / groups + ((1u << 31) % groups != 0)) {}

  __device__ int block_of(int token) const {
    return static_cast<int>(uint64_t{reciprocal} * static_cast<uint32_t>(token / 8) >> 31);
  }
  __device__ int group_in(int block, int token) const { return token / 8 - block * groups; }
};

// What the kernels have to agree on.
struct DecodeGeometry {
  int group;  // query heads of a KV head
  int tile_rows;
  int max_splits;  // of a unit: as many as make a block for each SM out of one sequence
  int slot_rows;   // rows of a unit that is cut, at the most
  int run_tokens;  // that lie together in the cache wherever a run of them begins at a multiple
  int runs_per_stage;
  int max_parts;  // the grid: blocks that run at the same time, and no more than splits
  BlockDivisor block;

  explicit DecodeGeometry(const AttentionLaunch& p)
      : group(p.num_heads / p.num_kv_heads),
        tile_rows(plan_tile_rows(p)),
        max_splits(p.num_kv_heads >= 8 ? kMaxPlannedSplits / 2 : kMaxPlannedSplits),
        slot_rows(std::clamp(max_decode_rows(p), 1, tile_rows)),
        run_tokens(p.block_size == 0                  ? 0  // while the plan is made
                   : p.block_size % kStageTokens == 0 ? kStageTokens
                   : kStageTokens % p.block_size == 0 ? p.block_size
                                                      : kRunTokens),
        runs_per_stage(run_tokens == 0 ? 0 : kStageTokens / run_tokens),
        block(std::max(p.block_size, 8)) {
    const int64_t tiles = ceil_div(std::max(max_decode_rows(p), 1), tile_rows);
    const int64_t splits = int64_t{p.num_seqs} * p.num_kv_heads * tiles * max_splits;
    const int blocks = plan_blocks_per_sm(p.head_dim) * num_multiprocessors();
    max_parts = static_cast<int>(std::min({splits, int64_t{blocks}, int64_t{kMaxPlannedBlocks}}));
  }
};

// The rows of a sequence without what it shares with others.
__device__ inline SequenceRows decode_rows(const AttentionLaunch& p, int seq) {
  SequenceRows rows(p, seq);
  if (p.prefix_of_seq != nullptr) rows.begin = p.prefix_of_seq[seq].num_tokens;
  return rows;
}

// The splits of a sequence's tokens.
struct DecodeSplits {
  TokenRange visible;  // to any of the sequence's query tokens
  int begin;           // the first stage's, at or before the first visible token
  int num_stages, stages_per_split, count;  // a power of two of stages

  __device__ DecodeSplits(const SequenceRows& rows, int sliding_window, int max_splits) {
    const int first = rows.seq_len - rows.query_len;  // query
    visible = {sliding_window > 0 ? max(first - sliding_window + 1, rows.begin) : rows.begin,
               rows.seq_len};
    begin = visible.begin / kStageTokens * kStageTokens;
    num_stages = ceil_div(max(visible.end - begin, 0), kStageTokens);
    // At least two stages: what a split costs besides them is no more than a stage then.
    const int shift = max(kWarpSize - __clz(max(num_stages - 1, 0) / max_splits), 1);
    stages_per_split = 1 << shift;
    count = (num_stages + stages_per_split - 1) >> shift;
  }
};

// Where a part of the line begins. It ends where the next part begins.
struct alignas(16) DecodeCut {
  int seq;    // num_seqs: nothing is left
  int unit;   // of the sequence; head * number of tiles + tile
  int split;  // of the unit
  int owner;  // the part in which the unit's first split lies: names the unit's slots
  // The sequence, so that a block need not look it up before it can begin.
  int query_start, query_len, seq_len, begin;

  __device__ SequenceRows rows(int group) const {
    return {query_start, query_len, seq_len, group, begin};
  }
};

// The plan in memory.
struct DecodePlan {
  DecodeCut* cuts;  // [max_parts + 1]
  int* arrivals;    // [max_parts]; splits brought of the cut unit that begins in a part

  __host__ __device__ DecodePlan(int32_t* memory, int max_parts)
      : cuts(reinterpret_cast<DecodeCut*>(memory)),
        arrivals(memory + (max_parts + 1) * (sizeof(DecodeCut) / sizeof(int32_t))) {}

  static constexpr int64_t numel(int max_parts) {
    return (max_parts + 1) * int64_t{sizeof(DecodeCut) / sizeof(int32_t)} + max_parts;
  }
};
static_assert(DecodePlan::numel(kMaxPlannedBlocks) <= kPlanNumel);

// The results of a cut unit's splits in the workspace: the values weighted by 2^(score - max), not
// divided by the sum of the weights. All values come first, [max_parts, kMaxPlannedSplits,
// slot_rows, head_dim].
template <int kHeadDim>
struct SplitSlots {
  float* outs;      // [kMaxPlannedSplits, slot_rows, head_dim]
  float* max_sums;  // [kMaxPlannedSplits, slot_rows, 2]
  int slot_rows;

  __device__ SplitSlots(float* memory, const DecodeGeometry& geometry, int owner)
      : slot_rows(geometry.slot_rows) {
    const int64_t rows = int64_t{kMaxPlannedSplits} * slot_rows;
    outs = memory + owner * rows * kHeadDim;
    max_sums = memory + geometry.max_parts * rows * kHeadDim + owner * rows * 2;
  }

  __device__ float* out(int split, int row) const {
    return outs + (split * slot_rows + row) * kHeadDim;
  }
  __device__ float2& max_sum(int split, int row) const {
    return reinterpret_cast<float2*>(max_sums)[split * slot_rows + row];
  }
};

}  // namespace nano_vllm::cuda
