// CUDA sampling: one block a row. A plain draw reads the row twice: for the largest logit, and for
// the weights. Top-k and top-p nearly always keep few tokens, so what they keep is searched among
// candidates: the tokens at or above what half of the threads have met at the most, some 700 of any
// row whose logits are in random order. Where these do not suffice, the row itself is searched.
#include <algorithm>

#include "common/launch.cuh"
#include "sampling/philox.h"
#include "sampling/sample_tokens.h"

namespace nano_vllm::cuda {
namespace {

constexpr int kNumThreads = 1024;
constexpr int kNumWarps = kNumThreads / kWarpSize;
constexpr int kCandidatesPerThread = 4;
constexpr int kMaxCandidates = kNumThreads * kCandidatesPerThread;
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

struct Shared {
  Best warp_best[kNumWarps];
  uint64_t warp_sums[kNumWarps];
  int num_candidates;
  float logits[kMaxCandidates];  // of the candidates, in any order
  int tokens[kMaxCandidates];
};

// The weights of tokens at or above the threshold.
struct Weigher {
  float largest, inverse;  // of the temperature, times log2(e)

  __device__ Weigher(float largest, double temperature)
      : largest(largest),
        // Finite, as it multiplies zeros.
        inverse(fminf(static_cast<float>(1.44269504088896 / temperature), kLargest)) {}

  __device__ uint64_t operator()(float logit, float threshold) const {
    return logit >= threshold ? __float2ull_rn(exp2f((logit - largest) * inverse) * kSampleUnits)
                              : 0;
  }
};

// Numbers in the order of the floats they stand for; -0 is 0.
__device__ uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return (bits & 0x80000000) != 0 ? ~bits : bits | 0x80000000;
}
__device__ float value_of(uint32_t key) {
  return __uint_as_float((key & 0x80000000) != 0 ? key ^ 0x80000000 : ~key);
}

// Bits of the key that tell nothing, in a T.
template <class T>
constexpr int kUnusedBits = std::is_same_v<T, float>    ? 0
                            : std::is_same_v<T, __half> ? 13
                                                        : 16;

__device__ uint64_t warp_sum(uint64_t x) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// The sum over the block, given to each thread.
__device__ uint64_t block_sum(uint64_t x, Shared& shared) {
  x = warp_sum(x);
  __syncthreads();  // the sums before have been read
  if (threadIdx.x % kWarpSize == 0) shared.warp_sums[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  return warp_sum(shared.warp_sums[threadIdx.x % kWarpSize]);
}

// The largest float of the kind a T holds, from `low` to `high`, for which is_enough(float) holds;
// it does so for `low`, and for all below any for which it does.
template <class T, class IsEnough>
__device__ float search(float low, float high, const IsEnough& is_enough) {
  constexpr int kShift = kUnusedBits<T>;
  uint32_t first = key_of(low) >> kShift, last = key_of(high) >> kShift;
  const auto value = [](uint32_t short_key) {
    const uint32_t key = short_key << kShift;
    return value_of((key & 0x80000000) != 0 ? key : key | ((1u << kShift) - 1));
  };
  while (first < last) {
    const uint32_t middle = first + (last - first + 1) / 2;
    if (is_enough(value(middle))) {
      first = middle;
    } else {
      last = middle - 1;
    }
  }
  return value(first);
}

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

// One row, as its block sees it.
template <class T, bool kIsAligned>
struct Row {
  static constexpr int kSize = Vec<T>::kSize;

  const T* logits;
  int vocab_size;
  Shared& shared;

  __device__ int num_vectors() const { return ceil_div(vocab_size, kSize); }

  // Calls visit(logit, token) for this thread's part of the row.
  template <class Visit>
  __device__ void for_tokens(const Visit& visit) const {
    for_vectors<kIsAligned>(logits, vocab_size, threadIdx.x, num_vectors(), kNumThreads,
                            [&](const Vec<T>& vector, int first) {
#pragma unroll
                              for (int i = 0; i < kSize; ++i) {
                                if (!kIsAligned && first + i >= vocab_size) break;
                                visit(to_float(vector.value[i]), first + i);
                              }
                            });
  }

  // The first token before which, and with it, more than number * (sum of weights) has come
  // together. Each warp weighs a piece of the row; the piece in which it lies is weighed again.
  __device__ void draw(const Weigher& weigh, float threshold, double number, int64_t* out) const {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const auto weigh_vector = [&](const Vec<T>& vector, int first) {
      uint64_t weight = 0;
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (!kIsAligned && first + i >= vocab_size) break;
        weight += weigh(to_float(vector.value[i]), threshold);
      }
      return weight;
    };
    const int piece = ceil_div(num_vectors(), kNumWarps);
    const int begin = warp * piece, end = min(begin + piece, num_vectors());
    uint64_t weight = 0;
    for_vectors<kIsAligned>(
        logits, vocab_size, begin + lane, end, kWarpSize,
        [&](const Vec<T>& vector, int first) { weight += weigh_vector(vector, first); });
    const uint64_t total = block_sum(weight, shared);
    uint64_t before = 0;
    for (int i = 0; i < warp; ++i) before += shared.warp_sums[i];
    const uint64_t target = target_of(number, total);
    if (target < before || target - before >= shared.warp_sums[warp]) return;
    uint64_t left = target - before;
    for (int at = begin + lane;; at += kWarpSize) {
      Vec<T> vector{};
      uint64_t own = 0;
      if (at < end) {
        vector = load_elements<kIsAligned>(logits + at * kSize, vocab_size - at * kSize);
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
          const uint64_t weight_of_token = weigh(to_float(vector.value[i]), threshold);
          if (left < weight_of_token) {
            *out = at * kSize + i;
            return;
          }
          left -= weight_of_token;
        }
      }
      left -= __shfl_sync(~0u, sum, kWarpSize - 1);
    }
  }

  // Below the total even where the product is rounded up.
  static __device__ uint64_t target_of(double number, uint64_t total) {
    return min(static_cast<uint64_t>(number * static_cast<double>(total)), total - 1);
  }
};

// The likeliest tokens of a row, each thread having some of them.
struct Candidates {
  Shared& shared;
  float lowest;  // all tokens from here on are candidates
  bool are_all = true;
  float logits[kCandidatesPerThread];
  uint64_t weights[kCandidatesPerThread];

  // Behind the pass that has written them to shared memory.
  __device__ Candidates(Shared& shared, float lowest, const Weigher& weigh)
      : shared(shared), lowest(lowest) {
    __syncthreads();
    are_all = shared.num_candidates <= kMaxCandidates;
#pragma unroll
    for (int i = 0; i < kCandidatesPerThread; ++i) {
      const int at = threadIdx.x + i * kNumThreads;
      const bool is_there = at < shared.num_candidates;
      logits[i] = is_there ? shared.logits[at] : -kInfinity;
      weights[i] = is_there ? weigh(logits[i], -kInfinity) : 0;
    }
  }

  __device__ int token(int i) const { return shared.tokens[threadIdx.x + i * kNumThreads]; }

  // The sum of measure(i) over all candidates at or above a threshold.
  template <class Measure>
  __device__ uint64_t sum(float threshold, const Measure& measure) const {
    uint64_t own = 0;
#pragma unroll
    for (int i = 0; i < kCandidatesPerThread; ++i) {
      if (logits[i] >= threshold) own += measure(i);
    }
    return block_sum(own, shared);
  }
  __device__ uint64_t count(float threshold) const {
    return sum(threshold, [&](int i) {
      return uint64_t{threadIdx.x + i * kNumThreads < static_cast<unsigned>(shared.num_candidates)};
    });
  }
  __device__ uint64_t weight(float threshold) const {
    return sum(threshold, [&](int i) { return weights[i]; });
  }
};

template <class T, bool kIsAligned>
__device__ void sample_row(const T* logits, const SampleTokensParams& p, Shared& shared) {
  const Row<T, kIsAligned> row{logits, p.vocab_size, shared};
  const int r = blockIdx.x, lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;

  Best best{-kInfinity, p.vocab_size};
  row.for_tokens(
      [&](float logit, int token) { best.see(isnan(logit) ? kInfinity : logit, token); });
  const float own_largest = best.logit;
  best.see_warp();
  if (lane == 0) shared.warp_best[warp] = best;
  if (threadIdx.x == 0) shared.num_candidates = 0;
  __syncthreads();
  best = shared.warp_best[lane];
  best.see_warp();

  const double temperature = p.temperatures[r];
  if (isinf(best.logit) || temperature == 0) {
    if (threadIdx.x == 0) {
      p.out[r] = best.logit == kInfinity    ? kNotFinite
                 : best.logit == -kInfinity ? kNothingAllowed
                                            : best.token;
    }
    return;
  }

  const Weigher weigh(best.logit, temperature);
  const double number =
      uniform_number(static_cast<uint64_t>(p.seeds[r]),
                     static_cast<uint64_t>(int64_t{p.seq_lens[r]} - p.prompt_lens[r]),
                     static_cast<uint64_t>(p.streams[r]));
  // The least float that is not below what min-p asks for.
  const float min_p = __double2float_ru(static_cast<double>(best.logit) + p.min_p[r]);
  const uint64_t k = p.top_k[r] > 0 && p.top_k[r] < p.vocab_size ? p.top_k[r] : 0;
  const double top_p = p.top_p[r];
  if (k == 0 && !(top_p < 1)) {
    row.draw(weigh, min_p, number, p.out + r);
    return;
  }

  // At least half of the threads have met it, or it is the least that may have a weight.
  const float lowest = max(-kLargest, search<T>(-kInfinity, best.logit, [&](float logit) {
    return __syncthreads_count(own_largest >= logit) >= kNumThreads / 2;
  }));
  uint64_t own_weight = 0;
  row.for_tokens([&](float logit, int token) {
    if (logit >= lowest) {
      const int at = atomicAdd(&shared.num_candidates, 1);
      if (at < kMaxCandidates) {
        shared.logits[at] = logit;
        shared.tokens[at] = token;
      }
    }
    if (k == 0) own_weight += weigh(logit, -kInfinity);
  });
  const Candidates candidates(shared, lowest, weigh);
  const auto weight_of_row = [&](float threshold) {
    uint64_t own = 0;
    row.for_tokens([&](float logit, int) { own += weigh(logit, threshold); });
    return block_sum(own, shared);
  };

  float kept = -kInfinity;
  if (k > 0) {
    if (candidates.are_all && candidates.count(lowest) >= k) {
      kept =
          search<T>(lowest, best.logit, [&](float logit) { return candidates.count(logit) >= k; });
    } else if (!candidates.are_all || lowest > -kLargest) {
      kept = search<T>(-kInfinity, best.logit, [&](float threshold) {
        uint64_t own = 0;
        row.for_tokens([&](float logit, int) { own += logit >= threshold; });
        return block_sum(own, shared) >= k;
      });
    }
  }
  if (top_p < 1) {
    const uint64_t total = k == 0                                 ? block_sum(own_weight, shared)
                           : candidates.are_all && kept >= lowest ? candidates.weight(kept)
                                                                  : weight_of_row(kept);
    const uint64_t enough = min(
        max(static_cast<uint64_t>(ceil(top_p * static_cast<double>(total))), uint64_t{1}), total);
    const float from = max(kept, lowest);
    if (candidates.are_all && candidates.weight(from) >= enough) {
      kept = search<T>(from, best.logit,
                       [&](float logit) { return candidates.weight(logit) >= enough; });
    } else {
      kept =
          search<T>(kept, best.logit, [&](float logit) { return weight_of_row(logit) >= enough; });
    }
  }
  kept = max(kept, min_p);
  if (!candidates.are_all || kept < lowest) {
    row.draw(weigh, kept, number, p.out + r);
    return;
  }
  // The candidates are not in the order of tokens: the token is found by bisection too.
  const uint64_t target = row.target_of(number, candidates.weight(kept));
  int first = 0, last = p.vocab_size - 1;
  while (first < last) {
    const int middle = first + (last - first) / 2;
    const uint64_t weight = candidates.sum(
        kept, [&](int i) { return candidates.token(i) <= middle ? candidates.weights[i] : 0; });
    if (weight > target) {
      last = middle;
    } else {
      first = middle + 1;
    }
  }
  if (threadIdx.x == 0) p.out[r] = first;
}

template <class T, bool kIsAligned>
__global__ void __launch_bounds__(kNumThreads) sample_tokens_kernel(SampleTokensParams p) {
  __shared__ Shared shared;
  const int row = blockIdx.x;
  const int adjusted = p.adjusted_rows == nullptr ? -1 : p.adjusted_rows[row];
  if (adjusted >= 0) {
    sample_row<float, kIsAligned>(p.adjusted + adjusted * p.adjusted_stride_row, p, shared);
  } else {
    sample_row<T, kIsAligned>(static_cast<const T*>(p.logits) + row * p.logits_stride_row, p,
                              shared);
  }
}

}  // namespace

void sample_tokens(const SampleTokensParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return;
  dispatch_dtype(params.dtype, [&](auto element) {
    using T = decltype(element);
    const bool is_aligned =
        is_vec_aligned<T>(params.logits, params.logits_stride_row, params.vocab_size) &&
        (params.adjusted_rows == nullptr ||
         is_vec_aligned<float>(params.adjusted, params.adjusted_stride_row, params.vocab_size));
    const auto kernel = is_aligned ? sample_tokens_kernel<T, true> : sample_tokens_kernel<T, false>;
    launch_kernel("sample_tokens", kernel, dim3(static_cast<unsigned>(params.num_rows)),
                  kNumThreads, 0, stream, params);
  });
}

}  // namespace nano_vllm::cuda
