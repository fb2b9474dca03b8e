// CUDA sampling: one block a row, which is read twice: for the largest logit, and for the weights.
#include <algorithm>

#include "common/cuda_common.cuh"
#include "sampling/sample_tokens.h"

namespace nano_vllm::cuda {
namespace {

constexpr int kNumThreads = 1024;
constexpr int kNumWarps = kNumThreads / kWarpSize;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

// A logit and where it stands. Of equal ones the first counts; NaN counts as infinite.
struct Best {
  float logit;
  int token;

  __device__ void see(float other, int other_token) {
    if (other > logit || (other == logit && other_token < token)) {
      logit = other;
      token = other_token;
    }
  }
  __device__ void see_warp() {
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      see(__shfl_xor_sync(~0u, logit, offset), __shfl_xor_sync(~0u, token, offset));
    }
  }
};

struct Weigher {
  float largest, inverse;  // of the temperature, times log2(e)
  double temperature, floor;

  __device__ Weigher(float largest, double temperature, double floor)
      : largest(largest),
        // Finite, as it multiplies zeros.
        inverse(fminf(static_cast<float>(1.44269504088896 / temperature), kLargest)),
        temperature(temperature),
        floor(floor) {}

  __device__ uint64_t operator()(float logit) const {
    // As exactly as the floor was found: a token that equals it must stay.
    if (floor > -kInfinity &&
        (static_cast<double>(logit) - static_cast<double>(largest)) / temperature < floor) {
      return 0;
    }
    return __float2ull_rn(exp2f((logit - largest) * inverse) * kSampleUnits);
  }
};

// Calls visit(vector, first token) for vectors begin, begin + step, ... of a row before end. The
// loads of four are under way at once.
template <bool kIsAligned, class T, class Visit>
__device__ void for_vectors(const T* row, int vocab_size, int begin, int end, int step,
                            const Visit& visit) {
  constexpr int kSize = Vec<T>::kSize, kAtOnce = 4;
  int at = begin;
  for (; at + (kAtOnce - 1) * step < end; at += kAtOnce * step) {
    Vec<T> vectors[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int first = (at + i * step) * kSize;
      vectors[i] = load_elements<kIsAligned>(row + first, vocab_size - first);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) visit(vectors[i], (at + i * step) * kSize);
  }
  for (; at < end; at += step) {
    visit(load_elements<kIsAligned>(row + at * kSize, vocab_size - at * kSize), at * kSize);
  }
}

template <class T, bool kIsAligned>
__global__ void __launch_bounds__(kNumThreads) sample_tokens_kernel(SampleTokensParams p) {
  constexpr int kSize = Vec<T>::kSize;
  __shared__ Best warp_best[kNumWarps];
  __shared__ uint64_t warp_weight[kNumWarps];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int row = blockIdx.x;
  const T* const logits = static_cast<const T*>(p.logits) + row * p.logits_stride_row;
  const int num_vectors = ceil_div(p.vocab_size, kSize);

  Best best{-kInfinity, p.vocab_size};
  for_vectors<kIsAligned>(logits, p.vocab_size, threadIdx.x, num_vectors, kNumThreads,
                          [&](const Vec<T>& vector, int first) {
#pragma unroll
                            for (int i = 0; i < kSize; ++i) {
                              if (!kIsAligned && first + i >= p.vocab_size) break;
                              const float logit = to_float(vector.value[i]);
                              best.see(isnan(logit) ? kInfinity : logit, first + i);
                            }
                          });
  best.see_warp();
  if (lane == 0) warp_best[warp] = best;
  __syncthreads();
  best = warp_best[lane];
  best.see_warp();

  const double temperature = p.temperatures[row];
  if (isinf(best.logit) || temperature == 0) {
    if (threadIdx.x == 0) p.out[row] = isinf(best.logit) ? -1 : best.token;
    return;
  }

  // Each warp weighs a piece of the row; the piece in which the target lies is weighed again.
  const Weigher weigh(best.logit, temperature, p.floors[row]);
  const auto weigh_vector = [&](const Vec<T>& vector, int first) {
    uint64_t weight = 0;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (!kIsAligned && first + i >= p.vocab_size) break;
      weight += weigh(to_float(vector.value[i]));
    }
    return weight;
  };
  const int piece = ceil_div(num_vectors, kNumWarps);
  const int begin = warp * piece, end = min(begin + piece, num_vectors);
  uint64_t weight = 0;
  for_vectors<kIsAligned>(
      logits, p.vocab_size, begin + lane, end, kWarpSize,
      [&](const Vec<T>& vector, int first) { weight += weigh_vector(vector, first); });
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    weight += __shfl_xor_sync(~0u, weight, offset);
  }
  if (lane == 0) warp_weight[warp] = weight;
  __syncthreads();

  uint64_t total = 0, before = 0;
  for (int i = 0; i < kNumWarps; ++i) {
    if (i == warp) before = total;
    total += warp_weight[i];
  }
  // Below the total even where the product is rounded up.
  const auto target =
      min(static_cast<uint64_t>(p.uniforms[row] * static_cast<double>(total)), total - 1);
  if (target < before || target - before >= warp_weight[warp]) return;
  uint64_t left = target - before;
  for (int at = begin + lane;; at += kWarpSize) {
    Vec<T> vector{};
    uint64_t own = 0;
    if (at < end) {
      vector = load_elements<kIsAligned>(logits + at * kSize, p.vocab_size - at * kSize);
      own = weigh_vector(vector, at * kSize);
    }
    uint64_t sum = own;  // of this lane and those before
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const uint64_t other = __shfl_up_sync(~0u, sum, offset);
      if (lane >= offset) sum += other;
    }
    const uint32_t reached = __ballot_sync(~0u, sum > left);
    if (reached != 0) {
      if (lane != __ffs(reached) - 1) return;
      left -= sum - own;
      for (int i = 0;; ++i) {
        const uint64_t weight_of_token = weigh(to_float(vector.value[i]));
        if (left < weight_of_token) {
          p.out[row] = at * kSize + i;
          return;
        }
        left -= weight_of_token;
      }
    }
    left -= __shfl_sync(~0u, sum, kWarpSize - 1);
  }
}

}  // namespace

void sample_tokens(const SampleTokensParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return;
  dispatch_dtype(params.dtype, [&](auto element) {
    using T = decltype(element);
    const bool is_aligned =
        is_vec_aligned<T>(params.logits, params.logits_stride_row, params.vocab_size);
    const auto kernel = is_aligned ? sample_tokens_kernel<T, true> : sample_tokens_kernel<T, false>;
    kernel<<<static_cast<unsigned>(params.num_rows), kNumThreads, 0, stream>>>(params);
    check_launch("sample_tokens");
  });
}

}  // namespace nano_vllm::cuda
