// Matrix products of many rows on Hopper whose tiles are finished in the registers that hold their
// sums: what the step behind the product takes is never written, and never read again.
//
// A tile is 128 rows of the input by twice 128 rows of the weight, which are one operand of 256: a
// thread gets the sums of a row's two halves in the same places. The copies put the weight's rows
// in an order by which these are eight neighbours of every 32: they are loaded and stored 16 bytes
// at a time, and no lane wants what another has.
//
// Two warpgroups have 64 rows each. The first has its last products of a tile ahead of the
// second's: where one of them finishes its tile, the other multiplies. The two blocks of a cluster
// have the same weights, of which each loads a half for both.
#pragma once

#include <algorithm>

#include "common/hopper.cuh"
#include "layers/linear.h"

namespace nano_vllm::cuda {
namespace tiled_linear_sm90 {

constexpr int kGroupRows = 64;  // of the input, for a warpgroup
constexpr int kNumGroups = 2;   // that multiply
constexpr int kTileRows = kNumGroups * kGroupRows;
constexpr int kHalfColumns = 128;  // rows of the weight, in each half of a tile
constexpr int kStepColumns = 64;   // of weight and input: 128 bytes, a row of a swizzled tile
constexpr int kStages = 4;
constexpr int kBand = 8;        // row tiles, see Walk
constexpr int kGroupSteps = 3;  // a tile's last ones, which the first warpgroup has first
constexpr int kTurnBarrier = 1;
constexpr int kNumThreads = (1 + kNumGroups) * kWarpgroupSize;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
using Tile = SwizzledTile<kStepColumns>;

// What a thread has of the sums, for each 32 columns of a tile: of row `row` and of the eighth
// behind it eight neighbours, from column 8 (lane % 4) on. Element e of them, of the first or
// second row, is sums[4 * (column / 32) + e / 2][2 * is_second + e % 2].
constexpr int kChunkColumns = 32;
constexpr int kChunks = 2 * kHalfColumns / kChunkColumns;
using Sums = float[4 * kChunks][4];

__device__ inline int lane_column() { return 8 * static_cast<int>(threadIdx.x % 4); }

__device__ inline void read_sums(float (&x)[8], const Sums& sums, int chunk, int is_second) {
#pragma unroll
  for (int e = 0; e < 8; ++e) x[e] = sums[4 * chunk + e / 2][2 * is_second + e % 2];
}

// How a product ends, an argument of its kernel:
//   using T: of input and weight.
//   Halves halves(int column_tile): the rows of the weight where its two halves begin, in chunks.
//   Early start(int row): what a thread reads ahead of the products, of its two rows.
//   void prepare(Early& early): what it reads by that, ahead of the last products.
//   void finish(const Early& early, int row, int column_tile, Sums& sums): called by whole warps,
//     also for rows past the input's end.

struct Halves {
  int first, second;
};

struct Shared {
  alignas(1024) unsigned char input[kStages][Tile::bytes(kTileRows)];
  alignas(1024) unsigned char weights[kStages][2][Tile::bytes(kHalfColumns)];
  // Of its own block; what frees a stage are the warps of both blocks.
  Barrier full[kStages], empty[kStages];

  static constexpr uint32_t kStageBytes = Tile::bytes(kTileRows + 2 * kHalfColumns);

  __device__ void init_barriers(int cluster_size) {
    for (Barrier& barrier : full) barrier.init(1);
    for (Barrier& barrier : empty) {
      barrier.init(cluster_size * kNumGroups * kWarpgroupSize / kWarpSize);
    }
    publish_barriers();
  }
};

struct Maps {
  CUtensorMap input, weight;
};

// The order in which clusters take tiles: down a band of rows, then the next columns. What runs
// together reads a few rows of the input and of the weights, which the second-level cache holds.
struct Walk {
  int row_tiles, column_tiles;  // of clusters
  int band;                     // row tiles
  int in_features;

  struct Place {
    int row, column;  // in tiles; a row tile is a cluster's
  };

  __host__ __device__ int size() const { return row_tiles * column_tiles; }
  __device__ Place at(int index) const {
    const int first = index / (band * column_tiles) * band;
    const int height = min(band, row_tiles - first), in_band = index - first * column_tiles;
    return {first + in_band % height, in_band / height};
  }
};

// One thread, for its block's rows and, where two blocks are a cluster, a half of their weights.
template <int kClusterSize, class Epilogue>
__device__ void load_tiles(const Maps& maps, const Walk& walk, const Epilogue& epilogue, int rank,
                           Shared& shared) {
  wait_for_last_kernel();
  RingPosition<kStages> at;
  for (int tile = blockIdx.x / kClusterSize; tile < walk.size(); tile += gridDim.x / kClusterSize) {
    const Walk::Place place = walk.at(tile);
    const int row = (place.row * kClusterSize + rank) * kTileRows;
    const Halves halves = epilogue.halves(place.column);
    for (int column = 0; column < walk.in_features; column += kStepColumns, at = at.next()) {
      shared.empty[at.index].wait(at.parity ^ 1);
      Barrier& full = shared.full[at.index];
      full.arrive_and_expect(Shared::kStageBytes);
      load_box(shared.input[at.index], maps.input, full, column, row, 0, 0, 0);
      if constexpr (kClusterSize == 2) {
        load_box_for_cluster(shared.weights[at.index][rank], maps.weight, full, column, 0, 0, 0,
                             rank == 0 ? halves.first : halves.second, 0b11);
      } else {
        load_box(shared.weights[at.index][0], maps.weight, full, column, 0, 0, 0, halves.first);
        load_box(shared.weights[at.index][1], maps.weight, full, column, 0, 0, 0, halves.second);
      }
    }
  }
  allow_next_kernel();
}

template <int kClusterSize, class Epilogue>
__device__ void multiply_tiles(const Walk& walk, const Epilogue& epilogue, int rank,
                               Shared& shared) {
  using Product = Warpgroup<typename Epilogue::T, 2 * kHalfColumns>;
  const int group = threadIdx.x / kWarpgroupSize - 1, lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x % kWarpgroupSize / kWarpSize;
  const auto release = [&](int stage) {
    if (lane < kClusterSize) shared.empty[stage].arrive_at_block(lane);
  };
  wait_for_last_kernel();  // for what the epilogue reads
  const int num_steps = ceil_div(walk.in_features, kStepColumns);
  // In tiles of fewer steps than stages the first warpgroup could be at the end of the next one
  // before the second waits for it.
  const bool takes_turns = num_steps >= kStages;
  RingPosition<kStages> at;
  for (int tile = blockIdx.x / kClusterSize; tile < walk.size(); tile += gridDim.x / kClusterSize) {
    const Walk::Place place = walk.at(tile);
    const int row =
        (place.row * kClusterSize + rank) * kTileRows + group * kGroupRows + 16 * warp + lane / 4;
    auto early = epilogue.start(row);
    Sums sums;
    int last = -1;  // the stage that products under way read
    const auto multiply = [&](auto is_first) {
      shared.full[at.index].wait(at.parity);
      const uint64_t input =
          Tile::along_columns(shared.input[at.index] + group * Tile::bytes(kGroupRows));
      const uint64_t weights = Tile::along_columns(shared.weights[at.index]);
      fence_products();
#pragma unroll
      for (int i = 0; i < kStepColumns / 16; ++i) {
        const uint64_t a = input + Tile::column_step(i), b = weights + Tile::column_step(i);
        if (is_first && i == 0) {
          Product::start(sums, a, b);
        } else {
          Product::multiply(sums, a, b, true);
        }
      }
      commit_products();
      if (last >= 0) {
        wait_products<1>();
        release(last);
      }
      last = at.index;
      at = at.next();
    };
    multiply(std::true_type{});
    const int turn = max(1, num_steps - kGroupSteps);
    for (int step = 1; step < turn; ++step) multiply(std::false_type{});
    epilogue.prepare(early);
    if (takes_turns && group == 1) {
      wait_products<0>();
      release(last);
      last = -1;
      sync_threads(kTurnBarrier, kNumGroups * kWarpgroupSize);
    }
    for (int step = turn; step < num_steps; ++step) multiply(std::false_type{});
    if (takes_turns && group == 0) arrive_threads(kTurnBarrier, kNumGroups * kWarpgroupSize);
    wait_products<0>();
    pin(sums);
    release(last);
    epilogue.finish(early, row, place.column, sums);
  }
}

// Grid: as many clusters as the GPU has room for, or tiles there are.
template <int kClusterSize, class Epilogue>
__global__ void __launch_bounds__(kIsSm90a ? kNumThreads : 1, 1)
    tiled_linear_kernel(const __grid_constant__ Maps maps, const Walk walk,
                        const __grid_constant__ Epilogue epilogue) {
  if constexpr (kIsSm90a) {
    Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
    const int rank = blockIdx.x % kClusterSize;
    if (threadIdx.x == 0) {
      prefetch_map(maps.input);
      prefetch_map(maps.weight);
      shared.init_barriers(kClusterSize);
    }
    __syncwarp();
    arrive_at_cluster_relaxed();  // the other block's copies and warps reach these barriers
    wait_for_cluster();
    if (threadIdx.x < kWarpgroupSize) {
      release_registers<kProducerRegisters>();
      if (threadIdx.x == 0) load_tiles<kClusterSize>(maps, walk, epilogue, rank, shared);
    } else {
      take_registers<kConsumerRegisters>();
      multiply_tiles<kClusterSize>(walk, epilogue, rank, shared);
    }
    __syncwarp();
    arrive_at_cluster_relaxed();  // no block leaves while the other's copies and warps may reach it
    wait_for_cluster();
  }
}

inline int cluster_size_for(int num_rows) { return num_rows > kTileRows ? 2 : 1; }

// The share of the GPU's time that tiles of so many rows keep its tensor cores busy with rows.
inline double busy_share(int num_rows, int column_tiles) {
  const int cluster_size = cluster_size_for(num_rows);
  const int row_tiles = ceil_div(num_rows, cluster_size * kTileRows);
  const int64_t tiles = int64_t{row_tiles} * column_tiles;
  const int64_t at_once = num_multiprocessors() / cluster_size;
  return double(tiles) / double(ceil_div(tiles, at_once) * at_once) * num_rows /
         (double(row_tiles) * cluster_size * kTileRows);
}

// Row 8 j + 2 q + e of a chunk in shared memory is row 8 q + 2 j + e of it in the weight: lane q of
// four has columns 8 j + 2 q and the next one of the former.
inline CUtensorMap make_weight_map(const void* weight, int64_t stride, int64_t rows, int columns) {
  const auto row_bytes = static_cast<uint64_t>(2 * stride);
  return make_tensor_map(
      {weight,
       {static_cast<uint64_t>(columns), 2, 4, 4, static_cast<uint64_t>(rows / kChunkColumns)},
       {row_bytes, 8 * row_bytes, 2 * row_bytes, kChunkColumns * row_bytes},
       {kStepColumns, 2, 4, 4, kHalfColumns / kChunkColumns}},
      Tile::kSwizzle);
}

template <int kClusterSize, class Epilogue>
void launch(const char* name, const LinearParams& p, int64_t weight_rows, int column_tiles,
            const Epilogue& epilogue, cudaStream_t stream) {
  const Walk walk{ceil_div(p.num_rows, kClusterSize * kTileRows), column_tiles, kBand,
                  p.in_features};
  check(int64_t{walk.row_tiles} * column_tiles <
            std::numeric_limits<int32_t>::max() - num_multiprocessors(),
        name, ": ", p.num_rows, " rows of ", p.out_features, " are too many");
  const Maps maps{
      make_matrix_map<Tile>(p.input, p.input_stride_row, p.num_rows, p.in_features, kTileRows),
      make_weight_map(p.weight, p.weight_stride_row, weight_rows, p.in_features)};
  const int clusters = std::min(walk.size(), num_multiprocessors() / kClusterSize);
  launch_with_options(name, tiled_linear_kernel<kClusterSize, Epilogue>,
                      dim3(static_cast<unsigned>(clusters * kClusterSize)), dim3(kNumThreads),
                      {sizeof(Shared), kClusterSize, true}, stream, maps, walk, epilogue);
}

// weight_rows: of the whole weight.
template <class Epilogue>
void run(const char* name, const LinearParams& p, int64_t weight_rows, int column_tiles,
         const Epilogue& epilogue, cudaStream_t stream) {
  cluster_size_for(p.num_rows) == 2
      ? launch<2>(name, p, weight_rows, column_tiles, epilogue, stream)
      : launch<1>(name, p, weight_rows, column_tiles, epilogue, stream);
}

}  // namespace tiled_linear_sm90
}  // namespace nano_vllm::cuda
