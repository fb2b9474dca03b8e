// Cuts the line of all decode splits into parts of equal cost, see decode_plan.cuh.
#include "attention/decode_plan.cuh"

namespace nano_vllm::cuda {
namespace {

constexpr int kNumThreads = 1024;
constexpr int kNumWarps = kNumThreads / kWarpSize;

// What a sequence costs: each unit its stages, and something for starting and ending it.
struct SequenceCost {
  int num_units, num_splits;
  int64_t unit;  // in half stages

  __device__ SequenceCost(const AttentionLaunch& p, int seq, int tile_rows) {
    const SequenceRows rows(p, seq);
    const DecodeSplits splits(rows, p.sliding_window);
    const bool is_decode = rows.is_decode(p.max_decode_queries) && splits.count > 0;
    num_units = is_decode ? p.num_kv_heads * ceil_div(rows.num_rows(), tile_rows) : 0;
    num_splits = splits.count;
    unit = 2 * int64_t{splits.num_stages} + 1;
  }
  __device__ int64_t all() const { return num_units * unit; }
  __device__ int64_t splits() const { return int64_t{num_units} * num_splits; }
};

__device__ inline int64_t warp_inclusive_sum(int64_t x) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int64_t before = __shfl_up_sync(~0u, x, offset);
    if (lane >= offset) x += before;
  }
  return x;
}

// The sum of x over the threads up to this one; `total` over all.
__device__ int64_t block_inclusive_sum(int64_t x, int64_t* total) {
  __shared__ int64_t warp_sums[kNumWarps];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  x = warp_inclusive_sum(x);
  __syncthreads();  // the sums of a call before have been read
  if (lane == kWarpSize - 1) warp_sums[warp] = x;
  __syncthreads();
  const int64_t sums = warp_inclusive_sum(warp_sums[lane]);
  *total = __shfl_sync(~0u, sums, kNumWarps - 1);
  return x + (warp == 0 ? 0 : __shfl_sync(~0u, sums, max(warp - 1, 0)));
}

__device__ inline bool is_not_past(const DecodeCut& a, int seq, int unit) {
  return a.seq < seq || (a.seq == seq && (a.unit < unit || (a.unit == unit && a.split == 0)));
}

// One block. Thread i prices sequences i, i + kNumThreads, ... and, in a second pass over them,
// sets the cuts that fall into each.
__global__ void __launch_bounds__(kNumThreads)
    plan_kernel(const __grid_constant__ AttentionLaunch p, int num_blocks, int tile_rows) {
  const DecodePlan plan(p.plan, num_blocks);
  const int rounds = ceil_div(p.num_seqs, kNumThreads);
  int64_t total = 0, num_splits = 0;
  for (int round = 0; round < rounds; ++round) {
    const int seq = round * kNumThreads + threadIdx.x;
    int64_t cost = 0, splits = 0, round_total;
    if (seq < p.num_seqs) {
      const SequenceCost sequence(p, seq, tile_rows);
      cost = sequence.all(), splits = sequence.splits();
    }
    block_inclusive_sum(cost, &round_total);
    total += round_total;
    block_inclusive_sum(splits, &round_total);
    num_splits += round_total;
  }
  // Where there are few splits, the first blocks have one each: they run on different SMs.
  const int num_parts = static_cast<int>(min(num_splits, int64_t{num_blocks}));
  for (int i = threadIdx.x; i < num_blocks; i += kNumThreads) plan.arrivals[i] = 0;
  for (int i = num_parts + threadIdx.x; i <= num_blocks; i += kNumThreads) {
    plan.cuts[i] = {p.num_seqs, 0, 0, i, 0, 0, 0, 0};
  }
  if (num_parts == 0) return;

  const int64_t share = total / num_parts;
  int64_t before = 0;
  for (int round = 0; round < rounds; ++round) {
    const int seq = round * kNumThreads + threadIdx.x;
    int64_t round_total;
    const bool is_there = seq < p.num_seqs;
    const SequenceCost cost(p, is_there ? seq : 0, tile_rows);
    const int64_t all = is_there ? cost.all() : 0;
    const int64_t end = before + block_inclusive_sum(all, &round_total), begin = end - all;
    before += round_total;
    if (all == 0) continue;
    // Block i's part begins at total * i / num_blocks.
    for (int64_t i = ceil_div<int64_t>(begin * num_parts, total);
         i < num_parts && total * i / num_parts < end; ++i) {
      const int64_t at = total * i / num_parts - begin;
      int unit = static_cast<int>(at / cost.unit);
      const int64_t inside = at % cost.unit;
      int split = 0;
      // A unit is cut only where that evens out the parts by much: its splits' results have to be
      // written and read again.
      if (min(inside, cost.unit - inside) * 8 <= share) {
        unit += 2 * inside >= cost.unit;
      } else {
        split = static_cast<int>((inside * cost.num_splits + cost.unit / 2) / cost.unit);
        if (split == cost.num_splits) {
          split = 0;
          ++unit;
        }
      }
      const bool is_next = unit == cost.num_units;
      plan.cuts[i].seq = is_next ? seq + 1 : seq;
      plan.cuts[i].unit = is_next ? 0 : unit;
      plan.cuts[i].split = split;
    }
  }
  __syncthreads();
  // A unit that is cut belongs to the last block whose part begins no later than the unit.
  for (int i = threadIdx.x; i < num_parts; i += kNumThreads) {
    const DecodeCut cut = plan.cuts[i];
    int owner = i;
    while (owner > 0 && !is_not_past(plan.cuts[owner], cut.seq, cut.unit)) --owner;
    plan.cuts[i].owner = owner;
    if (cut.seq < p.num_seqs) {
      const SequenceRows rows(p, cut.seq);
      plan.cuts[i].query_start = static_cast<int>(rows.query_start);
      plan.cuts[i].query_len = rows.query_len;
      plan.cuts[i].seq_len = rows.seq_len;
    }
  }
}

}  // namespace

void launch_plan_decode(const AttentionLaunch& p, cudaStream_t stream) {
  launch_kernel("paged_attention plan", plan_kernel, dim3(1), kNumThreads, 0, stream, p,
                num_plan_blocks(p), plan_tile_rows(p));
}

}  // namespace nano_vllm::cuda
