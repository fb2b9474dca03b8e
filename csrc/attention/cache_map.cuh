// The paged cache as tensors for the copy engine: a box is some tokens of one block and one head,
// and lands in shared memory as rows of a SwizzledTile.
#pragma once

#include <numeric>

#include "attention/attention_kernels.cuh"
#include "common/hopper.cuh"

namespace nano_vllm::cuda {

// Coordinates: column, row of 8, column block, group of 8 rows in the block, and block * block_step
// + head * head_step. Blocks and heads share a coordinate because there are no more than five; its
// stride is the greatest that leads to all of them.
struct CacheMap {
  CUtensorMap map;
  int block_step, head_step;
};

// One of the two caches.
struct CacheLayout {
  const void* cache;
  int64_t stride_block, stride_token, stride_head, row_bytes;  // in bytes
  int num_kv_heads;

  static CacheLayout keys(const AttentionLaunch& p) {
    const int64_t element = static_cast<int64_t>(size_of(p.cache_dtype));
    return {p.key_cache,
            p.key_stride_block * element,
            p.key_stride_token * element,
            p.key_stride_head * element,
            p.head_dim * element,
            p.num_kv_heads};
  }
  static CacheLayout values(const AttentionLaunch& p) {
    const int64_t element = static_cast<int64_t>(size_of(p.cache_dtype));
    return {p.value_cache,
            p.value_stride_block * element,
            p.value_stride_token * element,
            p.value_stride_head * element,
            p.head_dim * element,
            p.num_kv_heads};
  }

  int64_t step() const {
    return num_kv_heads == 1 ? stride_block : std::gcd(stride_block, stride_head);
  }

  // The copy engine wants multiples of 16 bytes. Steps of at least a row keep the coordinates of
  // any memory there is below 2^31.
  bool can_map() const {
    return reinterpret_cast<uintptr_t>(cache) % 16 == 0 && stride_token > 0 &&
           stride_token % 16 == 0 && step() % 16 == 0 && step() >= row_bytes;
  }

  // Blocks are not counted: their numbers come from block_tables, and -1 is outside in any case.
  template <class Tile>
  CacheMap map(int block_size, int box_tokens) const {
    const BoxedTensor tensor = {
        cache,
        {Tile::kBlockColumns, 8, Tile::kColumnBlocks, static_cast<uint64_t>(block_size / 8),
         uint64_t{1} << 31},
        {static_cast<uint64_t>(stride_token), Tile::kRowBytes,
         8 * static_cast<uint64_t>(stride_token), static_cast<uint64_t>(step())},
        {Tile::kBlockColumns, 8, Tile::kColumnBlocks, static_cast<uint32_t>(box_tokens / 8), 1}};
    return {make_tensor_map(tensor, Tile::kSwizzle), static_cast<int>(stride_block / step()),
            num_kv_heads == 1 ? 0 : static_cast<int>(stride_head / step())};
  }
};

}  // namespace nano_vllm::cuda
