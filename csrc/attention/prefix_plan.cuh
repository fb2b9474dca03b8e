// Decodes that share a prefix: their leading tokens lie in the same blocks, which are then read
// once for all of them (cascade attention, arXiv 2501.01005).
//
// Sequences with the same leader are a group. All query rows of a group that share a KV head attend
// over the prefix together, as a prefill without a causal mask does; the result of each row goes to
// the workspace. The decode kernel then begins behind the prefix, and folds a row's result over the
// prefix with its own.
#pragma once

#include "attention/attention_kernels.cuh"
#include "attention/prefill_plan.cuh"

namespace nano_vllm::cuda {

struct alignas(16) PrefixGroup {
  int first_item;  // items of the groups before
  int leader, num_tokens;
  int first_member, num_members;
  int split_tokens, num_splits;  // the prefix is cut so that small groups fill the GPU, too
  int unused;
};

// In the workspace, made once a step by plan_prefix.cu. An item is a split of a group's prefix, a
// KV head and as many members as fill a tile of rows.
struct PrefixPlan {
  PrefixGroup* groups;  // [num_seqs]
  int32_t* num_groups;
  int32_t* num_items;
  int32_t* members;          // [num_seqs]; sequences, those of a group together
  PrefixOfSequence* of_seq;  // [num_seqs]

  PrefixPlan() = default;
  explicit PrefixPlan(const AttentionLaunch& p)
      : groups(reinterpret_cast<PrefixGroup*>(p.prefix_memory)),
        num_groups(reinterpret_cast<int32_t*>(groups + p.num_seqs)),
        num_items(num_groups + 1),
        members(num_groups + 2),
        of_seq(reinterpret_cast<PrefixOfSequence*>(members + p.num_seqs + p.num_seqs % 2)) {}

  __device__ int claim(int item) const { return item + gridDim.x; }  // all cost about the same
};

// Results of rows over a split of their prefix: the values weighted by 2^(score - max), not divided
// by the sum of the weights.
struct PrefixSlots {
  float* outs;      // [max_splits, num_seqs, num_heads, head_dim]
  float* max_sums;  // [max_splits, num_seqs, num_heads, 2]
  int num_seqs, num_heads, head_dim, max_splits;

  PrefixSlots() = default;
  explicit PrefixSlots(const AttentionLaunch& p)
      : outs(reinterpret_cast<float*>(p.prefix_memory) + prefix_plan_numel(p.num_seqs)),
        max_sums(outs + prefix_rows(p.num_seqs, p.num_heads) * p.head_dim),
        num_seqs(p.num_seqs),
        num_heads(p.num_heads),
        head_dim(p.head_dim),
        max_splits(static_cast<int>(std::min<int64_t>(
            prefix_rows(p.num_seqs, p.num_heads) / p.num_seqs / p.num_heads, kMaxPrefixSplits))) {}

  __device__ int64_t row(int split, int seq, int head) const {
    return (int64_t{split} * num_seqs + seq) * num_heads + head;
  }
  __device__ float* out(int64_t row) const { return outs + row * head_dim; }
  __device__ float2& max_sum(int64_t row) const { return reinterpret_cast<float2*>(max_sums)[row]; }
};

// What GroupDivisor says of an item's rows, for an item of members: their queries lie anywhere, and
// all see the whole split.
struct PrefixRows {
  GroupDivisor heads;
  const int32_t* members;
  const int32_t* query_start_loc;

  __device__ int position(const PrefillItem& item, int) const { return item.visible.end - 1; }
  __device__ int member(const PrefillItem& item, int row) const {
    return members[item.first_token + heads.tokens_before(item, row)];
  }
  __device__ int head(const PrefillItem& item, int row) const {
    return item.kv_head * heads.group + row - heads.tokens_before(item, row) * heads.group;
  }
  __device__ int64_t offset(const PrefillItem& item, int row, int64_t stride_token,
                            int64_t stride_head) const {
    return int64_t{query_start_loc[member(item, row)]} * stride_token +
           int64_t{head(item, row)} * stride_head;
  }
};

// Called by a whole warp.
template <class Shape>
__device__ PrefillItem find_item(const AttentionLaunch& p, const PrefixPlan& plan, int item) {
  PrefillItem found{};
  found.seq = -1;
  if (item >= *plan.num_items) return found;
  const int index =
      last_at_most(item, *plan.num_groups, [&](int i) { return plan.groups[i].first_item; });
  const PrefixGroup& group = plan.groups[index];
  const int heads = p.num_heads / p.num_kv_heads;
  const int members_per_tile = Shape::kTileRows / heads;
  const int num_tiles = ceil_div(group.num_members, members_per_tile);
  // Neighbours read the same keys and values.
  const int in_group = item - group.first_item;
  const int first_member = in_group % num_tiles * members_per_tile;
  found.seq = group.leader;
  found.kv_head = in_group / num_tiles % p.num_kv_heads;
  found.split = in_group / num_tiles / p.num_kv_heads;
  found.num_rows = min(members_per_tile, group.num_members - first_member) * heads;
  found.first_token = group.first_member + first_member;
  found.visible = {found.split * group.split_tokens,
                   min((found.split + 1) * group.split_tokens, group.num_tokens)};
  found.seq_len = found.visible.end;
  found.first_block = found.visible.begin / Shape::kTileTokens;
  found.last_block = (found.visible.end - 1) / Shape::kTileTokens;
  return found;
}

}  // namespace nano_vllm::cuda
