// Decode attention on tensor cores: the query heads that share a KV head are the rows of one
// product, so the cache is read once for all of them.
#include <algorithm>

#include "attention/attention_kernels.cuh"
#include "attention/online_softmax.cuh"

namespace nano_vllm::cuda {
namespace {

constexpr int kNumWarps = 4;
constexpr int kNumThreads = kNumWarps * kWarpSize;
constexpr int kTileRows = 16;    // query heads of a block: the M of an mma
constexpr int kTileTokens = 16;  // of a warp at a time: the K of an mma
static_assert(kSplitAlignment % kTileTokens == 0);

// A third of a Hopper SM's shared memory; three quarters of what an RTX GPU gives a block.
constexpr int kRingBytes = 72 * 1024;

template <class T, int kHeadDim>
struct DecodeShape {
  using Layout = Swizzled<T, kHeadDim>;
  static constexpr int kTileSize = kTileTokens * kHeadDim;
  // Tiles that a warp has on the way or in use, keys and values alternating.
  static constexpr int kSlots =
      std::min(6, kRingBytes / (kNumWarps * kTileSize * static_cast<int>(sizeof(T))));
  static constexpr int kQuerySize = kTileRows * kHeadDim;
  static constexpr bool kKeepsQuery = kHeadDim <= 128;  // in registers
  // The warps' results, which take the place of the tiles. The gap between rows spreads the stores
  // of accumulators over the banks.
  static constexpr int kRowStride = kHeadDim + 8;
  static constexpr int kResultFloats = kNumWarps * kTileRows * (kRowStride + 2);
  static constexpr size_t kSharedBytes = std::max(
      sizeof(T) * (kQuerySize + kNumWarps * kSlots * kTileSize), sizeof(float) * kResultFloats);
  static_assert(kSlots >= 2);
};

// The state of each warp after its share of the tokens.
template <int kRowStride>
struct WarpResults {
  float* out;  // [kNumWarps, kTileRows, kRowStride]
  float* max;  // [kNumWarps, kTileRows]
  float* sum;  // [kNumWarps, kTileRows]

  __device__ explicit WarpResults(float* memory)
      : out(memory),
        max(memory + kNumWarps * kTileRows * kRowStride),
        sum(max + kNumWarps * kTileRows) {}

  template <int kColumnTiles>
  __device__ void store(const float (&columns)[kColumnTiles][4], const RowStates& states) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp * kTileRows + lane / 4 + 8 * half;
#pragma unroll
      for (int i = 0; i < kColumnTiles; ++i) {
        *reinterpret_cast<float2*>(out + row * kRowStride + 8 * i + 2 * (lane % 4)) =
            make_float2(columns[i][2 * half], columns[i][2 * half + 1]);
      }
      if (lane % 4 == 0) {
        max[row] = states.max[half];
        sum[row] = states.sum[half];
      }
    }
  }

  // One column of a row over all warps, in their order.
  struct Merged {
    float out, max, sum;
  };
  __device__ Merged merge(int row, int column) const {
    Merged merged{0, -kInfinity, 0};
#pragma unroll
    for (int warp = 0; warp < kNumWarps; ++warp) {
      merged.max = fmaxf(merged.max, max[warp * kTileRows + row]);
    }
    const float shift = merged.max == -kInfinity ? 0 : merged.max;
#pragma unroll
    for (int warp = 0; warp < kNumWarps; ++warp) {
      const float weight = exp2_approx(max[warp * kTileRows + row] - shift);
      merged.out += weight * out[(warp * kTileRows + row) * kRowStride + column];
      merged.sum += weight * sum[warp * kTileRows + row];
    }
    return merged;
  }
};

// Grid: sequences x (KV heads, times the tiles of 16 of a larger group) x splits. A block attends a
// split of one KV head's tokens. Its warps take 16 tokens each in turn, through rings of their own
// and without a barrier, and merge at the end. The result goes to out if the sequence has one
// split, else to the workspace.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kNumThreads)
    decode_kernel(const __grid_constant__ AttentionLaunch p, Alignment alignment) {
  using Shape = DecodeShape<T, kHeadDim>;
  using Layout = typename Shape::Layout;
  constexpr int kSlots = Shape::kSlots, kDepthTiles = kHeadDim / 16;
  unsigned char* const shared = dynamic_shared();

  const int seq = blockIdx.x, split = blockIdx.z;
  const SequenceRows rows(p, seq);
  if (!rows.is_decode(p.max_decode_queries)) return;
  const int row_tiles = ceil_div(rows.group, kTileRows);
  const int kv_head = blockIdx.y / row_tiles, first_row = blockIdx.y % row_tiles * kTileRows;
  const TokenRange visible = rows.visible(0, 0, p.sliding_window);
  const KvSplits splits(visible);
  if (split >= splits.count) return;
  const TokenRange tokens = splits.tokens(split);

  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  T* const query_tile = reinterpret_cast<T*>(shared);
  T* const ring = query_tile + Shape::kQuerySize + warp * kSlots * Shape::kTileSize;

  // This warp's tiles: warp, warp + kNumWarps, ... of the split.
  const int all_tiles = ceil_div(tokens.end - tokens.begin, kTileTokens);
  const int num_tiles = (all_tiles - warp + kNumWarps - 1) / kNumWarps;
  const auto first_token = [&](int tile) {
    return tokens.begin + (tile * kNumWarps + warp) * kTileTokens;
  };
  const PagedRows<T> keys = PagedRows<T>::keys(p, seq, kv_head, alignment.caches);
  const PagedRows<T> values = PagedRows<T>::values(p, seq, kv_head, alignment.caches);
  const TokenRange valid{visible.begin, tokens.end};
  // Fills slot item % kSlots; item 2 i is key tile i, item 2 i + 1 value tile i. Each item is one
  // group of copies, empty past the last tile, so that waiting can count groups.
  const auto load_item = [&](int item, T* slot) {
    if (item < 2 * num_tiles) {
      load_tokens<Layout, kTileTokens, kWarpSize>(slot, item % 2 == 0 ? keys : values,
                                                  first_token(item / 2), valid, lane);
    }
    commit_copies();
  };
  load_query<Layout, kTileRows, kNumThreads>(query_tile, p, rows, kv_head, first_row,
                                             alignment.query);
  commit_copies();
#pragma unroll 1
  for (int item = 0; item < kSlots; ++item) load_item(item, ring + item * Shape::kTileSize);
  wait_copies<kSlots>();  // all but the ring: the query
  __syncthreads();

  // A fragment's rows and chunks, see ptx.cuh: as the left operand, or transposed as the right one,
  // the second matrix lies below the first; as the right operand from rows, beside it.
  const int row_below = lane % 16, chunk_below = lane / 16;
  const int row_beside = lane / 16 * 8 + lane % 8, chunk_beside = lane / 8 % 2;

  uint32_t query[Shape::kKeepsQuery ? kDepthTiles : 1][4];
  const auto load_query_fragment = [&](int depth) {
    load_matrices(query[Shape::kKeepsQuery ? depth : 0],
                  query_tile + Layout::offset(row_below, 2 * depth + chunk_below));
  };
  if constexpr (Shape::kKeepsQuery) {
#pragma unroll
    for (int depth = 0; depth < kDepthTiles; ++depth) load_query_fragment(depth);
  }

  const ScoreTransform transform(p);
  RowStates states;
  float out[2 * kDepthTiles][4] = {};
  int item = 0, slot_index = 0;
  // Gives run the slot of the next item once it is filled, then refills it.
  const auto with_next_item = [&](const auto& run) {
    T* const slot = ring + slot_index * Shape::kTileSize;
    wait_copies<kSlots - 1>();
    __syncwarp();
    run(slot);
    __syncwarp();
    load_item(item + kSlots, slot);
    ++item;
    slot_index = slot_index + 1 == kSlots ? 0 : slot_index + 1;
  };
#pragma unroll 1
  for (int tile = 0; tile < num_tiles; ++tile) {
    float scores[2][4] = {};
    with_next_item([&](const T* key_tile) {
#pragma unroll
      for (int depth = 0; depth < kDepthTiles; ++depth) {
        if constexpr (!Shape::kKeepsQuery) load_query_fragment(depth);
        uint32_t key[4];
        load_matrices(key, key_tile + Layout::offset(row_beside, 2 * depth + chunk_beside));
        const auto& q = query[Shape::kKeepsQuery ? depth : 0];
        multiply_add<T>(scores[0], q, key[0], key[1]);
        multiply_add<T>(scores[1], q, key[2], key[3]);
      }
    });
    const int token = first_token(tile);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      transform.apply(scores[i]);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = token + 8 * i + 2 * (lane % 4) + j % 2;
        if (column < valid.begin || column >= valid.end) scores[i][j] = -kInfinity;
      }
    }
    float rescale[2];
    states.update(scores, rescale);
    rescale_rows(out, rescale);
    uint32_t weights[4];
    pack_operand<T>(weights, scores[0], scores[1]);
    with_next_item([&](const T* value_tile) {
#pragma unroll
      for (int depth = 0; depth < kDepthTiles; ++depth) {
        uint32_t value[4];
        load_matrices_transposed(value,
                                 value_tile + Layout::offset(row_below, 2 * depth + chunk_below));
        multiply_add<T>(out[2 * depth], weights, value[0], value[1]);
        multiply_add<T>(out[2 * depth + 1], weights, value[2], value[3]);
      }
    });
  }
  states.finish();

  __syncthreads();  // no warp uses the tiles any more
  WarpResults<Shape::kRowStride> results(reinterpret_cast<float*>(shared));
  results.store(out, states);
  __syncthreads();
  const int num_rows = min(kTileRows, rows.group - first_row);
  for (int i = threadIdx.x; i < num_rows * kHeadDim; i += kNumThreads) {
    const int row = i / kHeadDim, column = i % kHeadDim;
    const auto merged = results.merge(row, column);
    if (splits.count == 1) {
      T* const to = static_cast<T*>(p.out) +
                    rows.offset(first_row + row, kv_head, p.out_stride_token, p.out_stride_head);
      to[column] = from_float<T>(merged.sum == 0 ? 0 : merged.out / merged.sum);
    } else {
      const PartialRow partial(p, seq, kv_head * rows.group + first_row + row, split);
      partial.out[column] = merged.out;
      if (column == 0) {
        partial.max_sum[0] = merged.max;
        partial.max_sum[1] = merged.sum;
      }
    }
  }
}

}  // namespace

void launch_decode(const AttentionLaunch& p, cudaStream_t stream) {
  dispatch_16_bit(p, [&](auto element, auto head_dim) {
    using T = decltype(element);
    constexpr int kHeadDim = head_dim;
    const int row_tiles = ceil_div(p.num_heads / p.num_kv_heads, kTileRows);
    const dim3 grid(p.num_seqs, p.num_kv_heads * row_tiles, max_kv_splits(p));
    launch_kernel("paged_attention decode", decode_kernel<T, kHeadDim>, grid, kNumThreads,
                  DecodeShape<T, kHeadDim>::kSharedBytes, stream, p, alignment_of<T>(p));
  });
}

}  // namespace nano_vllm::cuda
