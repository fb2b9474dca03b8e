// Tiles in shared memory as the copy engine of Hopper fills them and its tensor cores read them,
// and rings of them.
#pragma once

#include "common/ptx.cuh"

namespace nano_vllm::cuda {

constexpr int kWarpgroupSize = 128;

// A place in a ring of kSize buffers, and the parity of the phase it is in.
template <int kSize>
struct RingPosition {
  int index = 0;
  uint32_t parity = 0;

  __device__ RingPosition next() const {
    return index + 1 < kSize ? RingPosition{index + 1, parity} : RingPosition{0, parity ^ 1};
  }
};

// A tile of rows of kColumns 16-bit elements as the copy engine's box puts it and wgmma reads it:
// [8-row group][column block][8 rows][kSwizzle bytes], where the 16-byte chunks of a row are
// exchanged by address bits 7 and up: no eight rows of a chunk share a bank. Rows of an odd number
// of chunks are in different banks as they are: one block of columns, nothing exchanged (16).
template <int kColumns>
struct SwizzledTile {
  static constexpr int kSwizzle = kColumns % 64 == 0   ? 128
                                  : kColumns % 32 == 0 ? 64
                                  : kColumns % 16 == 0 ? 32
                                                       : 16;
  static constexpr int kBlockColumns = kSwizzle > 16 ? kSwizzle / 2 : kColumns;
  static constexpr int kColumnBlocks = kColumns / kBlockColumns;
  static constexpr int kRowBytes = 2 * kBlockColumns;  // of a row in a block
  static constexpr int kBlockBytes = 8 * kRowBytes;
  static constexpr int kGroupBytes = kColumnBlocks * kBlockBytes;
  static constexpr int kChunks = kColumns / 8;

  __host__ __device__ static constexpr size_t bytes(int rows) {
    return size_t{2} * rows * kColumns;
  }

  // In bytes.
  __device__ static int offset(int row, int chunk) {
    constexpr int kBlockChunks = kRowBytes / 16;
    const int in_block = chunk % kBlockChunks ^ row % 8 * kSwizzle / 128;
    return row / 8 * kGroupBytes + chunk / kBlockChunks * kBlockBytes + row % 8 * kRowBytes +
           16 * in_block;
  }
  // Of an even chunk or, where is_next is 1, of the next one, which differ in one address bit; of
  // the last chunk, of an odd number, in both cases.
  __device__ static int offset(int row, int even_chunk, int is_next) {
    if constexpr (kSwizzle > 16) return offset(row, even_chunk) ^ 16 * is_next;
    return offset(row, even_chunk) + (even_chunk + 1 < kChunks ? 16 * is_next : 0);
  }

  // The tile as a matrix whose K (the dimension summed over) runs along the columns ...
  __device__ static uint64_t along_columns(const void* tile) { return descriptor(tile, 16); }
  // ... and the distance, in units of a descriptor, from its start to the step-th 16 columns.
  __host__ __device__ static constexpr int column_step(int step) {
    return (step * 32 / kSwizzle * kBlockBytes + step * 32 % kSwizzle) / 16;
  }

  // The tile as a matrix whose K runs along the rows, and the distance to the step-th 16 rows.
  __device__ static uint64_t along_rows(const void* tile) { return descriptor(tile, kBlockBytes); }
  __host__ __device__ static constexpr int row_step(int step) {
    return step * 2 * kGroupBytes / 16;
  }

 private:
  // PTX ISA, "Matrix descriptor format". The leading offset leads to the next column block where K
  // runs along the rows and is unused otherwise; the stride offset leads to the next 8 rows.
  __device__ static uint64_t descriptor(const void* tile, int leading_offset) {
    constexpr uint64_t kMode = kSwizzle == 128 ? 1 : kSwizzle == 64 ? 2 : 3;
    return (shared_address(tile) & 0x3ffff) >> 4 | uint64_t(leading_offset >> 4) << 16 |
           uint64_t{kGroupBytes >> 4} << 32 | kMode << 62;
  }
};

// Rows of a cache; two elements of float8 count as one of 16 bits.
template <class Cache, int kHeadDim>
using CacheTile = SwizzledTile<kHeadDim* static_cast<int>(sizeof(Cache)) / 2>;

// What a tensor map describes: five dimensions, the first contiguous, strides in bytes.
struct BoxedTensor {
  const void* base;
  uint64_t size[5];
  uint64_t stride[4];  // of dimensions 1 .. 4
  uint32_t box[5];
};

// A matrix of 16-bit elements in boxes of so many rows by the columns of a tile. The stride is in
// elements.
template <class Tile>
BoxedTensor matrix_boxes(const void* base, int64_t stride, int64_t rows, int64_t columns,
                         int box_rows) {
  const auto row_bytes = static_cast<uint64_t>(2 * stride);
  const uint64_t bytes = row_bytes * static_cast<uint64_t>(rows);
  return {base,
          {static_cast<uint64_t>(columns), static_cast<uint64_t>(rows), 1, 1, 1},
          {row_bytes, bytes, bytes, bytes},
          {Tile::kBlockColumns, static_cast<uint32_t>(box_rows), 1, 1, 1}};
}

}  // namespace nano_vllm::cuda
