// CUDA copy_blocks: 16 bytes a thread and step, over device memory and pinned host memory alike.
#include <algorithm>
#include <cstdint>
#include <limits>

#include "cache/copy_blocks.h"
#include "common/cuda_common.cuh"

namespace nano_vllm::cuda {
namespace {

constexpr int kNumThreads = 256;
constexpr int kUnitsPerThread = 4;  // in flight together: a read over PCIe takes microseconds
constexpr int kTileUnits = kNumThreads * kUnitsPerThread;

// Grid: a block for each tile of kTileUnits units, or as many as a grid holds, each then taking
// several. The tiles of a KV block follow each other, then come the pairs, then the planes.
template <class Unit>
__global__ void __launch_bounds__(kNumThreads)
    copy_blocks_kernel(CopyBlocksParams p, int64_t units_per_block, int64_t tiles_per_block) {
  const int64_t num_tiles = int64_t{p.num_planes} * p.num_pairs * tiles_per_block;
  for (int64_t tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
    const int64_t copy = tile / tiles_per_block;
    const int64_t plane = copy / p.num_pairs, pair = copy % p.num_pairs;
    const int64_t src_block = p.block_mapping[2 * pair];
    const int64_t dst_block = p.block_mapping[2 * pair + 1];
    const Unit* src =
        reinterpret_cast<const Unit*>(static_cast<const char*>(p.src) + plane * p.src_stride_plane +
                                      src_block * p.src_stride_block);
    Unit* dst = reinterpret_cast<Unit*>(static_cast<char*>(p.dst) + plane * p.dst_stride_plane +
                                        dst_block * p.dst_stride_block);
    const int64_t first = tile % tiles_per_block * kTileUnits + threadIdx.x;
    Unit units[kUnitsPerThread];
#pragma unroll
    for (int i = 0; i < kUnitsPerThread; ++i) {
      if (first + i * kNumThreads < units_per_block) units[i] = src[first + i * kNumThreads];
    }
#pragma unroll
    for (int i = 0; i < kUnitsPerThread; ++i) {
      if (first + i * kNumThreads < units_per_block) dst[first + i * kNumThreads] = units[i];
    }
  }
}

template <class Unit>
void launch(const CopyBlocksParams& p, cudaStream_t stream) {
  const int64_t units = p.block_bytes / static_cast<int64_t>(sizeof(Unit));
  const int64_t tiles = ceil_div<int64_t>(units, kTileUnits);
  const int64_t grid = std::min<int64_t>(int64_t{p.num_planes} * p.num_pairs * tiles,
                                         std::numeric_limits<int32_t>::max());
  copy_blocks_kernel<Unit>
      <<<static_cast<unsigned>(grid), kNumThreads, 0, stream>>>(p, units, tiles);
  check_launch("copy_blocks");
}

}  // namespace

void copy_blocks(const CopyBlocksParams& p, cudaStream_t stream) {
  if (p.num_planes == 0 || p.num_pairs == 0 || p.block_bytes == 0) return;
  // A view into a pool may begin anywhere.
  const uint64_t offsets = reinterpret_cast<uintptr_t>(p.src) | reinterpret_cast<uintptr_t>(p.dst) |
                           p.src_stride_plane | p.src_stride_block | p.dst_stride_plane |
                           p.dst_stride_block | p.block_bytes;
  if (offsets % sizeof(uint4) == 0) {
    launch<uint4>(p, stream);
  } else {
    launch<uint8_t>(p, stream);
  }
}

}  // namespace nano_vllm::cuda
