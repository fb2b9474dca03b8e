// How the decodes of a batch are shared out among thread blocks.
//
// A decode is a sequence with 1 to max_decode_queries query tokens. For each KV head, its query
// rows are cut into tiles of tile_rows; a (sequence, head, tile) is a *unit*: rows that attend over
// the sequence's tokens in their KV head. The tokens are cut into splits, at places that depend on
// the sequence alone, and the unit's result is the fold of its splits' results in their order. So
// it is the same bits however the splits are shared out.
//
// All splits of all units stand in one line, which is cut into parts: first one for each block,
// alike in cost, then smaller and smaller ones for whoever is done first. A unit that lies in one
// part is folded by its block. The splits of one that is cut go to the workspace, and the last of
// its blocks to finish folds them.
#pragma once

#include "attention/attention_kernels.cuh"

namespace nano_vllm::cuda {

constexpr int kStageTokens = 64;  // what a block takes at a time; splits are whole stages

// Rows of query and head that a decode can have in the batch.
inline int max_decode_rows(const AttentionLaunch& p) {
  return p.num_heads / p.num_kv_heads * std::min(p.max_query_len, p.max_decode_queries);
}

// Query rows of a tile: 8, or 16 if some sequence may have more.
inline int plan_tile_rows(const AttentionLaunch& p) {
  return max_decode_rows(p) <= 8 ? 8 : kMaxPlannedRows;
}

constexpr int plan_blocks_per_sm(int head_dim) { return head_dim <= 128 ? 2 : 1; }

// What the kernels have to agree on.
struct DecodeGeometry {
  int tile_rows;
  int slot_rows;     // rows of a unit that is cut, at the most
  int num_resident;  // blocks that run at the same time
  int max_parts;     // the grid: no more parts than splits, nor than slots for units that are cut

  explicit DecodeGeometry(const AttentionLaunch& p)
      : tile_rows(plan_tile_rows(p)),
        slot_rows(std::clamp(max_decode_rows(p), 1, tile_rows)),
        num_resident(
            std::min(plan_blocks_per_sm(p.head_dim) * num_multiprocessors(), kMaxPlannedBlocks)) {
    const int64_t tiles = ceil_div(std::max(max_decode_rows(p), 1), tile_rows);
    const int64_t splits = int64_t{p.num_seqs} * p.num_kv_heads * tiles * kMaxPlannedSplits;
    const int64_t slots = int64_t{kMaxPlannedBlocks} * kMaxPlannedRows / slot_rows;
    max_parts = static_cast<int>(std::min({splits, slots, int64_t{5} * num_resident / 2}));
  }
};

// The splits of a sequence's tokens.
struct DecodeSplits {
  TokenRange visible;  // to any of the sequence's query tokens
  int begin;           // the first stage's, at or before the first visible token
  int num_stages, stages_per_split, count;

  __device__ DecodeSplits(const SequenceRows& rows, int sliding_window)
      : visible(rows.visible(0, max(rows.num_rows() - 1, 0), sliding_window)),
        begin(visible.begin / kStageTokens * kStageTokens) {
    num_stages = ceil_div(max(visible.end - begin, 0), kStageTokens);
    stages_per_split = max(1, ceil_div(num_stages, kMaxPlannedSplits));
    count = ceil_div(num_stages, stages_per_split);
  }
};

// Where a part of the line begins. It ends where the next part begins.
struct alignas(16) DecodeCut {
  int seq;    // num_seqs: nothing is left
  int unit;   // of the sequence; head * number of tiles + tile
  int split;  // of the unit
  int owner;  // the part in which the unit's first split lies: names the unit's slots
  // The sequence, so that a block need not look it up before it can begin.
  int query_start, query_len, seq_len, unused;

  __device__ SequenceRows rows(const AttentionLaunch& p) const {
    return {query_start, query_len, seq_len, p.num_heads / p.num_kv_heads};
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
static_assert(DecodePlan::numel(5 * kMaxPlannedBlocks / 2) <= kPlanNumel);

// A split's result in the workspace: the values weighted by 2^(score - max), not divided by the sum
// of the weights. All values come first, [max_parts, kMaxPlannedSplits, slot_rows, head_dim].
struct SplitSlot {
  float* out;      // [slot_rows, head_dim]
  float* max_sum;  // [slot_rows, 2]

  __device__ SplitSlot(float* memory, const DecodeGeometry& geometry, int owner, int split,
                       int head_dim) {
    const int64_t slot_size = geometry.slot_rows, slot = int64_t{owner} * kMaxPlannedSplits + split;
    out = memory + slot * slot_size * head_dim;
    max_sum = memory + int64_t{geometry.max_parts} * kMaxPlannedSplits * slot_size * head_dim +
              slot * slot_size * 2;
  }
};

}  // namespace nano_vllm::cuda
