// The order in which persistent blocks work on the prefills of a batch.
//
// An item is a tile of rows for one KV head. Sequences are taken from the longest to the shortest:
// long ones last would keep few multiprocessors busy at the end. Within a sequence come sections of
// heads whose keys and values stay in the L2 cache together; in them tiles from the last, which
// sees most, to the first; in them heads. The order decides who computes a row and when, not how.
#pragma once

#include "attention/attention_kernels.cuh"

namespace nano_vllm::cuda {

// In the workspace, made once a step by plan_prefill.cu.
struct PrefillPlan {
  int32_t num_seqs;
  int32_t* num_claimed;  // items beyond the blocks' first ones that a block has taken
  int32_t* seqs;         // [num_seqs], from the longest prefill to the shortest, then the others
  int32_t* first_item;   // [num_seqs + 1], items before those of seqs[i]

  explicit PrefillPlan(const AttentionLaunch& p)
      : num_seqs(p.num_seqs),
        num_claimed(p.prefill_memory),
        seqs(num_claimed + 1),
        first_item(seqs + p.num_seqs) {}

  // The item after `item` of this block; by one lane of it. Each block that has had an item claims
  // one in vain at its end, so there are as many claims as items; the last leaves none for the next
  // layer.
  __device__ int claim(int) const {
    const int claimed = atomicAdd(num_claimed, 1);
    if (claimed + 1 == first_item[num_seqs]) *num_claimed = 0;
    return gridDim.x + claimed;
  }
};

struct PrefillItem {
  int seq, kv_head;  // seq -1: there is no more work
  int64_t query_start;
  int num_rows;                 // of the sequence, from the tile's first on
  int first_token, first_head;  // of the tile's first row, in the query and in the group
  int first_position;           // of first_token, in the sequence
  int split;                    // of a prefix that decodes share, see prefix_plan.cuh
  int seq_len;
  TokenRange visible;           // to any of the rows
  int first_block, last_block;  // the tiles of tokens that hold them
};

// Bytes of keys and values that share the L2 cache with queries and outputs.
constexpr int kCachedBytes = 32 << 20;

// Called by a whole warp. Shape names the head_dim, the caches' elements and the tiles' kTileRows
// and kTileTokens.
template <class Shape>
__device__ PrefillItem find_item(const AttentionLaunch& p, const PrefillPlan& plan, int item) {
  const int place = last_at_most(item, p.num_seqs, [&](int i) { return plan.first_item[i]; });
  PrefillItem found{};
  found.seq = -1;
  if (item >= plan.first_item[p.num_seqs]) return found;

  found.seq = plan.seqs[place];
  const SequenceRows rows(p, found.seq);
  const int num_tiles = ceil_div(rows.num_rows(), Shape::kTileRows);
  constexpr int kTokenBytes = 2 * Shape::kHeadDim * static_cast<int>(sizeof(typename Shape::Cache));
  const int cached_heads = kCachedBytes / kTokenBytes / max(rows.seq_len, 1);
  const int section_heads = min(max(cached_heads, 1), p.num_kv_heads);
  const int in_seq = item - plan.first_item[place];
  const int first_head = in_seq / (num_tiles * section_heads) * section_heads;
  const int in_section = in_seq - first_head * num_tiles;
  const int num_heads = min(section_heads, p.num_kv_heads - first_head);
  found.kv_head = first_head + in_section % num_heads;

  const int first_row = (num_tiles - 1 - in_section / num_heads) * Shape::kTileRows;
  found.query_start = rows.query_start;
  found.num_rows = rows.num_rows() - first_row;
  found.first_token = first_row / rows.group;
  found.first_head = first_row % rows.group;
  found.first_position = rows.position(first_row);
  found.seq_len = rows.seq_len;
  found.visible = rows.visible(first_row, min(first_row + Shape::kTileRows, rows.num_rows()) - 1,
                               p.sliding_window);
  found.first_block = found.visible.begin / Shape::kTileTokens;
  found.last_block = max(found.first_block, (found.visible.end - 1) / Shape::kTileTokens);
  return found;
}

// What SequenceRows says of a row, for row numbers from an item's first on: few enough to divide by
// multiplying.
struct GroupDivisor {
  static constexpr int kBits = 20;
  static constexpr int kMaxGroup = 512;  // up to it the quotients are exact
  int group, reciprocal;

  explicit GroupDivisor(int group) : group(group), reciprocal((1 << kBits) / group + 1) {}

  __device__ int tokens_before(const PrefillItem& item, int row) const {
    return (item.first_head + row) * reciprocal >> kBits;
  }
  __device__ int position(const PrefillItem& item, int row) const {
    return item.first_position + tokens_before(item, row);
  }
  __device__ int64_t offset(const PrefillItem& item, int row, int64_t stride_token,
                            int64_t stride_head) const {
    const int tokens = tokens_before(item, row);
    const int head = item.first_head + row - tokens * group;
    return (item.query_start + item.first_token + tokens) * stride_token +
           (int64_t{item.kv_head} * group + head) * stride_head;
  }
};

}  // namespace nano_vllm::cuda
