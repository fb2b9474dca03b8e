// float32 attention, decode and prefill, without tensor cores: their tf32 has the precision of
// float16.
#include "attention/attention_kernels.cuh"
#include "attention/online_softmax.cuh"

namespace nano_vllm::cuda {
namespace {

constexpr int kNumWarps = 4;
constexpr int kNumThreads = kNumWarps * kWarpSize;
constexpr int kTileTokens = kWarpSize;  // scores: one token a lane

template <int kHeadDim, int kTileRows>
struct Fp32Shape {
  // Scores read four elements of a key a lane, outputs one element of all columns of a value.
  using KeyLayout = Swizzled<float, kHeadDim>;
  using ValueLayout = RowMajor<float, kHeadDim>;
  using QueryLayout = RowMajor<float, kHeadDim>;
  static constexpr int kTileSize = kTileTokens * kHeadDim;
  static constexpr size_t kSharedBytes =
      sizeof(float) * (kTileRows * (kHeadDim + kTileTokens) + 2 * kTileSize);
};

struct Softcap {
  float cap;  // 0 = off
  __device__ float operator()(float score) const {
    return cap > 0 ? cap * tanhf(score / cap) : score;
  }
};

// Attends rows first_row .. first_row + kTileRows - 1 over the tokens. Warp w has rows w,
// w + kNumWarps, ... to itself; a lane has one token's scores and every 32nd column of the outputs.
// The result goes to out, or to the workspace if it is one of several splits.
template <class Cache, int kHeadDim, int kTileRows>
__device__ void attend(const PagedAttentionParams& p, const Alignment& alignment,
                       const SequenceRows& rows, int seq, int kv_head, int first_row,
                       TokenRange visible, TokenRange tokens, int split, int num_splits) {
  using Shape = Fp32Shape<kHeadDim, kTileRows>;
  constexpr int kWarpRows = kTileRows / kNumWarps;
  constexpr int kColumns = ceil_div(kHeadDim, kWarpSize);
  unsigned char* const shared = dynamic_shared();
  float* const query_tile = reinterpret_cast<float*>(shared);
  float* const key_tile = query_tile + kTileRows * kHeadDim;
  float* const value_tile = key_tile + Shape::kTileSize;

  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  float* const weights = value_tile + Shape::kTileSize + warp * kWarpRows * kTileTokens;
  const auto row_of = [&](int r) { return first_row + r * kNumWarps + warp; };
  const auto is_column = [&](int c) {
    return kHeadDim % kWarpSize == 0 || c * kWarpSize + lane < kHeadDim;
  };
  const auto keys = PagedRows<Cache>::keys(p, seq, kv_head, alignment.caches);
  const auto values = PagedRows<Cache>::values(p, seq, kv_head, alignment.caches);
  load_query<typename Shape::QueryLayout, kTileRows, kNumThreads>(query_tile, p, rows, kv_head,
                                                                  first_row, alignment.query);

  float max[kWarpRows], sum[kWarpRows] = {}, out[kWarpRows][kColumns] = {};
  TokenRange seen[kWarpRows];
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    const int row = min(row_of(r), rows.num_rows() - 1);
    max[r] = -kInfinity;
    seen[r] = rows.visible(row, row, p.sliding_window);
  }

  const TokenRange valid{visible.begin, tokens.end};
  const Softcap softcap{p.softcap};
  const float scale = p.scale * scale_of_head<Cache>(p.key_scale, kv_head);
#pragma unroll 1
  for (int token = tokens.begin; token < tokens.end; token += kTileTokens) {
    __syncthreads();  // no warp uses the tiles before any more
    load_tokens<typename Shape::KeyLayout, kTileTokens, kNumThreads>(key_tile, keys, token, valid,
                                                                     threadIdx.x);
    commit_copies();
    load_tokens<typename Shape::ValueLayout, kTileTokens, kNumThreads>(value_tile, values, token,
                                                                       valid, threadIdx.x);
    commit_copies();
    wait_copies<1>();
    __syncthreads();

    float scores[kWarpRows] = {};
#pragma unroll 4
    for (int chunk = 0; chunk < Shape::KeyLayout::kChunks; ++chunk) {
      const Vec<float> key = load_vec(key_tile + Shape::KeyLayout::offset(lane, chunk));
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) {
        const Vec<float> query =
            load_vec(query_tile + Shape::QueryLayout::offset(r * kNumWarps + warp, chunk));
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[r] += query.value[i] * key.value[i];
      }
    }
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const bool is_seen = token + lane >= seen[r].begin && token + lane < seen[r].end;
      const float score = is_seen ? softcap(scores[r] * scale) * kLog2E : -kInfinity;
      const float new_max = fmaxf(max[r], warp_max(score));
      const float shift = new_max == -kInfinity ? 0 : new_max;
      const float rescale = exp2f(max[r] - shift), weight = exp2f(score - shift);
      max[r] = new_max;
      sum[r] = sum[r] * rescale + weight;
      weights[r * kTileTokens + lane] = weight;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) out[r][c] *= rescale;
    }
    wait_copies<0>();
    __syncthreads();

#pragma unroll 2
    for (int i = 0; i < kTileTokens; i += 4) {
      Vec<float> weight[kWarpRows];
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) weight[r] = load_vec(weights + r * kTileTokens + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int column = c * kWarpSize + lane;
          const float value = is_column(c) ? value_tile[(i + j) * kHeadDim + column] : 0.0f;
#pragma unroll
          for (int r = 0; r < kWarpRows; ++r) out[r][c] += weight[r].value[j] * value;
        }
      }
    }
  }

  const float value_scale = scale_of_head<Cache>(p.value_scale, kv_head);
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    const float row_sum = warp_sum(sum[r]);
    const int row = row_of(r);
    if (row >= rows.num_rows()) continue;
    const PartialRow partial(p, seq, kv_head * rows.group + row % rows.group, split);
    float* const to = num_splits > 1
                          ? partial.out
                          : static_cast<float*>(p.out) +
                                rows.offset(row, kv_head, p.out_stride_token, p.out_stride_head);
    const float factor = value_scale * (num_splits > 1 ? 1 : row_sum == 0 ? 0 : 1 / row_sum);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (is_column(c)) to[c * kWarpSize + lane] = out[r][c] * factor;
    }
    if (num_splits > 1 && lane == 0) {
      partial.max_sum[0] = max[r];
      partial.max_sum[1] = row_sum;
    }
  }
}

constexpr int kDecodeRows = 8;

// Grid: sequences x (KV heads, times the row tiles of a larger group) x splits, as in
// paged_attention_decode.cu.
template <class Cache, int kHeadDim>
__global__ void __launch_bounds__(kNumThreads)
    decode_kernel(const __grid_constant__ AttentionLaunch p, Alignment alignment) {
  const SequenceRows rows(p, blockIdx.x);
  if (!rows.is_decode(p.max_decode_queries)) return;
  const TokenRange visible = rows.visible(0, 0, p.sliding_window);
  const KvSplits splits(visible);
  const int split = blockIdx.z, row_tiles = ceil_div(rows.group, kDecodeRows);
  if (split >= splits.count) return;
  attend<Cache, kHeadDim, kDecodeRows>(p, alignment, rows, blockIdx.x, blockIdx.y / row_tiles,
                                       blockIdx.y % row_tiles * kDecodeRows, visible,
                                       splits.tokens(split), split, splits.count);
}

// Rows of a block: as many as fit 99 KiB of shared memory beside the tiles.
template <int kHeadDim>
constexpr int kPrefillRows = kHeadDim <= 192 ? 32 : 16;

// Grid: row tiles (see PrefillTile) x KV heads, as in paged_attention_prefill.cu.
template <class Cache, int kHeadDim>
__global__ void __launch_bounds__(kNumThreads)
    prefill_kernel(const __grid_constant__ AttentionLaunch p, Alignment alignment) {
  constexpr int kTileRows = kPrefillRows<kHeadDim>;
  const PrefillTile tile(p, int64_t{gridDim.x} - 1 - blockIdx.x, kTileRows);
  const SequenceRows rows(p, tile.seq);
  if (rows.query_len <= p.max_decode_queries || tile.first_row < 0 ||
      tile.first_row >= rows.num_rows())
    return;
  const int last_row = min(tile.first_row + kTileRows, rows.num_rows()) - 1;
  const TokenRange visible = rows.visible(tile.first_row, last_row, p.sliding_window);
  const TokenRange tokens{visible.begin / kTileTokens * kTileTokens, visible.end};
  attend<Cache, kHeadDim, kTileRows>(p, alignment, rows, tile.seq, blockIdx.y, tile.first_row,
                                     visible, tokens, 0, 1);
}

}  // namespace

void launch_decode_fp32(const AttentionLaunch& p, cudaStream_t stream) {
  dispatch_head_dim(p.head_dim, [&](auto head_dim) {
    constexpr int kHeadDim = head_dim;
    const int row_tiles = ceil_div(p.num_heads / p.num_kv_heads, kDecodeRows);
    const dim3 grid(p.num_seqs, p.num_kv_heads * row_tiles, max_kv_splits(p));
    dispatch_cache<float>(p, [&](auto cache) {
      launch_kernel("paged_attention fp32 decode", decode_kernel<decltype(cache), kHeadDim>, grid,
                    kNumThreads, Fp32Shape<kHeadDim, kDecodeRows>::kSharedBytes, stream, p,
                    alignment_of<float>(p));
    });
  });
}

void launch_prefill_fp32(const AttentionLaunch& p, cudaStream_t stream) {
  dispatch_head_dim(p.head_dim, [&](auto head_dim) {
    constexpr int kHeadDim = head_dim;
    constexpr int kTileRows = kPrefillRows<kHeadDim>;
    const int64_t tiles = PrefillTile::max_tiles(p, kTileRows);
    const dim3 grid(grid_x("paged_attention fp32 prefill", tiles), p.num_kv_heads);
    dispatch_cache<float>(p, [&](auto cache) {
      launch_kernel("paged_attention fp32 prefill", prefill_kernel<decltype(cache), kHeadDim>, grid,
                    kNumThreads, Fp32Shape<kHeadDim, kTileRows>::kSharedBytes, stream, p,
                    alignment_of<float>(p));
    });
  });
}

}  // namespace nano_vllm::cuda
