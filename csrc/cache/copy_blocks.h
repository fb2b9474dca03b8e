// Copies whole KV blocks, in every layer, keys and values, in one launch: within a pool for
// copy-on-write (copy_blocks) and between a GPU pool and one in pinned host memory (swap_blocks).
#pragma once

#include <cstdint>

#include "common/stream.h"

namespace nano_vllm {

// A plane is the keys or the values of one layer. Within a plane a block is block_bytes contiguous
// bytes, a multiple of 16. The pairs are written concurrently: no block may be both a source and a
// destination, or a destination twice.
struct CopyBlocksParams {
  const void* src;                             // [num_planes, src blocks, block_bytes]
  void* dst;                                   // [num_planes, dst blocks, block_bytes]; may be src
  const int64_t* block_mapping;                // [num_pairs, 2]: source block, destination block
  int64_t src_stride_plane, src_stride_block;  // bytes
  int64_t dst_stride_plane, dst_stride_block;  // bytes
  int64_t block_bytes;
  int32_t num_planes, num_pairs;
};

namespace cpu {
void copy_blocks(const CopyBlocksParams& params);
}
namespace cuda {
// src and dst are addresses the device can read and write: device memory or pinned host memory.
void copy_blocks(const CopyBlocksParams& params, cudaStream_t stream);
}  // namespace cuda

}  // namespace nano_vllm
