// The results of splits and how they become that of a unit: the warps' of a split merge in their
// order, the splits fold in theirs, in shared memory or from the workspace with the same bits.
#pragma once

#include "attention/decode_operands.cuh"
#include "attention/decode_plan.cuh"
#include "attention/prefix_plan.cuh"

namespace nano_vllm::cuda::decode_sm90 {

constexpr int kConsumerWarps = 4;  // that multiply; each has a result of its own

// Four neighbouring columns of a row, moved by one instruction.
using Columns4 = float[4];

__device__ inline void set_columns(Columns4& to, const float4& x) {
  to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}
__device__ inline void load_columns(Columns4& to, const float* from) {
  set_columns(to, *reinterpret_cast<const float4*>(from));
}
// Of what other blocks have written: from the L2 cache, as the first-level one may be behind.
__device__ inline void load_columns_of_others(Columns4& to, const float* from) {
  set_columns(to, __ldcg(reinterpret_cast<const float4*>(from)));
}
__device__ inline float4 vector_of(const Columns4& x) { return {x[0], x[1], x[2], x[3]}; }

// A row's result over some tokens, held by a warp: lane l has columns 4 l .. 4 l + 3 of each 128 of
// the weighted values. Rounded step by step, so that a fold gives the same bits wherever it is
// made.
template <int kHeadDim>
struct RowResult {
  static constexpr int kCount = ceil_div(kHeadDim, 4 * kWarpSize);
  float max = -kInfinity, sum = 0;
  Columns4 out[kCount] = {};

  __device__ static int column(int i) { return 4 * (threadIdx.x % kWarpSize + i * kWarpSize); }
  __device__ static bool has(int i) {
    return kHeadDim % (4 * kWarpSize) == 0 || column(i) < kHeadDim;
  }
  __device__ static float shift_of(float max) { return max == -kInfinity ? 0 : max; }

  // this = this * mine + next * its
  __device__ void add(float next_sum, const Columns4 (&next_out)[kCount], float mine, float its) {
    sum = __fmaf_rn(sum, mine, __fmul_rn(next_sum, its));
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        out[i][j] = __fmaf_rn(out[i][j], mine, __fmul_rn(next_out[i][j], its));
      }
    }
  }

  __device__ void fold(const RowResult& next) {
    const float new_max = fmaxf(max, next.max), shift = shift_of(new_max);
    add(next.sum, next.out, exp2_approx(max - shift), exp2_approx(next.max - shift));
    max = new_max;
  }

  // To memory, aligned to four elements.
  template <class T>
  __device__ void write(T* row) const {
    const float inverse = sum == 0 ? 0 : __fdividef(1, sum);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (!has(i)) continue;
      __stcg(reinterpret_cast<uint2*>(row + column(i)),
             make_uint2(pack<T>(out[i][0] * inverse, out[i][1] * inverse),
                        pack<T>(out[i][2] * inverse, out[i][3] * inverse)));
    }
  }
};

// What the multiplying warps share: each warp's result of a split, and a unit's result so far.
template <int kHeadDim, int kTileRows>
struct SplitResults {
  static constexpr int kRowStride = kHeadDim + 4;
  static constexpr int kFloats =
      kConsumerWarps * kTileRows * (kRowStride + 2) + kTileRows * (kHeadDim + 2);
  float* out;            // [kConsumerWarps, kTileRows, kRowStride]
  float* max_sum;        // [kConsumerWarps, kTileRows, 2]
  float* state;          // [kTileRows, kHeadDim]
  float* state_max_sum;  // [kTileRows, 2]

  __device__ explicit SplitResults(float* memory)
      : out(memory),
        max_sum(out + kConsumerWarps * kTileRows * kRowStride),
        state(max_sum + kConsumerWarps * kTileRows * 2),
        state_max_sum(state + kTileRows * kHeadDim) {}

  // A warp's accumulators; rows at or past num_rows are not wanted. Of each 16 columns a lane has
  // l / 4 and the one 8 further or, if neighbours, 2 (l / 4) and the next.
  template <bool kNeighbours>
  __device__ void store(const float (&columns)[kHeadDim / 16][kTileRows / 8][4],
                        const QueryStates<kTileRows / 8>& states, int num_rows) const {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
    for (int n = 0; n < kTileRows / 8; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = 8 * n + lane % 4 * 2 + j;
        if (row >= num_rows) continue;
        // Rows are kRowStride apart: the lanes' words lie in different banks.
        float* to = out + (warp * kTileRows + row) * kRowStride + lane / 4 * (kNeighbours ? 2 : 1);
#pragma unroll
        for (int i = 0; i < kHeadDim / 16; ++i) {
          to[16 * i] = columns[i][n][j];
          to[16 * i + (kNeighbours ? 1 : 8)] = columns[i][n][2 + j];
        }
        if (lane / 4 == 0) {
          *reinterpret_cast<float2*>(max_sum + (warp * kTileRows + row) * 2) =
              make_float2(states.max[n][j], states.sum[n][j]);
        }
      }
    }
  }

  // The split's result, the warps' in their order.
  __device__ RowResult<kHeadDim> merge(int row) const {
    using Result = RowResult<kHeadDim>;
    float2 of_warp[kConsumerWarps];
    Result merged;
#pragma unroll
    for (int warp = 0; warp < kConsumerWarps; ++warp) {
      of_warp[warp] = *reinterpret_cast<const float2*>(max_sum + (warp * kTileRows + row) * 2);
      merged.max = fmaxf(merged.max, of_warp[warp].x);
    }
#pragma unroll
    for (int warp = 0; warp < kConsumerWarps; ++warp) {
      Columns4 values[Result::kCount] = {};
#pragma unroll
      for (int i = 0; i < Result::kCount; ++i) {
        if (Result::has(i)) {
          load_columns(values[i], out + (warp * kTileRows + row) * kRowStride + Result::column(i));
        }
      }
      const float weight = exp2_approx(of_warp[warp].x - Result::shift_of(merged.max));
      merged.add(of_warp[warp].y, values, 1, weight);
    }
    return merged;
  }

  __device__ RowResult<kHeadDim> load_state(int row) const {
    using Result = RowResult<kHeadDim>;
    Result so_far;
    so_far.max = state_max_sum[row * 2], so_far.sum = state_max_sum[row * 2 + 1];
#pragma unroll
    for (int i = 0; i < Result::kCount; ++i) {
      if (Result::has(i)) load_columns(so_far.out[i], state + row * kHeadDim + Result::column(i));
    }
    return so_far;
  }

  __device__ void store_state(int row, const RowResult<kHeadDim>& so_far) const {
    using Result = RowResult<kHeadDim>;
#pragma unroll
    for (int i = 0; i < Result::kCount; ++i) {
      if (!Result::has(i)) continue;
      *reinterpret_cast<float4*>(state + row * kHeadDim + Result::column(i)) =
          vector_of(so_far.out[i]);
    }
    __syncwarp();  // every lane has loaded what is now overwritten
    if (threadIdx.x % kWarpSize == 0) {
      state_max_sum[row * 2] = so_far.max, state_max_sum[row * 2 + 1] = so_far.sum;
    }
    __syncwarp();
  }
};

// The fold of all splits of a row, from the workspace. Lane l looks after split l.
template <int kHeadDim>
__device__ RowResult<kHeadDim> fold_splits(int count, int row, const SplitSlots<kHeadDim>& slots) {
  using Result = RowResult<kHeadDim>;
  static_assert(kMaxPlannedSplits == kWarpSize);
  constexpr int kAtOnce = 16 / Result::kCount;
  const int lane = threadIdx.x % kWarpSize;
  float2 max_sum = make_float2(-kInfinity, 0);
  if (lane < count) max_sum = __ldcg(&slots.max_sum(lane, row));

  Columns4 values[kAtOnce][Result::kCount] = {};
  const auto load_values = [&](int first) {
#pragma unroll
    for (int s = 0; s < kAtOnce; ++s) {
#pragma unroll
      for (int i = 0; i < Result::kCount; ++i) {
        if (first + s >= count || !Result::has(i)) continue;
        load_columns_of_others(values[s][i], slots.out(first + s, row) + Result::column(i));
      }
    }
  };
  load_values(0);
  float max = max_sum.x;  // of the splits up to this lane's
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const float before = __shfl_up_sync(~0u, max, offset);
    if (lane >= offset) max = fmaxf(max, before);
  }
  const float max_before = __shfl_up_sync(~0u, max, 1);
  const float shift = Result::shift_of(max);
  const float mine = lane == 0 ? 0 : exp2_approx(max_before - shift);
  const float its = exp2_approx(max_sum.x - shift);
  Result result;
  result.max = __shfl_sync(~0u, max, kWarpSize - 1);
#pragma unroll 1
  for (int first = 0; first < count; first += kAtOnce) {
    if (first > 0) load_values(first);
#pragma unroll
    for (int s = 0; s < kAtOnce; ++s) {
      const int split = first + s;
      if (split < count) {
        result.add(__shfl_sync(~0u, max_sum.y, split), values[s], __shfl_sync(~0u, mine, split),
                   __shfl_sync(~0u, its, split));
      }
    }
  }
  return result;
}

// A row's result over the prefix that it shares with others, then over the rest.
template <int kHeadDim>
__device__ RowResult<kHeadDim> fold_prefix(const PrefixSlots& slots, int num_splits, int seq,
                                           int head, const RowResult<kHeadDim>& rest) {
  using Result = RowResult<kHeadDim>;
  Result result;
#pragma unroll 1
  for (int split = 0; split < num_splits; ++split) {
    const int64_t row = slots.row(split, seq, head);
    const float2 max_sum = __ldcg(&slots.max_sum(row));
    Result next;
    next.max = max_sum.x, next.sum = max_sum.y;
#pragma unroll
    for (int i = 0; i < Result::kCount; ++i) {
      if (Result::has(i)) load_columns_of_others(next.out[i], slots.out(row) + Result::column(i));
    }
    result.fold(next);
  }
  result.fold(rest);
  return result;
}

}  // namespace nano_vllm::cuda::decode_sm90
