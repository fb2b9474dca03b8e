// Prefill attention on tensor cores (FlashAttention-2, arXiv 2307.08691), chunked prefill included.
#include "attention/attention_kernels.cuh"
#include "attention/online_softmax.cuh"

namespace nano_vllm::cuda {
namespace {

constexpr int kNumWarps = 4;
constexpr int kNumThreads = kNumWarps * kWarpSize;
constexpr int kTileTokens = 64;

template <class T, int kHeadDim>
struct PrefillShape {
  using Layout = Swizzled<T, kHeadDim>;
  // Tiles of 16 rows a warp: two share each fragment of keys and values, where registers allow.
  static constexpr int kWarpTiles = kHeadDim <= 128 ? 2 : 1;
  static constexpr int kWarpRows = 16 * kWarpTiles;
  static constexpr int kTileRows = kNumWarps * kWarpRows;
  static constexpr int kQuerySize = kTileRows * kHeadDim;
  static constexpr int kTileSize = kTileTokens * kHeadDim;
  static constexpr size_t kSharedBytes = sizeof(T) * (kQuerySize + 2 * kTileSize);
};

// Grid: row tiles (see PrefillTile) x KV heads. The rows of a block are query tokens times the
// query heads of the group, so all of a group share each tile of keys and values. Tiles of tokens
// start at multiples of kTileTokens from the sequence's beginning and are taken in order: a row's
// bits do not depend on the chunk it came in. While a block multiplies keys, its values are on the
// way, and the next keys while it multiplies values. The result goes to out.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kNumThreads)
    prefill_kernel(const __grid_constant__ AttentionLaunch p, Alignment alignment) {
  using Shape = PrefillShape<T, kHeadDim>;
  using Layout = typename Shape::Layout;
  constexpr int kWarpTiles = Shape::kWarpTiles, kDepthTiles = kHeadDim / 16;
  constexpr int kColumnTiles = kTileTokens / 8;
  unsigned char* const shared = dynamic_shared();

  // Blocks start in the order of their index: the last rows of a sequence see most and go first.
  const PrefillTile row_tile(p, int64_t{gridDim.x} - 1 - blockIdx.x, Shape::kTileRows);
  const SequenceRows rows(p, row_tile.seq);
  const int first_row = row_tile.first_row, num_rows = rows.num_rows(), kv_head = blockIdx.y;
  if (rows.query_len <= p.max_decode_queries || first_row < 0 || first_row >= num_rows) return;

  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  T* const query_tile = reinterpret_cast<T*>(shared);
  T* const key_tile = query_tile + Shape::kQuerySize;
  T* const value_tile = key_tile + Shape::kTileSize;
  const PagedRows<T> keys = PagedRows<T>::keys(p, row_tile.seq, kv_head, alignment.caches);
  const PagedRows<T> values = PagedRows<T>::values(p, row_tile.seq, kv_head, alignment.caches);

  // What all rows of the block, those of the warp, and each row of the lane see.
  const TokenRange visible =
      rows.visible(first_row, min(first_row + Shape::kTileRows, num_rows) - 1, p.sliding_window);
  const int warp_row = first_row + warp * Shape::kWarpRows;
  const bool warp_has_rows = warp_row < num_rows;
  const int warp_last_row = min(warp_row + Shape::kWarpRows, num_rows) - 1;
  const TokenRange warp_visible =
      warp_has_rows ? rows.visible(warp_row, warp_last_row, p.sliding_window) : TokenRange{0, 0};
  const TokenRange warp_seen_by_all =
      warp_has_rows ? TokenRange{rows.visible(warp_last_row, warp_last_row, p.sliding_window).begin,
                                 rows.position(warp_row) + 1}
                    : TokenRange{0, 0};
  TokenRange row_visible[kWarpTiles][2];
#pragma unroll
  for (int m = 0; m < kWarpTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = min(warp_row + 16 * m + 8 * half + lane / 4, num_rows - 1);
      row_visible[m][half] = rows.visible(row, row, p.sliding_window);
    }
  }

  load_query<Layout, Shape::kTileRows, kNumThreads>(query_tile, p, rows, kv_head, first_row,
                                                    alignment.query);
  const int first_token = visible.begin / kTileTokens * kTileTokens;
  load_tokens<Layout, kTileTokens, kNumThreads>(key_tile, keys, first_token, visible, threadIdx.x);
  commit_copies();

  // A fragment's rows and chunks, see ptx.cuh: as the left operand, or transposed as the right one,
  // the second matrix lies below the first; as the right operand from rows, beside it.
  const int row_below = lane % 16, chunk_below = lane / 16;
  const int row_beside = lane / 16 * 8 + lane % 8, chunk_beside = lane / 8 % 2;
  T* const warp_query = query_tile + warp * Shape::kWarpRows * kHeadDim;

  const ScoreTransform transform(p);
  RowStates states[kWarpTiles];
  float out[kWarpTiles][2 * kDepthTiles][4] = {};
#pragma unroll 1
  for (int token = first_token; token < visible.end; token += kTileTokens) {
    wait_copies<0>();
    __syncthreads();  // the keys are there, and no warp uses the values before them
    load_tokens<Layout, kTileTokens, kNumThreads>(value_tile, values, token, visible, threadIdx.x);
    commit_copies();

    const bool warp_sees = token < warp_visible.end && token + kTileTokens > warp_visible.begin;
    uint32_t weights[kWarpTiles][kTileTokens / 16][4];
    if (warp_sees) {
      float scores[kWarpTiles][kColumnTiles][4] = {};
#pragma unroll
      for (int depth = 0; depth < kDepthTiles; ++depth) {
        uint32_t query[kWarpTiles][4];
#pragma unroll
        for (int m = 0; m < kWarpTiles; ++m) {
          load_matrices(query[m],
                        warp_query + Layout::offset(16 * m + row_below, 2 * depth + chunk_below));
        }
#pragma unroll
        for (int column = 0; column < kColumnTiles; column += 2) {
          uint32_t key[4];
          load_matrices(
              key, key_tile + Layout::offset(8 * column + row_beside, 2 * depth + chunk_beside));
#pragma unroll
          for (int m = 0; m < kWarpTiles; ++m) {
            multiply_add<T>(scores[m][column], query[m], key[0], key[1]);
            multiply_add<T>(scores[m][column + 1], query[m], key[2], key[3]);
          }
        }
      }
      const bool is_masked =
          token < warp_seen_by_all.begin || token + kTileTokens > warp_seen_by_all.end;
#pragma unroll
      for (int m = 0; m < kWarpTiles; ++m) {
#pragma unroll
        for (int column = 0; column < kColumnTiles; ++column) {
          transform.apply(scores[m][column]);
        }
        if (is_masked) {
#pragma unroll
          for (int column = 0; column < kColumnTiles; ++column) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const int at = token + 8 * column + 2 * (lane % 4) + j % 2;
              const TokenRange seen = row_visible[m][j / 2];
              if (at < seen.begin || at >= seen.end) scores[m][column][j] = -kInfinity;
            }
          }
        }
        float rescale[2];
        states[m].update(scores[m], rescale);
        rescale_rows(out[m], rescale);
#pragma unroll
        for (int column = 0; column < kColumnTiles; column += 2) {
          pack_operand<T>(weights[m][column / 2], scores[m][column], scores[m][column + 1]);
        }
      }
    }

    wait_copies<0>();
    __syncthreads();  // the values are there, and no warp uses the keys any more
    if (token + kTileTokens < visible.end) {
      load_tokens<Layout, kTileTokens, kNumThreads>(key_tile, keys, token + kTileTokens, visible,
                                                    threadIdx.x);
    }
    commit_copies();
    if (warp_sees) {
#pragma unroll
      for (int i = 0; i < kTileTokens / 16; ++i) {
#pragma unroll
        for (int depth = 0; depth < kDepthTiles; ++depth) {
          uint32_t value[4];
          load_matrices_transposed(
              value, value_tile + Layout::offset(16 * i + row_below, 2 * depth + chunk_below));
#pragma unroll
          for (int m = 0; m < kWarpTiles; ++m) {
            multiply_add<T>(out[m][2 * depth], weights[m][i], value[0], value[1]);
            multiply_add<T>(out[m][2 * depth + 1], weights[m][i], value[2], value[3]);
          }
        }
      }
    }
  }

  // Through the warp's own query rows, which no other warp reads, to whole chunks of out.
#pragma unroll
  for (int m = 0; m < kWarpTiles; ++m) {
    states[m].finish();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = states[m].sum[half];
      const float inverse = sum == 0 ? 0 : 1 / sum;
#pragma unroll
      for (int i = 0; i < 2 * kDepthTiles; ++i) {
        T* const to = warp_query + Layout::offset(16 * m + 8 * half + lane / 4, i);
        *reinterpret_cast<uint32_t*>(to + 2 * (lane % 4)) =
            pack<T>(out[m][i][2 * half] * inverse, out[m][i][2 * half + 1] * inverse);
      }
    }
  }
  __syncwarp();
  for (int i = lane; i < Shape::kWarpRows * Layout::kChunks; i += kWarpSize) {
    const int row = i / Layout::kChunks, chunk = i % Layout::kChunks;
    if (warp_row + row >= num_rows) break;
    const Vec<T> vec = load_vec(warp_query + Layout::offset(row, chunk));
    T* const to = static_cast<T*>(p.out) + chunk * Layout::kChunkSize +
                  rows.offset(warp_row + row, kv_head, p.out_stride_token, p.out_stride_head);
    if (alignment.out) {
      store_vec(to, vec);
    } else {
      store_elements<false>(to, vec, Vec<T>::kSize);
    }
  }
}

}  // namespace

void launch_prefill(const AttentionLaunch& p, cudaStream_t stream) {
  dispatch_16_bit(p, [&](auto element, auto head_dim) {
    using T = decltype(element);
    constexpr int kHeadDim = head_dim;
    using Shape = PrefillShape<T, kHeadDim>;
    const int64_t tiles = PrefillTile::max_tiles(p, Shape::kTileRows);
    const dim3 grid(grid_x("paged_attention prefill", tiles), p.num_kv_heads);
    launch_kernel("paged_attention prefill", prefill_kernel<T, kHeadDim>, grid, kNumThreads,
                  Shape::kSharedBytes, stream, p, alignment_of<T>(p));
  });
}

}  // namespace nano_vllm::cuda
