// Cuts the line of all decode splits into parts, see decode_plan.cuh.
#include "attention/decode_plan.cuh"

namespace nano_vllm::cuda {
namespace {

constexpr int kNumThreads = 1024;
constexpr int kNumWarps = kNumThreads / kWarpSize;

// What a sequence costs: each unit its stages, and something for starting and ending it.
struct SequenceCost {
  int num_units, num_splits;
  int64_t unit;  // in half stages

  __device__ SequenceCost(const AttentionLaunch& p, const DecodeGeometry& geometry, int seq) {
    const SequenceRows rows = decode_rows(p, seq);
    const DecodeSplits splits(rows, p.sliding_window, geometry.max_splits);
    const bool is_decode = rows.is_decode(p.max_decode_queries) && splits.count > 0;
    num_units = is_decode ? p.num_kv_heads * ceil_div(rows.num_rows(), geometry.tile_rows) : 0;
    num_splits = splits.count;
    unit = 2 * int64_t{splits.num_stages} + 1;
  }
  __device__ int64_t all() const { return num_units * unit; }
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

// The place of a part's beginning in the sequence where it falls.
__device__ DecodeCut cut_sequence(const AttentionLaunch& p, int seq, const SequenceCost& cost,
                                  int64_t at, int64_t part_size) {
  int unit = static_cast<int>(at / cost.unit), split = 0;
  const int64_t inside = at % cost.unit;
  // A unit is cut only where that evens out the parts by much: its splits' results have to be
  // written and read again.
  if (min(inside, cost.unit - inside) * 16 <= part_size) {
    unit += 2 * inside >= cost.unit;
  } else {
    split = static_cast<int>((inside * cost.num_splits + cost.unit / 2) / cost.unit);
    if (split == cost.num_splits) {
      split = 0;
      ++unit;
    }
  }
  DecodeCut cut{};
  cut.seq = unit == cost.num_units ? seq + 1 : seq;
  cut.unit = unit == cost.num_units ? 0 : unit;
  cut.split = split;
  if (cut.seq < p.num_seqs) {
    const SequenceRows rows = decode_rows(p, cut.seq);
    cut.query_start = static_cast<int>(rows.query_start);
    cut.query_len = rows.query_len;
    cut.seq_len = rows.seq_len;
    cut.begin = rows.begin;
  }
  return cut;
}

__device__ inline bool is_not_past(const DecodeCut& a, int seq, int unit) {
  return a.seq < seq || (a.seq == seq && (a.unit < unit || (a.unit == unit && a.split == 0)));
}

// Of units that cost the same: a slightly smaller number of parts that cuts no unit, or all alike,
// so that no block has pieces of two.
__device__ int whole_parts(int64_t num_units, int max_parts) {
  if (num_units == 0) return max_parts;
  const int64_t parts = num_units < max_parts ? max_parts / num_units * num_units
                                              : num_units / ceil_div(num_units, int64_t{max_parts});
  const bool is_whole = num_units < max_parts || num_units % parts == 0;
  return is_whole && parts * 16 >= int64_t{max_parts} * 15 ? static_cast<int>(parts) : max_parts;
}

// One block. It takes kNumThreads sequences at a time: their costs are summed up, then a thread
// looks for each part's beginning among them.
__global__ void __launch_bounds__(kNumThreads)
    plan_kernel(const __grid_constant__ AttentionLaunch p, const DecodeGeometry geometry) {
  __shared__ int64_t ends[kNumThreads];  // of the sequences of a round, along the line
  const DecodePlan plan(p.plan, geometry.max_parts);
  const int rounds = ceil_div(p.num_seqs, kNumThreads);
  int64_t total = 0, num_splits = 0, num_units = 0, num_different = 0;
  for (int round = 0; round < rounds; ++round) {
    const int seq = round * kNumThreads + threadIdx.x;
    int64_t cost = 0, splits = 0, units = 0, round_total;
    if (seq < p.num_seqs) {
      const SequenceCost sequence(p, geometry, seq);
      cost = sequence.all(), units = sequence.num_units, splits = units * sequence.num_splits;
    }
    block_inclusive_sum(cost, &round_total);
    total += round_total;
    block_inclusive_sum(splits, &round_total);
    num_splits += round_total;
    block_inclusive_sum(units, &round_total);
    num_units += round_total;
  }
  for (int round = 0; round < rounds; ++round) {
    const int seq = round * kNumThreads + threadIdx.x;
    int64_t is_different = 0, round_total;
    if (seq < p.num_seqs) {
      const SequenceCost sequence(p, geometry, seq);
      is_different = sequence.num_units > 0 && sequence.unit * num_units != total;
    }
    block_inclusive_sum(is_different, &round_total);
    num_different += round_total;
  }
  // Alike in cost, and no more of them than splits.
  int num_parts = static_cast<int>(min(num_splits, int64_t{geometry.max_parts}));
  if (num_different == 0) num_parts = whole_parts(num_units, num_parts);
  const auto begin_of = [&](int part) { return total * part / num_parts; };
  for (int i = threadIdx.x; i < geometry.max_parts; i += kNumThreads) plan.arrivals[i] = 0;
  for (int i = num_parts + threadIdx.x; i <= geometry.max_parts; i += kNumThreads) {
    plan.cuts[i] = {p.num_seqs, 0, 0, i, 0, 0, 0, 0};
  }

  int64_t before = 0;
  for (int round = 0; round < rounds && num_parts > 0; ++round) {
    const int first_seq = round * kNumThreads, seq = first_seq + threadIdx.x;
    int64_t round_total;
    const int64_t cost = seq < p.num_seqs ? SequenceCost(p, geometry, seq).all() : 0;
    ends[threadIdx.x] = before + block_inclusive_sum(cost, &round_total);
    __syncthreads();
    for (int i = threadIdx.x; i < num_parts; i += kNumThreads) {
      const int64_t at = begin_of(i);
      if (at < before || at >= before + round_total) continue;
      int low = 0, high = kNumThreads - 1;  // the first sequence that ends past it
      while (low < high) {
        const int middle = (low + high) / 2;
        if (ends[middle] > at) {
          high = middle;
        } else {
          low = middle + 1;
        }
      }
      const SequenceCost found(p, geometry, first_seq + low);
      plan.cuts[i] = cut_sequence(p, first_seq + low, found, at - (ends[low] - found.all()),
                                  begin_of(i + 1) - at);
    }
    before += round_total;
    __syncthreads();
  }
  // A unit that is cut belongs to the last part that begins no later than the unit.
  for (int i = threadIdx.x; i < num_parts; i += kNumThreads) {
    const int seq = plan.cuts[i].seq, unit = plan.cuts[i].unit;
    int owner = i;
    while (owner > 0 && !is_not_past(plan.cuts[owner], seq, unit)) --owner;
    plan.cuts[i].owner = owner;
  }
}

}  // namespace

void launch_plan_decode(const AttentionLaunch& p, cudaStream_t stream) {
  launch_kernel("paged_attention plan", plan_kernel, dim3(1), kNumThreads, 0, stream, p,
                DecodeGeometry(p));
}

}  // namespace nano_vllm::cuda
