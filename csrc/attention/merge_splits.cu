// Merges the splits of decode attention.
#include "attention/attention_kernels.cuh"
#include "attention/online_softmax.cuh"

namespace nano_vllm::cuda {
namespace {

constexpr int kNumThreads = 128;

// Grid: query heads of all sequences. A block merges one row, a thread a column at a time, always
// in the order of the splits; sequences with a single split have their result already.
template <class T>
__global__ void __launch_bounds__(kNumThreads)
    merge_splits_kernel(const __grid_constant__ AttentionLaunch p) {
  const int seq = blockIdx.x / p.num_heads, head = blockIdx.x % p.num_heads;
  const SequenceRows rows(p, seq);
  if (!rows.is_decode(p.max_decode_queries)) return;
  const int count = KvSplits(rows.visible(0, 0, p.sliding_window)).count;
  if (count <= 1) return;

  // Lane l weighs split l.
  const int lane = threadIdx.x % kWarpSize;
  const bool is_split = lane < count;
  const float* max_sum = PartialRow(p, seq, head, is_split ? lane : 0).max_sum;
  const float split_max = is_split ? max_sum[0] : -kInfinity;
  const float max = warp_max(split_max);
  const float weight = exp2_approx(split_max - (max == -kInfinity ? 0 : max));
  const float sum = warp_sum(is_split ? weight * max_sum[1] : 0.0f);
  __shared__ float weights[kMaxKvSplits];
  if (lane == static_cast<int>(threadIdx.x) && is_split)
    weights[lane] = sum == 0 ? 0 : weight / sum;
  __syncthreads();

  const float* partial = PartialRow(p, seq, head, 0).out;
  T* out =
      static_cast<T*>(p.out) + rows.query_start * p.out_stride_token + head * p.out_stride_head;
  for (int column = threadIdx.x; column < p.head_dim; column += kNumThreads) {
    float value = 0;
#pragma unroll
    for (int split = 0; split < kMaxKvSplits; ++split) {
      if (split < count) value += weights[split] * partial[split * p.head_dim + column];
    }
    out[column] = from_float<T>(value);
  }
}

}  // namespace

void launch_merge_splits(const AttentionLaunch& p, cudaStream_t stream) {
  if (max_kv_splits(p) <= 1) return;
  const unsigned grid = grid_x("paged_attention merge", int64_t{p.num_seqs} * p.num_heads);
  dispatch_dtype(p.dtype, [&](auto element) {
    launch_kernel("paged_attention merge", merge_splits_kernel<decltype(element)>, grid,
                  kNumThreads, 0, stream, p);
  });
}

}  // namespace nano_vllm::cuda
