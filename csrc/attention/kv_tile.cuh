// Tiles of query, key and value rows in shared memory, and how they get there from the paged cache.
#pragma once

#include "attention/float8.cuh"
#include "attention/sequence_rows.cuh"
#include "common/ptx.cuh"

namespace nano_vllm::cuda {

// Whether 16-byte vectors, or what becomes one, may be moved; decided by addresses and strides, on
// the host.
struct Alignment {
  bool query, caches, out;
};

template <class T>
Alignment alignment_of(const PagedAttentionParams& p) {
  const size_t chunk_bytes = Vec<T>::kSize * size_of(p.cache_dtype);
  return {is_vec_aligned<T>(p.query, p.query_stride_token, p.query_stride_head),
          reinterpret_cast<uintptr_t>(p.key_cache) % chunk_bytes == 0 &&
              reinterpret_cast<uintptr_t>(p.value_cache) % chunk_bytes == 0 &&
              is_vec_aligned<T>(nullptr, p.key_stride_block, p.key_stride_token, p.key_stride_head,
                                p.value_stride_block, p.value_stride_token, p.value_stride_head),
          is_vec_aligned<T>(p.out, p.out_stride_token, p.out_stride_head)};
}

// Rows of kHeadDim elements end to end, in chunks of 16 bytes.
template <class T, int kHeadDim>
struct RowMajor {
  static constexpr int kChunkSize = Vec<T>::kSize;
  static constexpr int kChunks = kHeadDim / kChunkSize;

  // In elements.
  __device__ static int offset(int row, int chunk) { return row * kHeadDim + chunk * kChunkSize; }
};

// The same with the chunks of a row exchanged so that a chunk of eight rows, what a phase of
// ldmatrix or of a 16-byte load reads, touches all 32 banks once. Where a row is not a multiple of
// 128 bytes, 8 / kKeys rows fall on different banks by themselves and share a key.
template <class T, int kHeadDim>
struct Swizzled : RowMajor<T, kHeadDim> {
  using Base = RowMajor<T, kHeadDim>;
  static constexpr int kKeys = Base::kChunks % 8 == 0 ? 8 : Base::kChunks % 4 == 0 ? 4 : 2;
  static_assert(Base::kChunks % 2 == 0);

  __device__ static int offset(int row, int chunk) {
    return Base::offset(row, chunk ^ (row / (8 / kKeys) % kKeys));
  }
};

// One chunk to shared memory, zeros if not valid. Without alignment it is there at once, with it
// after wait_copies; either way for other threads after a barrier.
template <bool kIsAligned, class T>
__device__ inline void copy_chunk(T* to, const T* from, bool valid) {
  if constexpr (kIsAligned) {
    copy_async(to, from, valid);
  } else {
    store_vec(to, load_elements<false>(from, valid ? Vec<T>::kSize : 0));
  }
}

// Rows first_row .. first_row + kRows - 1 of a sequence's query; zeros past its last.
template <class Layout, int kRows, int kNumThreads, bool kIsAligned, class T>
__device__ inline void load_query(T* tile, const PagedAttentionParams& p, const SequenceRows& rows,
                                  int kv_head, int first_row) {
  for (int i = threadIdx.x; i < kRows * Layout::kChunks; i += kNumThreads) {
    const int row = i / Layout::kChunks, chunk = i % Layout::kChunks;
    const bool valid = first_row + row < rows.num_rows();
    const int64_t offset = rows.offset(valid ? first_row + row : 0, kv_head, p.query_stride_token,
                                       p.query_stride_head);
    copy_chunk<kIsAligned>(tile + Layout::offset(row, chunk),
                           static_cast<const T*>(p.query) + offset + chunk * Layout::kChunkSize,
                           valid);
  }
}

template <class Layout, int kRows, int kNumThreads, class T>
__device__ inline void load_query(T* tile, const PagedAttentionParams& p, const SequenceRows& rows,
                                  int kv_head, int first_row, bool is_aligned) {
  if (is_aligned) {
    load_query<Layout, kRows, kNumThreads, true>(tile, p, rows, kv_head, first_row);
  } else {
    load_query<Layout, kRows, kNumThreads, false>(tile, p, rows, kv_head, first_row);
  }
}

// Where a sequence's tokens lie in the key or the value cache, for one KV head.
template <class Cache>
struct PagedRows {
  const Cache* cache;  // block 0, row 0 of the head
  int64_t stride_block, stride_token;
  const int32_t* block_table;
  int block_size;
  bool is_aligned;

  __device__ static PagedRows keys(const PagedAttentionParams& p, int seq, int kv_head,
                                   bool is_aligned) {
    return {static_cast<const Cache*>(p.key_cache) + kv_head * p.key_stride_head,
            p.key_stride_block,
            p.key_stride_token,
            p.block_tables + seq * p.block_tables_stride,
            p.block_size,
            is_aligned};
  }

  __device__ static PagedRows values(const PagedAttentionParams& p, int seq, int kv_head,
                                     bool is_aligned) {
    return {static_cast<const Cache*>(p.value_cache) + kv_head * p.value_stride_head,
            p.value_stride_block,
            p.value_stride_token,
            p.block_tables + seq * p.block_tables_stride,
            p.block_size,
            is_aligned};
  }
};

// Tokens that surely lie in one block, if the first is a multiple: block_size is one too.
constexpr int kRunTokens = 8;

template <class Layout, int kTokens, int kNumThreads, bool kIsAligned, class T, class Cache>
__device__ inline void load_tokens(T* tile, const PagedRows<Cache>& rows, int first_token,
                                   TokenRange valid, int thread) {
  constexpr int kNumRuns = kTokens / kRunTokens;
  constexpr int kNumCopies = kTokens * Layout::kChunks / kNumThreads;
  static_assert(kNumRuns <= kWarpSize && kTokens * Layout::kChunks % kNumThreads == 0);

  // Lane l of each warp looks up run l; a run without a valid token has no block to speak of.
  const int lane = threadIdx.x % kWarpSize;
  const int run_token = first_token + lane * kRunTokens;
  int64_t run_offset = 0;
  if (lane < kNumRuns && run_token < valid.end && run_token + kRunTokens > valid.begin) {
    const int index = run_token / rows.block_size;
    run_offset = rows.block_table[index] * rows.stride_block +
                 (run_token - index * rows.block_size) * rows.stride_token;
  }
  constexpr int kAtOnce = 4;  // chunks of float8 under way before the first is waited for
  [[maybe_unused]] Float8Chunk<T> float8[kAtOnce];
#pragma unroll(kIsAligned ? kNumCopies : 1)
  for (int i = 0; i < kNumCopies; ++i) {
    const int row = (i * kNumThreads + thread) / Layout::kChunks;
    const int chunk = (i * kNumThreads + thread) % Layout::kChunks;
    const Cache* from = rows.cache + __shfl_sync(~0u, run_offset, row / kRunTokens) +
                        row % kRunTokens * rows.stride_token + chunk * Layout::kChunkSize;
    const int token = first_token + row;
    const bool is_valid = token >= valid.begin && token < valid.end;
    if constexpr (!kIsFloat8<Cache>) {
      copy_chunk<kIsAligned>(tile + Layout::offset(row, chunk), from, is_valid);
    } else if constexpr (kIsAligned) {
      float8[i % kAtOnce] = Float8Chunk<T>::load_aligned(from, is_valid);
      if ((i + 1) % kAtOnce != 0 && i + 1 != kNumCopies) continue;
#pragma unroll
      for (int j = i / kAtOnce * kAtOnce; j <= i; ++j) {
        const int loaded = j * kNumThreads + thread;
        store_vec(tile + Layout::offset(loaded / Layout::kChunks, loaded % Layout::kChunks),
                  float8[j % kAtOnce].widened());
      }
    } else {
      store_vec(tile + Layout::offset(row, chunk),
                Float8Chunk<T>::load_elements(from, is_valid).widened());
    }
  }
}

// Tokens first_token .. first_token + kTokens - 1 (first_token a multiple of kRunTokens), copied by
// kNumThreads threads in whole warps. Those that are not valid become zeros, read from nowhere:
// what lies there may be NaN, and a weight of zero would not stop it.
template <class Layout, int kTokens, int kNumThreads, class T, class Cache>
__device__ inline void load_tokens(T* tile, const PagedRows<Cache>& rows, int first_token,
                                   TokenRange valid, int thread) {
  if (rows.is_aligned) {
    load_tokens<Layout, kTokens, kNumThreads, true>(tile, rows, first_token, valid, thread);
  } else {
    load_tokens<Layout, kTokens, kNumThreads, false>(tile, rows, first_token, valid, thread);
  }
}

}  // namespace nano_vllm::cuda
