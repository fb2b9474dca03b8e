// The matrix products of decode_operands.cuh over a float8 cache. They are of float16, which holds
// every number of float8 exactly: one instruction widens two of them.
//
// ldmatrix moves 16-bit units, here two elements each. So a lane has four neighbouring columns of a
// key where it would have two, and the sum over columns is taken in that order; and of the values
// it has two neighbouring columns, which become rows l / 4 and l / 4 + 8 of the product.
#pragma once

#include "attention/decode_operands.cuh"
#include "attention/float8.cuh"

namespace nano_vllm::cuda::decode_sm90 {

// QueryFragments for keys of float8.
template <class T, int kHeadDim, int kTileRows>
struct Float8QueryFragments {
  using Base = QueryFragments<T, kHeadDim, kTileRows>;
  static constexpr int kSteps = Base::kSteps, kCount = Base::kCount;
  static constexpr int kRowBytes = Base::kRowBytes, kRowStride = Base::kRowStride;
  uint32_t b[kSteps][kCount][2];
  float scale[kCount][2];  // what the lane's score columns are to be multiplied by

  // Rows at or past num_rows count as zeros.
  __device__ uint32_t load(const unsigned char* rows, int num_rows) {
    const int lane = threadIdx.x % kWarpSize;
    uint32_t loaded = 0;
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const int row = 8 * n + lane / 4;
      const unsigned char* from = rows + row * kRowStride + 8 * (lane % 4);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const uint2 four =
            row < num_rows ? *reinterpret_cast<const uint2*>(from + 32 * s) : uint2{};
        b[s][n][0] = four.x, b[s][n][1] = four.y;
        loaded |= four.x;
      }
      scale[n][0] = scale[n][1] = 1;
      if constexpr (!std::is_same_v<T, __half>) to_half(n);
    }
    return loaded;
  }

  __device__ void scale_keys(float key_scale) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) scale[n][0] *= key_scale, scale[n][1] *= key_scale;
  }

 private:
  __device__ static float2 floats_of(uint32_t pair) {
    const __nv_bfloat162 x = reinterpret_cast<const __nv_bfloat162&>(pair);
    return make_float2(__bfloat162float(x.x), __bfloat162float(x.y));
  }

  // bfloat16 has the wider range: each row is multiplied by the power of two that takes its largest
  // element to [2^14, 2^15). What is too small to be exact then is nothing beside that one.
  __device__ void to_half(int n) {
    float largest = 0;
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i) {
      const float2 x = floats_of(b[i / 2][n][i % 2]);
      largest = fmaxf(largest, fmaxf(fabsf(x.x), fabsf(x.y)));
    }
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    const int exponent = static_cast<int>(__float_as_uint(largest) >> 23) - 127;
    const int shift = 14 - min(max(exponent, -100), 127);
    const auto power_of_two = [](int x) {
      return __uint_as_float(static_cast<uint32_t>(127 + x) << 23);
    };
    const float factor = power_of_two(shift);
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i) {
      const float2 x = floats_of(b[i / 2][n][i % 2]);
      b[i / 2][n][i % 2] = pack<__half>(x.x * factor, x.y * factor);
    }
    const float inverse = power_of_two(-shift);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int query = 2 * (threadIdx.x % 4) + j;
      scale[n][j] = __shfl_sync(~0u, inverse, 4 * query);
    }
  }
};

// Loads 16 rows of two chunks, 16 elements each, even_chunk and the next, and gives run the first
// and last eight rows of each chunk there is, as ldmatrix has them: transposed or not. Returns what
// Barrier::arrive_behind asks for.
template <int kHeadDim, bool kTransposed, class Run>
__device__ inline uint32_t for_each_float8_chunk(const unsigned char* tile, int first_row,
                                                 const Run& run) {
  using Tile = CacheTile<Float8E4M3, kHeadDim>;
  const int lane = threadIdx.x % kWarpSize, row = first_row + lane % 16;
  uint32_t loaded = 0;
#pragma unroll
  for (int chunk = 0; chunk < Tile::kChunks; chunk += 2) {
    uint32_t rows[4];
    const unsigned char* const from = tile + Tile::offset(row, chunk, lane / 16);
    kTransposed ? load_matrices_transposed(rows, from) : load_matrices(rows, from);
    loaded |= rows[0];
    run(chunk, rows[0], rows[1]);
    if (chunk + 1 < Tile::kChunks) run(chunk + 1, rows[2], rows[3]);
  }
  return loaded;
}

// scores[n] = keys first_row .. + 15 of the tile times query rows 8 n .. + 7.
template <class T, int kHeadDim, int kTileRows>
__device__ inline uint32_t multiply_keys(float (&scores)[kTileRows / 8][4],
                                         const Float8QueryFragments<T, kHeadDim, kTileRows>& query,
                                         const unsigned char* keys, int first_row) {
  using Query = Float8QueryFragments<T, kHeadDim, kTileRows>;
  float sums[2][Query::kCount][4] = {};  // two, as each product waits for the one before
  const auto multiply = [&](int s, uint32_t low, uint32_t high) {
    uint32_t of_low[2], of_high[2];
    widen_to_half(of_low, low);
    widen_to_half(of_high, high);
    const uint32_t a[4] = {of_low[0], of_high[0], of_low[1], of_high[1]};
#pragma unroll
    for (int n = 0; n < Query::kCount; ++n) {
      multiply_add<__half>(sums[s % 2][n], a, query.b[s][n][0], query.b[s][n][1]);
    }
  };
  const uint32_t loaded = for_each_float8_chunk<kHeadDim, false>(keys, first_row, multiply);
#pragma unroll
  for (int n = 0; n < Query::kCount; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[n][i] = (sums[0][n][i] + sums[1][n][i]) * query.scale[n][i % 2];
    }
  }
  return loaded;
}

// out += values first_row .. + 15 of the tile, transposed, times the weights of float16. Rows g and
// g + 8 of out[i] are columns 16 i + 2 g and the next. `keep` as in multiply_values.
template <class T, class Cache, int kHeadDim, int kCount, bool kMasked,
          std::enable_if_t<kIsFloat8<Cache>, int> = 0>
__device__ inline uint32_t multiply_values(float (&out)[kHeadDim / 16][kCount][4],
                                           const uint32_t (&weights)[kCount][2],
                                           const unsigned char* values, int first_row,
                                           const uint32_t (&keep)[2]) {
  const auto multiply = [&](int i, uint32_t low, uint32_t high) {
    // Of two tokens the same column side by side.
    uint32_t of_low[2], of_high[2];
    widen_to_half(of_low, __byte_perm(low, 0, 0x3120));
    widen_to_half(of_high, __byte_perm(high, 0, 0x3120));
    uint32_t a[4] = {of_low[0], of_low[1], of_high[0], of_high[1]};
    if (kMasked) a[0] &= keep[0], a[1] &= keep[0], a[2] &= keep[1], a[3] &= keep[1];
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      multiply_add<__half>(out[i][n], a, weights[n][0], weights[n][1]);
    }
  };
  return for_each_float8_chunk<kHeadDim, true>(values, first_row, multiply);
}

template <class T, class Cache, int kHeadDim, int kCount, bool kMasked,
          std::enable_if_t<!kIsFloat8<Cache>, int> = 0>
__device__ inline uint32_t multiply_values(float (&out)[kHeadDim / 16][kCount][4],
                                           const uint32_t (&weights)[kCount][2],
                                           const unsigned char* values, int first_row,
                                           const uint32_t (&keep)[2]) {
  return multiply_values<T, kHeadDim, kCount, kMasked>(out, weights, values, first_row, keep);
}

}  // namespace nano_vllm::cuda::decode_sm90
