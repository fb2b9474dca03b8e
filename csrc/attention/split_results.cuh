// The results of splits and how they become that of a unit: the warps' of a split merge in their
// order, the splits fold in theirs, in shared memory or from the workspace with the same bits.
#pragma once

#include "attention/decode_operands.cuh"
#include "attention/decode_plan.cuh"

namespace nano_vllm::cuda::decode_sm90 {

constexpr int kConsumerWarps = 4;  // that multiply; each has a result of its own

// A row's result over some tokens, held by a warp: lane l has columns l, l + 32 and so on of the
// weighted values. Rounded step by step, so that a fold gives the same bits wherever it is made.
template <int kHeadDim>
struct RowResult {
  static constexpr int kColumns = ceil_div(kHeadDim, kWarpSize);
  float max = -kInfinity, sum = 0, out[kColumns] = {};

  __device__ static int column(int i) { return threadIdx.x % kWarpSize + i * kWarpSize; }
  __device__ static bool is_column(int i) {
    return kHeadDim % kWarpSize == 0 || column(i) < kHeadDim;
  }
  __device__ static float shift_of(float max) { return max == -kInfinity ? 0 : max; }

  // this = this * mine + next * its
  __device__ void add(float next_sum, const float (&next_out)[kColumns], float mine, float its) {
    sum = __fmaf_rn(sum, mine, __fmul_rn(next_sum, its));
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      out[i] = __fmaf_rn(out[i], mine, __fmul_rn(next_out[i], its));
    }
  }

  __device__ void fold(const RowResult& next) {
    const float new_max = fmaxf(max, next.max), shift = shift_of(new_max);
    add(next.sum, next.out, exp2_approx(max - shift), exp2_approx(next.max - shift));
    max = new_max;
  }

  template <class T>
  __device__ void write(T* row) const {
    const float inverse = sum == 0 ? 0 : 1 / sum;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (is_column(i)) row[column(i)] = from_float<T>(out[i] * inverse);
    }
  }
};

// What the multiplying warps share: each warp's result of a split, and a unit's result so far.
template <int kHeadDim, int kTileRows>
struct SplitResults {
  static constexpr int kRowStride = kHeadDim + 4;
  float* out;            // [kConsumerWarps, kTileRows, kRowStride]
  float* max_sum;        // [kConsumerWarps, kTileRows, 2]
  float* state;          // [kTileRows, kHeadDim]
  float* state_max_sum;  // [kTileRows, 2]

  __device__ explicit SplitResults(float* memory)
      : out(memory),
        max_sum(out + kConsumerWarps * kTileRows * kRowStride),
        state(max_sum + kConsumerWarps * kTileRows * 2),
        state_max_sum(state + kTileRows * kHeadDim) {}

  // A warp's accumulators; rows at or past num_rows are not wanted.
  __device__ void store(const float (&columns)[kHeadDim / 8][4], const RowStates& states,
                        int num_rows) const {
    using Columns = ValueColumns<kHeadDim>;
    constexpr int kElements = Columns::kElements;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
    for (int half = 0; half < (kTileRows > 8 ? 2 : 1); ++half) {
      const int row = lane / 4 + 8 * half;
      if (row >= num_rows) continue;
      float* to = out + (warp * kTileRows + row) * kRowStride + lane % 4 * 2 * kElements;
#pragma unroll
      for (int group = 0; group < Columns::kGroups; ++group) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
#pragma unroll
          for (int i = 0; i < kElements; i += 2) {
            *reinterpret_cast<float2*>(to + group * 8 * kElements + side * kElements + i) =
                make_float2(columns[group * kElements + i][2 * half + side],
                            columns[group * kElements + i + 1][2 * half + side]);
          }
        }
      }
      if (lane % 4 == 0) {
        *reinterpret_cast<float2*>(max_sum + (warp * kTileRows + row) * 2) =
            make_float2(states.max[half], states.sum[half]);
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
      float values[Result::kColumns];
#pragma unroll
      for (int i = 0; i < Result::kColumns; ++i) {
        values[i] = Result::is_column(i)
                        ? out[(warp * kTileRows + row) * kRowStride + Result::column(i)]
                        : 0;
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
    for (int i = 0; i < Result::kColumns; ++i) {
      if (Result::is_column(i)) so_far.out[i] = state[row * kHeadDim + Result::column(i)];
    }
    return so_far;
  }

  __device__ void store_state(int row, const RowResult<kHeadDim>& so_far) const {
    using Result = RowResult<kHeadDim>;
#pragma unroll
    for (int i = 0; i < Result::kColumns; ++i) {
      if (Result::is_column(i)) state[row * kHeadDim + Result::column(i)] = so_far.out[i];
    }
    __syncwarp();  // every lane has loaded what is now overwritten
    if (threadIdx.x % kWarpSize == 0) {
      state_max_sum[row * 2] = so_far.max, state_max_sum[row * 2 + 1] = so_far.sum;
    }
    __syncwarp();
  }
};

// The fold of all splits of a row, from the workspace. Lane l looks after split l.
template <int kHeadDim, class Slot>
__device__ RowResult<kHeadDim> fold_splits(int count, int row, const Slot& slot_of) {
  using Result = RowResult<kHeadDim>;
  static_assert(kMaxPlannedSplits == kWarpSize);
  constexpr int kAtOnce = 32 / Result::kColumns;
  const int lane = threadIdx.x % kWarpSize;
  float2 max_sum = make_float2(-kInfinity, 0);
  if (lane < count) {
    max_sum = __ldcg(reinterpret_cast<const float2*>(slot_of(lane).max_sum + row * 2));
  }
  float values[kAtOnce][Result::kColumns];
  const auto load_values = [&](int first) {
#pragma unroll
    for (int s = 0; s < kAtOnce; ++s) {
      const float* from = slot_of(first + s).out + row * kHeadDim;
#pragma unroll
      for (int i = 0; i < Result::kColumns; ++i) {
        const bool is_there = first + s < count && Result::is_column(i);
        values[s][i] = is_there ? __ldcg(from + Result::column(i)) : 0;
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
#pragma unroll 1
  for (int first = 0; first < count; first += kAtOnce) {
    if (first > 0) load_values(first);
#pragma unroll
    for (int s = 0; s < kAtOnce; ++s) {
      const int split = first + s;
      if (split >= count) break;
      result.add(__shfl_sync(~0u, max_sum.y, split), values[s], __shfl_sync(~0u, mine, split),
                 __shfl_sync(~0u, its, split));
    }
  }
  return result;
}

}  // namespace nano_vllm::cuda::decode_sm90
