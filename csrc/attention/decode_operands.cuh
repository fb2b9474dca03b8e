// The matrix products of decode attention on sm_90, a warp's 16 tokens at a time.
//
// A block of a KV head's tokens lies contiguous in the cache, so it arrives in shared memory as it
// is, row after row without a swizzle. The products take their operands from there by 16-byte
// loads: the contraction of keys and queries may run over the head dimension in any order, and the
// columns of the values may stand in any order, so each lane takes eight neighbouring elements of a
// row at once.
#pragma once

#include "attention/online_softmax.cuh"

namespace nano_vllm::cuda::decode_sm90 {

// The tile's query rows as left operands. In step s of the head dimension, lane l has elements
// 32 s + 8 (l % 4) .. + 7 of rows l / 4 and l / 4 + 8; the last step may be half as long.
template <class T, int kHeadDim, int kTileRows>
struct QueryFragments {
  static constexpr int kSteps = kHeadDim / 32, kHalfStep = kHeadDim % 32 == 16;
  uint32_t upper[kSteps * 4 + kHalfStep * 2], lower[kTileRows > 8 ? kSteps * 4 + kHalfStep * 2 : 1];

  __device__ void load(const PagedAttentionParams& p, const SequenceRows& rows, int kv_head,
                       int first_row) {
    load_row(upper, p, rows, kv_head, first_row + threadIdx.x % kWarpSize / 4);
    if constexpr (kTileRows > 8) {
      load_row(lower, p, rows, kv_head, first_row + threadIdx.x % kWarpSize / 4 + 8);
    }
  }

  template <int kCount>
  __device__ static void load_row(uint32_t (&to)[kCount], const PagedAttentionParams& p,
                                  const SequenceRows& rows, int kv_head, int row) {
    const bool valid = row < rows.num_rows();
    const T* from =
        static_cast<const T*>(p.query) +
        rows.offset(valid ? row : 0, kv_head, p.query_stride_token, p.query_stride_head);
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const uint4 x = valid ? *reinterpret_cast<const uint4*>(from + 32 * s + 8 * t) : uint4{};
      to[4 * s] = x.x, to[4 * s + 1] = x.y, to[4 * s + 2] = x.z, to[4 * s + 3] = x.w;
    }
    if constexpr (kHalfStep) {
      const uint2 x = valid ? *reinterpret_cast<const uint2*>(from + 32 * kSteps + 4 * t) : uint2{};
      to[4 * kSteps] = x.x, to[4 * kSteps + 1] = x.y;
    }
  }

  // The left operand of product i, two for each step.
  __device__ void operand(int i, uint32_t (&a)[4]) const {
    a[0] = upper[2 * i], a[2] = upper[2 * i + 1];
    a[1] = kTileRows > 8 ? lower[2 * i] : 0, a[3] = kTileRows > 8 ? lower[2 * i + 1] : 0;
  }
};

// scores[j] = the query rows times keys 8 j .. 8 j + 7 of this warp's 16.
template <class T, int kHeadDim, int kTileRows>
__device__ inline void multiply_keys(float (&scores)[2][4],
                                     const QueryFragments<T, kHeadDim, kTileRows>& query,
                                     const T* keys) {
  using Query = QueryFragments<T, kHeadDim, kTileRows>;
  const int lane = threadIdx.x % kWarpSize;
  const T* row = keys + lane / 4 * kHeadDim;
  uint32_t a[4];
#pragma unroll
  for (int s = 0; s < Query::kSteps; ++s) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint4 x =
          *reinterpret_cast<const uint4*>(row + 8 * j * kHeadDim + 32 * s + 8 * (lane % 4));
      query.operand(2 * s, a);
      multiply_add<T>(scores[j], a, x.x, x.y);
      query.operand(2 * s + 1, a);
      multiply_add<T>(scores[j], a, x.z, x.w);
    }
  }
  if constexpr (Query::kHalfStep) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint2 x = *reinterpret_cast<const uint2*>(row + 8 * j * kHeadDim + 32 * Query::kSteps +
                                                      4 * (lane % 4));
      query.operand(2 * Query::kSteps, a);
      multiply_add<T>(scores[j], a, x.x, x.y);
    }
  }
}

// Columns of the values that a lane has: of each group of 8 kElements columns, lane l multiplies
// kElements neighbours, from kElements (l / 4) on; accumulator i of the group holds in column n the
// n-th lanes' i-th one.
template <int kHeadDim>
struct ValueColumns {
  static constexpr int kElements = kHeadDim % 64 == 0 ? 8 : kHeadDim % 32 == 0 ? 4 : 2;
  static constexpr int kGroups = kHeadDim / (8 * kElements);
};

template <int kCount>
__device__ inline void load_words(uint32_t (&words)[kCount], const void* from) {
  if constexpr (kCount == 4) {
    const uint4 x = *static_cast<const uint4*>(from);
    words[0] = x.x, words[1] = x.y, words[2] = x.z, words[3] = x.w;
  } else if constexpr (kCount == 2) {
    const uint2 x = *static_cast<const uint2*>(from);
    words[0] = x.x, words[1] = x.y;
  } else {
    words[0] = *static_cast<const uint32_t*>(from);
  }
}

// out += weights [16, 16] times this warp's 16 values. Of an operand pair, the halves are tokens
// 2 (l % 4) and the next; those that `keep` masks out count as zeros, whatever they hold.
template <class T, int kHeadDim, bool kMasked>
__device__ inline void multiply_values(float (&out)[kHeadDim / 8][4], const uint32_t (&weights)[4],
                                       const T* values, const uint32_t (&keep)[2]) {
  using Columns = ValueColumns<kHeadDim>;
  constexpr int kElements = Columns::kElements;
  const int lane = threadIdx.x % kWarpSize;
  const T* row = values + 2 * (lane % 4) * kHeadDim + lane / 4 * kElements;
#pragma unroll
  for (int group = 0; group < Columns::kGroups; ++group) {
    uint32_t b[2][kElements];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t even[kElements / 2], odd[kElements / 2];
      const T* from = row + 8 * half * kHeadDim + group * 8 * kElements;
      load_words(even, from);
      load_words(odd, from + kHeadDim);
#pragma unroll
      for (int i = 0; i < kElements / 2; ++i) {
        b[half][2 * i] = __byte_perm(even[i], odd[i], 0x5410);
        b[half][2 * i + 1] = __byte_perm(even[i], odd[i], 0x7632);
        if (kMasked) b[half][2 * i] &= keep[half], b[half][2 * i + 1] &= keep[half];
      }
    }
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      multiply_add<T>(out[group * kElements + i], weights, b[0][i], b[1][i]);
    }
  }
}

}  // namespace nano_vllm::cuda::decode_sm90
