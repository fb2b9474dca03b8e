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

// The same for products that run while weights are made. Weights are powers of two of what scores
// exceed a reference by, which lies kLead above the highest score when it is set and stays while no
// weight reaches 2: outputs are rarely rescaled, and no exponential waits for a maximum. Weights of
// 2^-kLead, and those below that count beside it, are held as exactly as about 1.
template <class T>
struct LazyRowStates {
  static constexpr float kLead = std::is_same_v<T, __half> ? 3 : 7;
  // In both 16-bit types the highest bit of the exponents of 2 and more, infinity and NaN, alone.
  static constexpr uint32_t kReachesTwo = 0x40004000;
  float reference[2] = {-kInfinity, -kInfinity};
  float sum[2] = {0, 0};  // of this lane's columns alone

  // Turns both rows' scores times scale into weights, packed as left operands of the next product.
  // False, and no state changed, if one reaches 2: the warp's rows have to follow, with the same
  // scores. Of rows that saw no column yet all reach it.
  template <int kColumnTiles>
  __device__ bool weigh(const float (&scores)[kColumnTiles][4], float scale,
                        uint32_t (&weights)[kColumnTiles / 2][4]) {
    const float sum_before[2] = {sum[0], sum[1]};
    const uint32_t bits = weigh_by(reference, scores, scale, weights);
    if (!__any_sync(~0u, (bits & kReachesTwo) != 0)) return true;
    sum[0] = sum_before[0];
    sum[1] = sum_before[1];
    return false;
  }

  // The same behind references that have been moved where a score exceeds them by 1. What was
  // weighted before is to be multiplied by rescale.
  template <int kColumnTiles>
  __device__ void follow(const float (&scores)[kColumnTiles][4], float scale,
                         uint32_t (&weights)[kColumnTiles / 2][4], float (&rescale)[2]) {
    float shift[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = -kInfinity;
#pragma unroll
      for (int i = 0; i < kColumnTiles; ++i) {
        highest = fmaxf(highest, fmaxf(scores[i][2 * half], scores[i][2 * half + 1]));
      }
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
      highest = scale * fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
      rescale[half] = 1;
      if (highest - reference[half] >= 1) {
        rescale[half] = exp2_approx(reference[half] - (highest + kLead));
        reference[half] = highest + kLead;
      }
      sum[half] *= rescale[half];
      shift[half] = reference[half] == -kInfinity ? 0 : reference[half];
    }
    weigh_by(shift, scores, scale, weights);
  }

 private:
  // Returns the weights' bits, or'ed.
  template <int kColumnTiles>
  __device__ uint32_t weigh_by(const float (&shift)[2], const float (&scores)[kColumnTiles][4],
                               float scale, uint32_t (&weights)[kColumnTiles / 2][4]) {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kColumnTiles; ++i) {
      float weight[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        weight[j] = exp2_approx(fmaf(scores[i][j], scale, -shift[j / 2]));
        sum[j / 2] += weight[j];
      }
      uint32_t* const packed = weights[i / 2] + i % 2 * 2;
      packed[0] = pack<T>(weight[0], weight[1]);
      packed[1] = pack<T>(weight[2], weight[3]);
      bits |= packed[0] | packed[1];
    }
    return bits;
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
