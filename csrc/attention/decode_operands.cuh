// The matrix products of decode attention on sm_90, a warp's 16 tokens at a time.
//
// They are transposed: tokens, and then columns of the values, are the 16 rows of a product, and
// queries its 8 columns. A group has few heads; as rows of a product half of them would be empty.
#pragma once

#include "attention/online_softmax.cuh"
#include "common/swizzled_tile.cuh"

namespace nano_vllm::cuda::decode_sm90 {

// The tile's query rows as right operands, 8 in each. They come from shared memory, where rows are
// padded to stand in different banks.
template <class T, int kHeadDim, int kTileRows>
struct QueryFragments {
  static constexpr int kSteps = kHeadDim / 16, kCount = kTileRows / 8;
  static constexpr int kRowBytes = 2 * kHeadDim, kRowStride = kRowBytes + 16;
  uint32_t b[kSteps][kCount][2];

  // Rows at or past num_rows count as zeros. Returns what Barrier::arrive_behind asks for, as the
  // products below do.
  __device__ uint32_t load(const unsigned char* rows, int num_rows) {
    const int lane = threadIdx.x % kWarpSize;
    uint32_t loaded = 0;
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const int row = 8 * n + lane / 4;
      const unsigned char* from = rows + row * kRowStride + 4 * (lane % 4);
#pragma unroll
      for (int i = 0; i < 2 * kSteps; ++i) {
        b[i / 2][n][i % 2] = row < num_rows ? *reinterpret_cast<const uint32_t*>(from + 16 * i) : 0;
        loaded |= b[i / 2][n][i % 2];
      }
    }
    return loaded;
  }
};

// scores[n] = keys first_row .. + 15 of the tile times query rows 8 n .. + 7.
template <class T, int kHeadDim, int kTileRows>
__device__ inline uint32_t multiply_keys(float (&scores)[kTileRows / 8][4],
                                         const QueryFragments<T, kHeadDim, kTileRows>& query,
                                         const unsigned char* keys, int first_row) {
  using Query = QueryFragments<T, kHeadDim, kTileRows>;
  using Tile = SwizzledTile<kHeadDim>;
  const int lane = threadIdx.x % kWarpSize, row = first_row + lane % 16;
  const uint32_t chunk_bit = lane / 16 * 16;  // chunks 2 s and 2 s + 1 differ in one address bit
  float odd[Query::kCount][4] = {};           // two sums, as each product waits for the one before
  uint32_t loaded = 0;
#pragma unroll
  for (int n = 0; n < Query::kCount; ++n) {
#pragma unroll
    for (float& score : scores[n]) score = 0;
  }
#pragma unroll
  for (int s = 0; s < Query::kSteps; ++s) {
    uint32_t a[4];
    load_matrices(a, keys + (Tile::offset(row, 2 * s) ^ chunk_bit));
    loaded |= a[0];
#pragma unroll
    for (int n = 0; n < Query::kCount; ++n) {
      multiply_add<T>(s % 2 ? odd[n] : scores[n], a, query.b[s][n][0], query.b[s][n][1]);
    }
  }
#pragma unroll
  for (int n = 0; n < Query::kCount; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[n][i] += odd[n][i];
  }
  return loaded;
}

// The online softmax of a lane's two queries in each eight, 2 (l % 4) and the next. Its maximum
// follows the scores once they exceed it by more than kSlack: weights grow to 2^kSlack, which float
// and the 16-bit types hold as exactly as 1, and outputs are rarely rescaled.
template <int kCount>
struct QueryStates {
  static constexpr float kSlack = 8;
  float max[kCount][2], sum[kCount][2];  // sums of this lane's tokens alone, until finish()

  __device__ QueryStates() {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      max[n][0] = max[n][1] = -kInfinity;
      sum[n][0] = sum[n][1] = 0;
    }
  }

  // Over the eight lanes that have the other tokens of a query.
  template <class Combine>
  __device__ static float reduce(float x, const Combine& combine) {
#pragma unroll
    for (int lanes = 4; lanes < kWarpSize; lanes *= 2) {
      x = combine(x, __shfl_xor_sync(~0u, x, lanes));
    }
    return x;
  }

  // Turns the scores of 16 further tokens into weights. If it returns true, what was weighted
  // before is to be multiplied by rescale.
  __device__ bool update(float (&scores)[kCount][4], float (&rescale)[kCount][2]) {
    bool exceeds = false;
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        exceeds |= scores[n][i] > max[n][i % 2] + kSlack;
      }
    }
    const bool rescales = __any_sync(~0u, exceeds);
    if (rescales) {
#pragma unroll
      for (int n = 0; n < kCount; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float highest = reduce(fmaxf(scores[n][j], scores[n][2 + j]),
                                       [](float a, float b) { return fmaxf(a, b); });
          rescale[n][j] = 1;
          if (highest > max[n][j] + kSlack) {
            rescale[n][j] = exp2_approx(max[n][j] - highest);
            max[n][j] = highest;
            sum[n][j] *= rescale[n][j];
          }
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float shift = max[n][i % 2] == -kInfinity ? 0 : max[n][i % 2];
        scores[n][i] = exp2_approx(scores[n][i] - shift);
        sum[n][i % 2] += scores[n][i];
      }
    }
    return rescales;
  }

  // Adds up the lanes' sums.
  __device__ void finish() {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        sum[n][j] = reduce(sum[n][j], [](float a, float b) { return a + b; });
      }
    }
  }
};

// out += values first_row .. + 15 of the tile, transposed, times the weights. Of an operand pair
// the halves are tokens 2 (l % 4) and the next; those that `keep` masks out count as zeros,
// whatever they hold.
template <class T, int kHeadDim, int kCount, bool kMasked>
__device__ inline uint32_t multiply_values(float (&out)[kHeadDim / 16][kCount][4],
                                           const uint32_t (&weights)[kCount][2],
                                           const unsigned char* values, int first_row,
                                           const uint32_t (&keep)[2]) {
  using Tile = SwizzledTile<kHeadDim>;
  const int lane = threadIdx.x % kWarpSize, row = first_row + lane / 16 * 8 + lane % 8;
  const uint32_t chunk_bit = lane / 8 % 2 * 16;
  uint32_t loaded = 0;
#pragma unroll
  for (int i = 0; i < kHeadDim / 16; ++i) {
    uint32_t a[4];
    load_matrices_transposed(a, values + (Tile::offset(row, 2 * i) ^ chunk_bit));
    loaded |= a[0];
    if (kMasked) a[0] &= keep[0], a[1] &= keep[0], a[2] &= keep[1], a[3] &= keep[1];
#pragma unroll
    for (int n = 0; n < kCount; ++n) multiply_add<T>(out[i][n], a, weights[n][0], weights[n][1]);
  }
  return loaded;
}

}  // namespace nano_vllm::cuda::decode_sm90
