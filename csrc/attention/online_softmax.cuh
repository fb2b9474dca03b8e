// The online softmax of FlashAttention (arXiv 2205.14135) on the accumulators of matrix products,
// in powers of two.
#pragma once

#include "attention/sequence_rows.cuh"
#include "common/ptx.cuh"

namespace nano_vllm::cuda {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896341f;

// Products of queries and keys to the exponents of two that weigh the values.
struct ScoreTransform {
  float scale, softcap;  // softcap in powers of two; 0 = off

  __device__ explicit ScoreTransform(const PagedAttentionParams& p, float key_scale = 1)
      : scale((p.softcap > 0 ? p.scale / p.softcap : p.scale * kLog2E) * key_scale),
        softcap(p.softcap * kLog2E) {}

  template <int kCount>
  __device__ void apply(float (&scores)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) scores[i] *= scale;
    if (softcap > 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        // tanh(x); tanh.approx would be off by 2^-11, times the cap, in the exponent.
        const float power = exp2_approx(2 * kLog2E * scores[i]);
        scores[i] = softcap * (1 - __fdividef(2, power + 1));
      }
    }
  }
};

// Of the two rows that a lane has a share of in an accumulator, lane / 4 and lane / 4 + 8.
struct RowStates {
  float max[2] = {-kInfinity, -kInfinity};
  float sum[2] = {0, 0};  // of this lane's columns alone, until finish()

  // Turns the scores of further columns into weights. What was weighted before is to be multiplied
  // by rescale. Rows that saw no column yet have a maximum of -infinity and weights of 0.
  template <int kColumnTiles>
  __device__ void update(float (&scores)[kColumnTiles][4], float (&rescale)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float new_max = max[half];
#pragma unroll
      for (int i = 0; i < kColumnTiles; ++i) {
        new_max = fmaxf(new_max, fmaxf(scores[i][2 * half], scores[i][2 * half + 1]));
      }
      new_max = fmaxf(new_max, __shfl_xor_sync(~0u, new_max, 1));
      new_max = fmaxf(new_max, __shfl_xor_sync(~0u, new_max, 2));
      const float shift = new_max == -kInfinity ? 0 : new_max;
      rescale[half] = exp2_approx(max[half] - shift);
      max[half] = new_max;
      float new_sum = 0;
#pragma unroll
      for (int i = 0; i < kColumnTiles; ++i) {
#pragma unroll
        for (int j = 2 * half; j < 2 * half + 2; ++j) {
          scores[i][j] = exp2_approx(scores[i][j] - shift);
          new_sum += scores[i][j];
        }
      }
      sum[half] = sum[half] * rescale[half] + new_sum;
    }
  }

  // Adds up the lanes' sums.
  __device__ void finish() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
      sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
    }
  }
};

// The same with a maximum that follows the scores only once they exceed it by kSlack: weights grow
// to 2^kSlack, which float and the 16-bit types hold as exactly as 1, and outputs are rarely
// rescaled. In steps, so that other work comes between them; kHalf is 0 for the lane's first row, 1
// for its second.
struct LazyRowStates {
  static constexpr float kSlack = 8;
  float max[2] = {-kInfinity, -kInfinity};
  float sum[2] = {0, 0};  // of this lane's columns alone

  // Takes a row's scores times scale, as exponents of two, into its maximum. What was weighted
  // before is to be multiplied by the result.
  template <int kHalf, int kColumnTiles>
  __device__ float see(const float (&scores)[kColumnTiles][4], float scale) {
    float chains[2] = {-kInfinity,
                       -kInfinity};  // an instruction waits for the one before in its own
#pragma unroll
    for (int i = 0; i < kColumnTiles; ++i) {
      chains[i % 2] = fmaxf(chains[i % 2], fmaxf(scores[i][2 * kHalf], scores[i][2 * kHalf + 1]));
    }
    float new_max = fmaxf(chains[0], chains[1]);
    new_max = fmaxf(new_max, __shfl_xor_sync(~0u, new_max, 1));
    new_max = scale * fmaxf(new_max, __shfl_xor_sync(~0u, new_max, 2));
    float rescale = 1;
    if (new_max - max[kHalf] > kSlack) {
      rescale = exp2_approx(max[kHalf] - new_max);
      max[kHalf] = new_max;
    }
    sum[kHalf] *= rescale;
    return rescale;
  }

  // Turns a row's scores in column tiles kFirst .. kLast - 1 into weights.
  template <int kHalf, int kFirst, int kLast, int kColumnTiles>
  __device__ void weigh(float (&scores)[kColumnTiles][4], float scale) {
    const float shift = max[kHalf] == -kInfinity ? 0 : max[kHalf];
#pragma unroll
    for (int i = kFirst; i < kLast; ++i) {
#pragma unroll
      for (int j = 2 * kHalf; j < 2 * kHalf + 2; ++j) {
        scores[i][j] = exp2_approx(fmaf(scores[i][j], scale, -shift));
        sum[kHalf] += scores[i][j];
      }
    }
  }
};

// Whether the warp's accumulators can stay: the usual factor, once the maximum is found, is 1.
__device__ inline bool is_settled(const float (&rescale)[2]) {
  return __all_sync(~0u, rescale[0] == 1 && rescale[1] == 1);
}

// Multiplies accumulators by their rows' factors.
template <int kColumnTiles>
__device__ inline void rescale_rows(float (&out)[kColumnTiles][4], const float (&rescale)[2]) {
#pragma unroll
  for (int i = 0; i < kColumnTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) out[i][j] *= rescale[j / 2];
  }
}

// Two neighbouring accumulators, [16, 8] each, as the left operand [16, 16] of the next product.
template <class T>
__device__ inline void pack_operand(uint32_t (&operand)[4], const float (&left)[4],
                                    const float (&right)[4]) {
  operand[0] = pack<T>(left[0], left[1]);
  operand[1] = pack<T>(left[2], left[3]);
  operand[2] = pack<T>(right[0], right[1]);
  operand[3] = pack<T>(right[2], right[3]);
}

}  // namespace nano_vllm::cuda
