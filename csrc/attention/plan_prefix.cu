// Gathers the decodes that share a prefix, see prefix_plan.cuh.
#include "attention/prefix_plan.cuh"

namespace nano_vllm::cuda {
namespace {

constexpr int kNumThreads = 1024;

struct Member {
  int leader = -1, num_tokens = 0;  // -1: none

  __device__ Member(const AttentionLaunch& p, int seq) {
    if (seq >= p.num_seqs || p.prefix_lens[seq] <= 0) return;
    if (p.query_start_loc[seq + 1] - p.query_start_loc[seq] != 1) return;
    leader = p.prefix_leaders[seq];
    num_tokens = p.prefix_lens[seq];
  }
};

struct TileShape {
  int rows, tokens;
};

// One block. Each sequence finds its place by comparing itself with all others: groups stand in the
// order of their leaders, members in their own. Then a warp cuts the groups into items.
__global__ void __launch_bounds__(kNumThreads)
    plan_prefix_kernel(const __grid_constant__ AttentionLaunch p, PrefixPlan plan, TileShape tile,
                       int max_splits, int num_blocks) {
  __shared__ int leaders[kNumThreads];
  __shared__ int num_groups;
  const int lane = threadIdx.x % kWarpSize;
  if (threadIdx.x == 0) num_groups = 0;
  for (int base = 0; base < p.num_seqs; base += kNumThreads) {
    const int seq = base + threadIdx.x;
    const Member own(p, seq);
    int before = 0, rank = 0, size = 0, groups_before = 0;
    for (int other_base = 0; other_base < p.num_seqs; other_base += kNumThreads) {
      __syncthreads();  // those before have been compared with
      leaders[threadIdx.x] = Member(p, other_base + threadIdx.x).leader;
      __syncthreads();
      const int count = min(kNumThreads, p.num_seqs - other_base);
      for (int i = 0; i < count; ++i) {
        const int other = other_base + i, leader = leaders[i];
        if (leader < 0) continue;
        before += leader < own.leader;
        groups_before += leader < own.leader && leader == other;
        size += leader == own.leader;
        rank += leader == own.leader && other < seq;
      }
    }
    if (seq >= p.num_seqs) continue;
    plan.of_seq[seq] = {own.num_tokens, own.leader < 0 ? -1 : groups_before};
    if (own.leader < 0) continue;
    plan.members[before + rank] = seq;
    if (own.leader == seq) {
      plan.groups[groups_before] = {0, seq, own.num_tokens, before, size, 0, 0, 0};
      atomicAdd(&num_groups, 1);
    }
  }
  __syncthreads();

  if (threadIdx.x < kWarpSize) {
    const int members_per_tile = tile.rows / (p.num_heads / p.num_kv_heads);
    const auto tiles_of = [&](int i) {
      return i < num_groups
                 ? ceil_div(plan.groups[i].num_members, members_per_tile) * p.num_kv_heads
                 : 0;
    };
    int num_tiles = 0;
    for (int i = lane; i < num_groups; i += kWarpSize) num_tiles += tiles_of(i);
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      num_tiles += __shfl_xor_sync(~0u, num_tiles, offset);
    }
    const int wanted = min(max(num_blocks / max(num_tiles, 1), 1), max_splits);
    int items_before = 0;
    for (int base = 0; base < num_groups; base += kWarpSize) {
      const int i = base + lane;
      int items = 0;
      if (i < num_groups) {
        PrefixGroup& group = plan.groups[i];
        const int tiles = ceil_div(group.num_tokens, tile.tokens);
        // Two tiles of tokens at least: what an item costs besides is about one.
        group.split_tokens = max(ceil_div(tiles, wanted), 2) * tile.tokens;
        group.num_splits = ceil_div(group.num_tokens, group.split_tokens);
        items = tiles_of(i) * group.num_splits;
      }
      int sum = items;
      for (int offset = 1; offset < kWarpSize; offset *= 2) {
        const int other = __shfl_up_sync(~0u, sum, offset);
        if (lane >= offset) sum += other;
      }
      if (i < num_groups) plan.groups[i].first_item = items_before + sum - items;
      items_before += __shfl_sync(~0u, sum, kWarpSize - 1);
    }
    if (lane == 0) {
      *plan.num_groups = num_groups;
      *plan.num_items = items_before;
    }
  }
  __syncthreads();
  for (int seq = threadIdx.x; seq < p.num_seqs; seq += kNumThreads) {
    const int group = plan.of_seq[seq].num_splits;
    plan.of_seq[seq].num_splits = group < 0 ? 0 : plan.groups[group].num_splits;
  }
}

}  // namespace

void launch_plan_prefix(const AttentionLaunch& p, cudaStream_t stream) {
  launch_kernel("paged_attention prefix plan", plan_prefix_kernel, 1, kNumThreads, 0, stream, p,
                PrefixPlan(p),
                TileShape{prefill_tile_rows(p.head_dim), prefill_tile_tokens(p.head_dim)},
                PrefixSlots(p).max_splits, num_multiprocessors());
}

}  // namespace nano_vllm::cuda
