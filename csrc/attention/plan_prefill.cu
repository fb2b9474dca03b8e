// Sorts the prefills of a batch by length, see prefill_plan.cuh.
#include "attention/prefill_plan.cuh"
#include "common/hopper.cuh"

namespace nano_vllm::cuda {
namespace {

constexpr int kNumThreads = 256;

struct PrefillCost {
  int length = -1, num_items = 0;  // of a sequence that is no prefill

  __device__ PrefillCost(const AttentionLaunch& p, int seq, int tile_rows) {
    if (seq >= p.num_seqs) return;
    const SequenceRows rows(p, seq);
    if (rows.query_len <= p.max_decode_queries) return;
    length = rows.seq_len;
    num_items = ceil_div(rows.num_rows(), tile_rows) * p.num_kv_heads;
  }
};

// Grid: one block. Each sequence finds its place by comparing itself with all others; sequences of
// a length keep their order. The result goes to plan.
__global__ void __launch_bounds__(kNumThreads)
    plan_prefill_kernel(const __grid_constant__ AttentionLaunch p, PrefillPlan plan,
                        int tile_rows) {
  __shared__ int lengths[kNumThreads], num_items[kNumThreads];
  for (int base = 0; base < p.num_seqs; base += kNumThreads) {
    const int seq = base + threadIdx.x;
    const PrefillCost own(p, seq, tile_rows);
    int place = 0, first_item = 0;
    for (int other_base = 0; other_base < p.num_seqs; other_base += kNumThreads) {
      const PrefillCost other(p, other_base + threadIdx.x, tile_rows);
      __syncthreads();  // those before have been compared with
      lengths[threadIdx.x] = other.length;
      num_items[threadIdx.x] = other.num_items;
      __syncthreads();
      const int count = min(kNumThreads, p.num_seqs - other_base);
      for (int i = 0; i < count; ++i) {
        const int length = lengths[i];
        if (length > own.length || (length == own.length && other_base + i < seq)) {
          ++place;
          first_item += num_items[i];
        }
      }
    }
    if (seq >= p.num_seqs) continue;
    plan.seqs[place] = seq;
    plan.first_item[place] = first_item;
    if (place == p.num_seqs - 1) plan.first_item[p.num_seqs] = first_item + own.num_items;
  }
  if (threadIdx.x == 0) *plan.num_claimed = 0;
}

}  // namespace

void launch_plan_prefill(const AttentionLaunch& p, cudaStream_t stream) {
  launch_kernel("paged_attention prefill plan", plan_prefill_kernel, 1, kNumThreads, 0, stream, p,
                PrefillPlan(p), prefill_tile_rows(p.head_dim));
}

}  // namespace nano_vllm::cuda
