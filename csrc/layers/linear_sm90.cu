// CUDA linear for few rows, on Hopper: the product streams its weights, so nothing else may take
// time. A block asks for its first weights before the kernel ahead of it has ended (programmatic
// dependent launch), which keeps the memory busy from one product of a decode step to the next.
//
// The weight is the left operand: 64 of its rows fill a warpgroup's product, whose columns are the
// few rows of the input. Where there are too few such tiles for the chip, the blocks of a cluster
// share the columns of one and add their sums through shared memory, in the order of their ranks.
#include "common/hopper.cuh"
#include "layers/linear.h"

namespace nano_vllm::cuda {
namespace linear_sm90 {  // not anonymous: for other architectures most of it is unused

constexpr int kTileRows = 64;     // of the weight
constexpr int kStepColumns = 64;  // of weight and input: 128 bytes, a row of a swizzled tile
constexpr int kMaxSplits = 8;     // what any cluster may have
constexpr int kNumThreads = kWarpgroupSize + kWarpSize;  // a warpgroup multiplies, a warp copies
using Tile = SwizzledTile<kStepColumns>;

template <class T_, int kInputRows_, bool kIsGated_>
struct Shape {
  using T = T_;
  static constexpr int kInputRows = kInputRows_;
  static constexpr bool kIsGated = kIsGated_;
  // A gated tile has half of its rows from the gate, then as many from up.
  static constexpr int kOutColumns = kIsGated ? kTileRows / 2 : kTileRows;
  static constexpr size_t kWeightBytes = Tile::bytes(kTileRows);
  static constexpr size_t kInputBytes = Tile::bytes(kInputRows);
  // Few enough that the blocks of the next product find room on the SM beside this one's.
  static constexpr int kStages = kInputRows <= 8 ? 8 : kInputRows <= 16 ? 7 : 6;
};

template <class Shape>
struct Shared {
  // A row of sums and its padding: neither the fragments' stores nor the loads meet in a bank.
  static constexpr int kSumsStride = kTileRows + 4;

  alignas(1024) unsigned char weights[Shape::kStages][Shape::kWeightBytes];
  alignas(1024) unsigned char input[Shape::kStages][Shape::kInputBytes];
  Barrier full[Shape::kStages], empty[Shape::kStages];

  // [kInputRows, kSumsStride], in the place of the stages once all are multiplied.
  __device__ float* sums() {
    static_assert(4 * kSumsStride * Shape::kInputRows <=
                  Shape::kStages * (Shape::kWeightBytes + Shape::kInputBytes));
    return reinterpret_cast<float*>(weights);
  }
};

// The steps of a tile's columns that fall to a block.
struct Steps {
  int begin, end;

  __device__ Steps(int num_steps, int rank, int num_splits)
      : begin(num_steps * rank / num_splits), end(num_steps * (rank + 1) / num_splits) {}
};

struct Maps {
  CUtensorMap weight, input;
};

// Weights wait for nothing, the input for the kernel before.
template <class Shape>
__device__ void copy_steps(const LinearParams& p, const Maps& maps, int tile, Steps steps,
                           Shared<Shape>& shared) {
  const auto load_weights = [&](int step, int stage) {
    shared.full[stage].arrive_and_expect(Shape::kWeightBytes + Shape::kInputBytes);
    const int column = step * kStepColumns, row = tile * Shape::kOutColumns;
    load_box(shared.weights[stage], maps.weight, shared.full[stage], column, row, 0, 0, 0);
    if constexpr (Shape::kIsGated) {
      load_box(shared.weights[stage] + Shape::kWeightBytes / 2, maps.weight, shared.full[stage],
               column, p.out_features + row, 0, 0, 0);
    }
  };
  const auto load_input = [&](int step, int stage) {
    load_box(shared.input[stage], maps.input, shared.full[stage], step * kStepColumns, 0, 0, 0, 0);
  };
  const int first_end = min(steps.end, steps.begin + Shape::kStages);
  for (int step = steps.begin; step < first_end; ++step) load_weights(step, step - steps.begin);
  wait_for_last_kernel();
  for (int step = steps.begin; step < first_end; ++step) load_input(step, step - steps.begin);
  RingPosition<Shape::kStages> at;
  for (int step = first_end; step < steps.end; ++step, at = at.next()) {
    shared.empty[at.index].wait(at.parity);
    load_weights(step, at.index);
    load_input(step, at.index);
  }
}

template <class Shape>
__device__ void multiply_steps(Steps steps, Shared<Shape>& shared) {
  float sums[Shape::kInputRows / 8][4];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  RingPosition<Shape::kStages> at;
  int last = 0;
  for (int step = steps.begin; step < steps.end; ++step) {
    shared.full[at.index].wait(at.parity);
    const uint64_t weights = Tile::along_columns(shared.weights[at.index]);
    const uint64_t input = Tile::along_columns(shared.input[at.index]);
    fence_products();
#pragma unroll
    for (int i = 0; i < kStepColumns / 16; ++i) {
      Warpgroup<typename Shape::T, Shape::kInputRows>::multiply(
          sums, weights + Tile::column_step(i), input + Tile::column_step(i),
          step > steps.begin || i > 0);
    }
    commit_products();
    if (step > steps.begin) {
      wait_products<1>();
      if (lane == 0) shared.empty[last].arrive();
    }
    last = at.index;
    at = at.next();
  }
  wait_products<0>();
  pin(sums);
  sync_threads(1, kWarpgroupSize);  // all have multiplied: the stages may be overwritten
  float* const to =
      shared.sums() + 2 * (lane % 4) * Shared<Shape>::kSumsStride + 16 * warp + lane / 4;
#pragma unroll
  for (int i = 0; i < Shape::kInputRows / 8; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      to[(8 * i + j % 2) * Shared<Shape>::kSumsStride + 8 * (j / 2)] = sums[i][j];
    }
  }
}

__device__ inline float silu(float x) { return x / (1.0f + expf(-x)); }

// Rank r of a cluster has the input rows r, r + num_splits, ...: adds the sums of all ranks.
template <class Shape>
__device__ void write_rows(const LinearParams& p, int tile, int rank, int num_splits,
                           Shared<Shape>& shared) {
  using T = typename Shape::T;
  constexpr int kVec = 4, kThreadsPerRow = Shape::kOutColumns / kVec;
  const int column = threadIdx.x % kThreadsPerRow * kVec;
  const int64_t out_column = tile * Shape::kOutColumns + column;
  if (out_column >= p.out_features) return;
  const auto total = [&](int row, int from) {
    const float* address = shared.sums() + row * Shared<Shape>::kSumsStride + from;
    float4 parts[kMaxSplits];
#pragma unroll
    for (int i = 0; i < kMaxSplits; ++i) {
      if (i < num_splits) parts[i] = load_of_block(address, i);
    }
    float4 sum = parts[0];
#pragma unroll
    for (int i = 1; i < kMaxSplits; ++i) {
      if (i >= num_splits) break;
      sum.x += parts[i].x, sum.y += parts[i].y, sum.z += parts[i].z, sum.w += parts[i].w;
    }
    return sum;
  };
  const int rows_at_once = kWarpgroupSize / kThreadsPerRow;
  for (int i = threadIdx.x / kThreadsPerRow; rank + i * num_splits < p.num_rows;
       i += rows_at_once) {
    const int row = rank + i * num_splits;
    float4 x = total(row, column);
    if constexpr (Shape::kIsGated) {
      const float4 up = total(row, Shape::kOutColumns + column);
      x = {silu(x.x) * up.x, silu(x.y) * up.y, silu(x.z) * up.z, silu(x.w) * up.w};
    } else if (p.bias != nullptr) {
      const T* bias = static_cast<const T*>(p.bias) + out_column;
      x.x += to_float(bias[0]), x.y += to_float(bias[1]);
      x.z += to_float(bias[2]), x.w += to_float(bias[3]);
    }
    *reinterpret_cast<uint2*>(static_cast<T*>(p.out) + row * p.out_stride_row + out_column) = {
        pack<T>(x.x, x.y), pack<T>(x.z, x.w)};
  }
}

// Grid: tiles of the weight, num_splits blocks each, which are a cluster.
template <class Shape>
__global__ void __launch_bounds__(kIsSm90a ? kNumThreads : 1)
    linear_kernel(const __grid_constant__ LinearParams p, const __grid_constant__ Maps maps,
                  int num_splits) {
  if constexpr (kIsSm90a) {
    Shared<Shape>& shared = *reinterpret_cast<Shared<Shape>*>(dynamic_shared());
    allow_next_kernel();
    if (threadIdx.x == kWarpgroupSize) {
      prefetch_map(maps.weight);
      prefetch_map(maps.input);
      for (Barrier& barrier : shared.full) barrier.init(1);
      for (Barrier& barrier : shared.empty) barrier.init(kWarpgroupSize / kWarpSize);
      publish_barriers();
    }
    __syncthreads();
    const int tile = blockIdx.x / num_splits, rank = blockIdx.x % num_splits;
    const Steps steps(ceil_div(p.in_features, kStepColumns), rank, num_splits);
    if (threadIdx.x == kWarpgroupSize) {
      copy_steps(p, maps, tile, steps, shared);
    } else if (threadIdx.x < kWarpgroupSize) {
      multiply_steps(steps, shared);
    }
    __syncwarp();
    arrive_at_cluster();
    wait_for_cluster();
    if (threadIdx.x < kWarpgroupSize) write_rows(p, tile, rank, num_splits, shared);
    __syncwarp();
    arrive_at_cluster_relaxed();  // no block leaves while others read its sums
    wait_for_cluster();
  }
}

// Blocks that share a tile. Time goes with the steps of the SM that has most and with the meeting
// of the cluster, measured in steps. Decided by the weight's shape alone: a row's bits do not
// depend on the others.
inline int choose_splits(int num_tiles, int num_steps) {
  int best = 1;
  double least = 0;
  for (int splits = 1; splits <= kMaxSplits && splits <= num_steps; splits *= 2) {
    constexpr double kCostOfMeeting[] = {0, 12, 19, 0, 19};  // by splits / 2
    const int blocks_of_sm = ceil_div(num_tiles * splits, num_multiprocessors());
    const double cost = double(blocks_of_sm) * num_steps / splits + kCostOfMeeting[splits / 2];
    if (splits == 1 || cost < least) {
      best = splits;
      least = cost;
    }
  }
  return best;
}

template <class Shape>
void launch(const LinearParams& p, cudaStream_t stream) {
  const int num_tiles = ceil_div(p.out_features, Shape::kOutColumns);
  const int num_splits = choose_splits(num_tiles, ceil_div(p.in_features, kStepColumns));
  const int64_t weight_rows = int64_t{p.out_features} * (Shape::kIsGated ? 2 : 1);
  const Maps maps{make_matrix_map<Tile>(p.weight, p.weight_stride_row, weight_rows, p.in_features,
                                        Shape::kOutColumns),
                  make_matrix_map<Tile>(p.input, p.input_stride_row, p.num_rows, p.in_features,
                                        Shape::kInputRows)};
  launch_with_options("linear", linear_kernel<Shape>,
                      dim3(grid_x("linear", int64_t{num_tiles} * num_splits)), dim3(kNumThreads),
                      {sizeof(Shared<Shape>), static_cast<unsigned>(num_splits), true}, stream, p,
                      maps, num_splits);
}

template <class T, bool kIsGated>
void launch_for_rows(const LinearParams& p, cudaStream_t stream) {
  if (p.num_rows <= 8) return launch<Shape<T, 8, kIsGated>>(p, stream);
  if (p.num_rows <= 16) return launch<Shape<T, 16, kIsGated>>(p, stream);
  launch<Shape<T, 32, kIsGated>>(p, stream);
}

inline bool has_kernels() {
  static const bool has = has_code(linear_kernel<Shape<__half, 8, false>>, kNumThreads);
  return has;
}

}  // namespace linear_sm90

bool can_linear(DType dtype, int64_t in_features, int64_t out_features) {
  return dtype != DType::kFloat32 && compute_capability() == 90 && linear_sm90::has_kernels() &&
         in_features > 0 && in_features % 8 == 0 && out_features % 8 == 0;
}

void linear(const LinearParams& p, cudaStream_t stream) {
  if (p.num_rows > kLinearMaxRows) return gated_linear(p, stream);
  const auto run = [&](auto element) {
    using T = decltype(element);
    p.is_gated ? linear_sm90::launch_for_rows<T, true>(p, stream)
               : linear_sm90::launch_for_rows<T, false>(p, stream);
  };
  p.dtype == DType::kFloat16 ? run(__half{}) : run(__nv_bfloat16{});
}

}  // namespace nano_vllm::cuda
