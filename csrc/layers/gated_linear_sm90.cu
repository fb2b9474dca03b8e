// CUDA product of many rows with gate and up, and the activation, on Hopper. What the activation
// takes never leaves the registers: to write and read it is four times what is written here.
//
// A tile is 128 rows of the input by as many of gate and of up, which are one operand of 256 rows:
// a thread gets the sums of a gate and of its up in the same place. Two warpgroups have 64 rows
// each; where one of them activates and writes, the other multiplies. The two blocks of a cluster
// have the same weights, of which each loads a half for both.
#include "common/hopper.cuh"
#include "layers/linear.h"

namespace nano_vllm::cuda {
namespace gated_linear_sm90 {  // not anonymous: for other architectures most of it is unused

constexpr int kGroupRows = 64;  // of the input, for a warpgroup
constexpr int kNumGroups = 2;   // that multiply
constexpr int kTileRows = kNumGroups * kGroupRows;
constexpr int kTileColumns = 128;  // of the output
constexpr int kStepColumns = 64;   // of weight and input: 128 bytes, a row of a swizzled tile
constexpr int kStages = 4;
constexpr int kBand = 8;  // row tiles, see Walk
constexpr int kNumThreads = (1 + kNumGroups) * kWarpgroupSize;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
using Tile = SwizzledTile<kStepColumns>;

template <class T_, int kClusterSize_>
struct Shape {
  using T = T_;
  static constexpr int kClusterSize = kClusterSize_;
  static constexpr int kRows = kClusterSize * kTileRows;  // of a cluster
};

struct Shared {
  alignas(1024) unsigned char input[kStages][Tile::bytes(kTileRows)];
  alignas(1024) unsigned char weights[kStages][2][Tile::bytes(kTileColumns)];  // gate, up
  // Of its own block; what frees a stage are the warps of both blocks.
  Barrier full[kStages], empty[kStages];

  static constexpr uint32_t kStageBytes = Tile::bytes(kTileRows + 2 * kTileColumns);

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

// One thread, for its block's rows and, where two blocks are a cluster, half of their weights: gate
// or up.
template <class Shape>
__device__ void load_tiles(const LinearParams& p, const Maps& maps, const Walk& walk, int rank,
                           Shared& shared) {
  wait_for_last_kernel();
  RingPosition<kStages> at;
  for (int tile = blockIdx.x / Shape::kClusterSize; tile < walk.size();
       tile += gridDim.x / Shape::kClusterSize) {
    const Walk::Place place = walk.at(tile);
    const int row = place.row * Shape::kRows + rank * kTileRows;
    const int gate = place.column * kTileColumns, up = gate + p.out_features;
    for (int column = 0; column < p.in_features; column += kStepColumns, at = at.next()) {
      shared.empty[at.index].wait(at.parity ^ 1);
      Barrier& full = shared.full[at.index];
      full.arrive_and_expect(Shared::kStageBytes);
      load_box(shared.input[at.index], maps.input, full, column, row, 0, 0, 0);
      if constexpr (Shape::kClusterSize == 2) {
        load_box_for_cluster(shared.weights[at.index][rank], maps.weight, full, column,
                             rank == 0 ? gate : up, 0b11);
      } else {
        load_box(shared.weights[at.index][0], maps.weight, full, column, gate, 0, 0, 0);
        load_box(shared.weights[at.index][1], maps.weight, full, column, up, 0, 0, 0);
      }
    }
  }
  allow_next_kernel();
}

// Of four words that each of four neighbouring lanes has, lane i gets the i-th of all.
__device__ inline void transpose_quad(uint32_t (&words)[4]) {
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool is_upper = threadIdx.x & distance;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & distance) continue;
      const uint32_t sent = is_upper ? words[i] : words[i + distance];
      const uint32_t got = __shfl_xor_sync(~0u, sent, distance);
      if (is_upper) {
        words[i] = got;
      } else {
        words[i + distance] = got;
      }
    }
  }
}

__device__ inline float silu_and_mul(float gate, float up) {
  return __fdividef(gate, 1.0f + exp2_approx(-1.4426950408889634f * gate)) * up;
}

// Sums of 64 rows, from `row` on, by gate and by up.
template <class T>
__device__ void write_rows(const LinearParams& p, int row, int column,
                           const float (&sums)[2 * kTileColumns / 8][4]) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x % kWarpgroupSize / kWarpSize;
  row += 16 * warp + lane / 4;
  column += 8 * (lane % 4);
#pragma unroll
  for (int half = 0; half < 2; ++half, row += 8) {
    T* const out = static_cast<T*>(p.out) + row * p.out_stride_row;
#pragma unroll
    for (int i = 0; i < kTileColumns / 8; i += 4) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float (&gate)[4] = sums[i + j], (&up)[4] = sums[i + j + kTileColumns / 8];
        words[j] = pack<T>(silu_and_mul(gate[2 * half], up[2 * half]),
                           silu_and_mul(gate[2 * half + 1], up[2 * half + 1]));
      }
      transpose_quad(words);
      if (row < p.num_rows && column + 8 * i < p.out_features) {
        *reinterpret_cast<uint4*>(out + column + 8 * i) = {words[0], words[1], words[2], words[3]};
      }
    }
  }
}

template <class Shape>
__device__ void multiply_tiles(const LinearParams& p, const Walk& walk, int rank, Shared& shared) {
  using T = typename Shape::T;
  const int group = threadIdx.x / kWarpgroupSize - 1, lane = threadIdx.x % kWarpSize;
  const auto release = [&](int stage) {
    if (lane < Shape::kClusterSize) shared.empty[stage].arrive_at_block(lane);
  };
  float sums[2 * kTileColumns / 8][4];
  RingPosition<kStages> at;
  for (int tile = blockIdx.x / Shape::kClusterSize; tile < walk.size();
       tile += gridDim.x / Shape::kClusterSize) {
    int last = 0;
    for (int column = 0; column < p.in_features; column += kStepColumns, at = at.next()) {
      shared.full[at.index].wait(at.parity);
      const uint64_t input =
          Tile::along_columns(shared.input[at.index] + group * Tile::bytes(kGroupRows));
      const uint64_t weights = Tile::along_columns(shared.weights[at.index]);
      fence_products();
#pragma unroll
      for (int i = 0; i < kStepColumns / 16; ++i) {
        Warpgroup<T, 2 * kTileColumns>::multiply(sums, input + Tile::column_step(i),
                                                 weights + Tile::column_step(i),
                                                 column > 0 || i > 0);
      }
      commit_products();
      if (column > 0) {
        wait_products<1>();
        release(last);
      }
      last = at.index;
    }
    wait_products<0>();
    pin(sums);
    release(last);
    const Walk::Place place = walk.at(tile);
    write_rows<T>(p, place.row * Shape::kRows + rank * kTileRows + group * kGroupRows,
                  place.column * kTileColumns, sums);
  }
}

// Grid: as many clusters as the GPU has room for, or tiles there are.
template <class Shape>
__global__ void __launch_bounds__(kIsSm90a ? kNumThreads : 1, 1)
    gated_linear_kernel(const __grid_constant__ LinearParams p, const __grid_constant__ Maps maps,
                        const Walk walk) {
  if constexpr (kIsSm90a) {
    Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
    const int rank = blockIdx.x % Shape::kClusterSize;
    if (threadIdx.x == 0) {
      prefetch_map(maps.input);
      prefetch_map(maps.weight);
      shared.init_barriers(Shape::kClusterSize);
    }
    __syncwarp();
    arrive_at_cluster_relaxed();  // the other block's copies and warps reach these barriers
    wait_for_cluster();
    if (threadIdx.x < kWarpgroupSize) {
      release_registers<kProducerRegisters>();
      if (threadIdx.x == 0) load_tiles<Shape>(p, maps, walk, rank, shared);
    } else {
      take_registers<kConsumerRegisters>();
      multiply_tiles<Shape>(p, walk, rank, shared);
    }
    __syncwarp();
    arrive_at_cluster_relaxed();  // no block leaves while the other's copies and warps may reach it
    wait_for_cluster();
  }
}

inline int cluster_size_for(int num_rows) { return num_rows > kTileRows ? 2 : 1; }

template <class Shape>
void launch(const LinearParams& p, cudaStream_t stream) {
  const Walk walk{ceil_div(p.num_rows, Shape::kRows), ceil_div(p.out_features, kTileColumns),
                  kBand};
  const int64_t tiles = int64_t{walk.row_tiles} * walk.column_tiles;
  check(tiles < std::numeric_limits<int32_t>::max() - num_multiprocessors(),
        "linear_silu_and_mul: ", p.num_rows, " rows of ", p.out_features, " are too many");
  const Maps maps{
      make_matrix_map<Tile>(p.input, p.input_stride_row, p.num_rows, p.in_features, kTileRows),
      make_matrix_map<Tile>(p.weight, p.weight_stride_row, 2 * int64_t{p.out_features},
                            p.in_features, kTileColumns)};
  const int clusters = std::min(walk.size(), num_multiprocessors() / Shape::kClusterSize);
  launch_with_options("gated linear", gated_linear_kernel<Shape>,
                      dim3(static_cast<unsigned>(clusters * Shape::kClusterSize)),
                      dim3(kNumThreads), {sizeof(Shared), Shape::kClusterSize, true}, stream, p,
                      maps, walk);
}

}  // namespace gated_linear_sm90

// Torch's product is as fast where its tiles fill the GPU as well as ours, and has them in many
// sizes; the activation behind it takes 256 / in_features of the product's time. Of up to 256 rows
// its tiles are as ours, if there are many columns.
bool gated_linear_pays(int num_rows, int in_features, int out_features) {
  using namespace gated_linear_sm90;
  const int cluster_size = cluster_size_for(num_rows);
  const int row_tiles = ceil_div(num_rows, cluster_size * kTileRows);
  const int64_t tiles = int64_t{row_tiles} * ceil_div(out_features, kTileColumns);
  const int64_t at_once = num_multiprocessors() / cluster_size;
  const double busy = double(tiles) / double(ceil_div(tiles, at_once) * at_once) * num_rows /
                      (double(row_tiles) * cluster_size * kTileRows);
  if (num_rows <= 256 && out_features >= 96 * kTileColumns) return busy > 0.75;
  return busy * (1 + 256.0 / in_features) > 1;
}

void gated_linear(const LinearParams& p, cudaStream_t stream) {
  using namespace gated_linear_sm90;
  const auto run = [&](auto element) {
    using T = decltype(element);
    cluster_size_for(p.num_rows) == 2 ? launch<Shape<T, 2>>(p, stream)
                                      : launch<Shape<T, 1>>(p, stream);
  };
  p.dtype == DType::kFloat16 ? run(__half{}) : run(__nv_bfloat16{});
}

}  // namespace nano_vllm::cuda
