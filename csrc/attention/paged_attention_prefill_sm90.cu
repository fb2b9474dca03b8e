// Prefill attention on Hopper's asynchronous tensor cores (FlashAttention-3, arXiv 2407.08608),
// chunked prefill included: a plan of the batch, and a kernel whose warps have roles.
#include <numeric>

#include "attention/attention_kernels.cuh"
#include "attention/hopper.cuh"
#include "attention/online_softmax.cuh"

namespace nano_vllm::cuda {
namespace {

template <class T_, int kHeadDim_, bool kHasSoftcap_>
struct Shape {
  using T = T_;
  using Tile = SwizzledTile<kHeadDim_>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kHasSoftcap = kHasSoftcap_;
  static constexpr int kConsumers = kHeadDim == 64 ? 3 : 2;  // warpgroups that multiply
  static constexpr int kNumThreads = kWarpgroupSize * (1 + kConsumers);
  static constexpr int kWarpgroupRows = 64;
  static constexpr int kTileRows = kWarpgroupRows * kConsumers;
  // As many tokens as registers allow (scores, weights and outputs of a row) ...
  static constexpr int kTileTokens = kHeadDim <= 128 ? 128 : kHeadDim == 192 ? 96 : 80;
  // ... and as many tiles as shared memory does. Keys and values share one ring.
  static constexpr int kQueryTiles = kHeadDim <= 128 ? 2 : 1;
  static constexpr int kStages = kHeadDim <= 96 ? 6 : kHeadDim == 128 ? 5 : 4;
  // Together no more than the block starts with: 168 or 128 a thread.
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;
};

// The order of the work, in the workspace: sequences with more than one query token from the
// longest to the shortest, and the items (a tile of rows for a KV head) before each. Long ones last
// would keep few multiprocessors busy at the end.
struct Plan {
  int32_t* next_item;   // beyond the blocks' first ones
  int32_t* seqs;        // [num_seqs]
  int32_t* first_item;  // [num_seqs + 1]

  explicit Plan(const PagedAttentionParams& p)
      : next_item(reinterpret_cast<int32_t*>(p.workspace)),
        seqs(next_item + 1),
        first_item(seqs + p.num_seqs) {}
};

constexpr int kPlanThreads = 256;

// Grid: one block. Each sequence finds its place by comparing itself with all others.
__global__ void __launch_bounds__(kPlanThreads)
    plan_kernel(const __grid_constant__ PagedAttentionParams p, Plan plan, int tile_rows) {
  __shared__ int2 others[kPlanThreads];  // length, items
  allow_next_kernel();
  const auto length_and_items = [&](int seq) {
    if (seq >= p.num_seqs) return make_int2(-1, 0);
    const SequenceRows rows(p, seq);
    if (rows.query_len <= 1) return make_int2(-1, 0);
    return make_int2(rows.seq_len, ceil_div(rows.num_rows(), tile_rows) * p.num_kv_heads);
  };
  for (int base = 0; base < p.num_seqs; base += kPlanThreads) {
    const int seq = base + threadIdx.x;
    const int2 own = length_and_items(seq);
    int place = 0, first_item = 0;
    for (int other_base = 0; other_base < p.num_seqs; other_base += kPlanThreads) {
      __syncthreads();
      others[threadIdx.x] = length_and_items(other_base + threadIdx.x);
      __syncthreads();
      const int count = min(kPlanThreads, p.num_seqs - other_base);
      for (int i = 0; i < count; ++i) {
        const int2 other = others[i];
        if (other.x > own.x || (other.x == own.x && other_base + i < seq)) {
          ++place;
          first_item += other.y;
        }
      }
    }
    if (seq >= p.num_seqs) continue;
    plan.seqs[place] = seq;
    plan.first_item[place] = first_item;
    if (place == p.num_seqs - 1) plan.first_item[p.num_seqs] = first_item + own.y;
  }
  if (threadIdx.x == 0) *plan.next_item = 0;
}

// A tile of rows of one KV head, and the tiles of tokens that it sees.
struct WorkItem {
  int seq, kv_head;  // seq -1: there is no more work
  int64_t query_start;
  int num_rows;                 // of the sequence from the tile's first on
  int first_token, first_head;  // of the tile's first row, in the sequence and in the group
  int first_position;           // of first_token
  int seq_len;
  TokenRange visible;
  int first_block, last_block;
};

// Rows of a tile to tokens and heads of the group.
struct GroupDivisor {
  static constexpr int kBits = 20;
  static constexpr int kMaxGroup = 512;  // up to it, and for rows of a tile, division is exact
  int group, reciprocal;

  explicit GroupDivisor(int group) : group(group), reciprocal((1 << kBits) / group + 1) {}

  // Of a row from the tile's first on: the tokens after its token, ...
  __device__ int token(const WorkItem& work, int row) const {
    return ((work.first_head + row) * reciprocal) >> kBits;
  }
  // ... its position, and its place in query or out.
  __device__ int position(const WorkItem& work, int row) const {
    return work.first_position + token(work, row);
  }
  __device__ int64_t offset(const WorkItem& work, int row, int64_t stride_token,
                            int64_t stride_head) const {
    const int tokens = token(work, row);
    const int head = work.first_head + row - tokens * group;
    return (work.query_start + work.first_token + tokens) * stride_token +
           (int64_t{work.kv_head} * group + head) * stride_head;
  }
};

// Heads of a sequence that are worked on at a time: their keys and values stay in the L2 cache.
constexpr int kCachedBytes = 32 << 20;

// Called by a whole warp.
template <class Shape>
__device__ WorkItem find_item(const PagedAttentionParams& p, const Plan& plan, int item) {
  // The last place whose first item is not past this one, by a 32-fold search.
  const int lane = threadIdx.x % kWarpSize;
  int place = 0, end = p.num_seqs;
  while (end - place > 1) {
    const int step = ceil_div(end - place, kWarpSize), probe = place + lane * step;
    const unsigned not_past = __ballot_sync(~0u, probe < end && plan.first_item[probe] <= item);
    place += max(__popc(not_past) - 1, 0) * step;
    end = min(end, place + step);
  }
  const int seq = plan.seqs[place];
  const SequenceRows rows(p, seq);
  WorkItem work = {-1};
  if (item >= plan.first_item[p.num_seqs]) return work;

  // Sections of heads, in them tiles from the last to the first, in them heads.
  const int num_tiles = ceil_div(rows.num_rows(), Shape::kTileRows);
  constexpr int kTokenBytes = 2 * Shape::kHeadDim * sizeof(typename Shape::T);
  const int cached_heads = kCachedBytes / kTokenBytes / max(rows.seq_len, 1);
  const int section_heads = min(max(cached_heads, 1), p.num_kv_heads);
  const int in_seq = item - plan.first_item[place];
  const int first_head = in_seq / (num_tiles * section_heads) * section_heads;
  const int in_section = in_seq - first_head * num_tiles;
  const int num_heads = min(section_heads, p.num_kv_heads - first_head);
  work.seq = seq;
  work.kv_head = first_head + in_section % num_heads;
  const int first_row = (num_tiles - 1 - in_section / num_heads) * Shape::kTileRows;
  work.query_start = rows.query_start;
  work.num_rows = rows.num_rows() - first_row;
  work.first_token = first_row / rows.group;
  work.first_head = first_row % rows.group;
  work.first_position = rows.position(first_row);
  work.seq_len = rows.seq_len;
  work.visible = rows.visible(first_row, min(first_row + Shape::kTileRows, rows.num_rows()) - 1,
                              p.sliding_window);
  work.first_block = work.visible.begin / Shape::kTileTokens;
  work.last_block = max(work.first_block, (work.visible.end - 1) / Shape::kTileTokens);
  return work;
}

constexpr int kQueryWarps = 2;  // that load queries

// The tile of tokens, from the last of an item, with which the next item is claimed: early enough
// to load its queries, and late enough to leave it to a block that is free before.
constexpr int kClaimAhead = 3;

// Items that the block is at: the one written, the one multiplied and those loaded ahead.
constexpr int kItemSlots = 5;

template <class Shape>
struct Shared {
  static constexpr size_t kQueryBytes = Shape::Tile::bytes(Shape::kTileRows);
  static constexpr size_t kStageBytes = Shape::Tile::bytes(Shape::kTileTokens);

  alignas(1024) unsigned char queries[Shape::kQueryTiles][kQueryBytes];
  alignas(1024) unsigned char stages[Shape::kStages][kStageBytes];
  WorkItem items[kItemSlots];
  Mbarrier item_full[kItemSlots], item_wanted;
  Mbarrier query_full[Shape::kQueryTiles], query_empty[Shape::kQueryTiles];
  Mbarrier stage_full[Shape::kStages], stage_empty[Shape::kStages];

  __device__ void init_barriers() {
    constexpr int kConsumerWarps = Shape::kConsumers * kWarpgroupSize / kWarpSize;
    for (Mbarrier& barrier : item_full) init_barrier(barrier, 1);
    init_barrier(item_wanted, 1);
    for (Mbarrier& barrier : query_full) init_barrier(barrier, kQueryWarps);
    for (Mbarrier& barrier : query_empty) init_barrier(barrier, kConsumerWarps);
    for (Mbarrier& barrier : stage_full) init_barrier(barrier, 1);
    for (Mbarrier& barrier : stage_empty) init_barrier(barrier, kConsumerWarps);
    fence_barrier_init();
  }
};

// The items of a block in order, as all roles but the one that claims them see them.
template <class Shape>
struct Items {
  Shared<Shape>& shared;
  RingPosition<kItemSlots> slot;

  __device__ explicit Items(Shared<Shape>& shared) : shared(shared) {}

  // The next one; null if there is none.
  __device__ const WorkItem* next() {
    wait_barrier(shared.item_full[slot.index], slot.parity);
    const WorkItem* item = &shared.items[slot.index];
    slot = slot.next();
    return item->seq < 0 ? nullptr : item;
  }
};

// The role of kQueryWarps warps: claim an item when it is wanted, not before, as another block may
// be free earlier, and load its queries.
template <class Shape>
__device__ void load_queries(const PagedAttentionParams& p, const Plan& plan,
                             const GroupDivisor& group, Shared<Shape>& shared, int query_warp) {
  using T = typename Shape::T;
  using Tile = typename Shape::Tile;
  const int lane = threadIdx.x % kWarpSize;
  Items<Shape> items(shared);
  RingPosition<Shape::kQueryTiles> query;
  RingPosition<1> wanted;
  int item = blockIdx.x;
  for (bool is_first = true;; is_first = false) {
    if (query_warp == 0) {
      if (!is_first) {
        wait_barrier(shared.item_wanted, wanted.parity);
        wanted = wanted.next();
        if (lane == 0) item = gridDim.x + atomicAdd(plan.next_item, 1);
        item = __shfl_sync(~0u, item, 0);
      }
      const WorkItem found = find_item<Shape>(p, plan, item);
      if (lane == 0) {
        shared.items[items.slot.index] = found;
        arrive(shared.item_full[items.slot.index]);
      }
    }
    const WorkItem* const work = items.next();
    if (work == nullptr) return;
    wait_barrier(shared.query_empty[query.index], query.parity ^ 1);

    // Lane l finds row l of a set; then the warp copies the set's chunks one after the other.
    unsigned char* const tile = shared.queries[query.index];
#pragma unroll 1
    for (int set = query_warp * kWarpSize; set < Shape::kTileRows; set += kQueryWarps * kWarpSize) {
      const int64_t row_offset =
          set + lane < work->num_rows
              ? group.offset(*work, set + lane, p.query_stride_token, p.query_stride_head)
              : -1;
#pragma unroll 2
      for (int i = 0; i < Tile::kChunks; ++i) {
        const int row = (i * kWarpSize + lane) / Tile::kChunks;
        const int chunk = (i * kWarpSize + lane) % Tile::kChunks;
        const int64_t offset = __shfl_sync(~0u, row_offset, row);
        copy_async(tile + Tile::offset(set + row, chunk),
                   static_cast<const T*>(p.query) + max(offset, int64_t{0}) + 8 * chunk,
                   offset >= 0);
      }
    }
    commit_copies();
    wait_copies<0>();
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) arrive(shared.query_full[query.index]);
    query = query.next();
  }
}

// Keys and values as tensors whose boxes are tokens of one block and head, laid out as SwizzledTile
// is: columns, 8 rows, column blocks, row groups; the last coordinate is block * block_step +
// head * head_step.
struct CacheMap {
  CUtensorMap map;
  int block_step, head_step;
};

struct CacheMaps {
  CacheMap keys, values;
  int box_tokens;
};

// The role of one warp: loads tiles of keys and values, each item's from the last to the first, in
// the order they are multiplied: the keys of a tile before the values of the one before. Lane l
// loads the l-th box. Boxes without a visible token are read outside the tensor, which gives zeros:
// their block may not exist, and a weight of zero times what is in the tile must be zero.
template <class Shape>
__device__ void load_caches(const PagedAttentionParams& p, const CacheMaps& maps,
                            Shared<Shape>& shared) {
  constexpr int kOutside = -1;
  const int lane = threadIdx.x % kWarpSize;
  const bool has_box = lane < Shape::kTileTokens / maps.box_tokens;
  RingPosition<Shape::kStages> stage;

  struct Box {
    int block, kv_head, row_group;
  };
  const auto find_box = [&](const WorkItem& work, int tile) -> Box {
    const int token = tile * Shape::kTileTokens + lane * maps.box_tokens;
    const int index = token / p.block_size;
    const bool is_visible =
        has_box && token < work.visible.end && token + maps.box_tokens > work.visible.begin;
    return {is_visible ? p.block_tables[work.seq * p.block_tables_stride + index] : kOutside,
            work.kv_head, (token - index * p.block_size) / 8};
  };
  const auto load = [&](const CacheMap& cache, const Box& box) {
    wait_barrier(shared.stage_empty[stage.index], stage.parity ^ 1);
    if (lane == 0) {
      arrive_expecting(shared.stage_full[stage.index], Shared<Shape>::kStageBytes);
    }
    __syncwarp();
    if (has_box) {
      const int block = box.block == kOutside
                            ? kOutside
                            : box.block * cache.block_step + box.kv_head * cache.head_step;
      load_box(shared.stages[stage.index] + lane * Shape::Tile::bytes(maps.box_tokens), cache.map,
               shared.stage_full[stage.index], 0, 0, 0, box.row_group, block);
    }
    stage = stage.next();
  };

  Items<Shape> items(shared);
  const WorkItem* work = items.next();
  if (work == nullptr) return;
  int tile = work->last_block;
  const auto load_keys = [&](const Box& box) {
    load(maps.keys, box);
    if (lane == 0 && tile == min(work->first_block + kClaimAhead, work->last_block)) {
      arrive(shared.item_wanted);
    }
  };
  Box box = find_box(*work, tile);
  load_keys(box);
  while (true) {
    // The next box is looked up before there is room for it.
    if (tile == work->first_block) {
      work = items.next();
      if (work == nullptr) break;
      tile = work->last_block;
    } else {
      --tile;
    }
    const Box next_box = find_box(*work, tile);
    load_keys(next_box);
    load(maps.values, box);
    box = next_box;
  }
  load(maps.values, box);
}

// What a lane's two rows of a tile see, and what all rows of its warp do.
struct VisibleRows {
  TokenRange row[2], all;

  __device__ VisibleRows(const WorkItem& work, const GroupDivisor& group, int warp_row,
                         int sliding_window) {
    const auto visible = [&](int row) -> TokenRange {
      const int position = group.position(work, min(row, work.num_rows - 1));
      return {sliding_window > 0 ? position - sliding_window + 1 : 0, position + 1};
    };
    const int lane_row = warp_row + threadIdx.x % kWarpSize / 4;
    row[0] = visible(lane_row);
    row[1] = visible(lane_row + 8);
    all = {visible(warp_row + 15).begin, visible(warp_row).end};
  }

  // Scores of tokens that a row doesn't see become -infinity.
  template <int kColumnTiles>
  __device__ void mask(float (&scores)[kColumnTiles][4], int first_token) const {
    static_assert(2 * kColumnTiles <= 32);
    if (first_token >= all.begin && first_token + 8 * kColumnTiles <= all.end) return;
    // A bit for each of the lane's columns in a row, two of every eight; those below the limit.
    const auto columns_before = [&](int limit) {
      const int columns = max(limit - first_token - static_cast<int>(2 * (threadIdx.x % 4)), 0);
      const int count = columns / 8 * 2 + min(columns % 8, 2);
      return count < 32 ? (1u << count) - 1 : ~0u;
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t seen = columns_before(row[half].end) & ~columns_before(row[half].begin);
#pragma unroll
      for (int i = 0; i < 2 * kColumnTiles; ++i) {
        if (!(seen >> i & 1)) scores[i / 2][2 * half + i % 2] = -kInfinity;
      }
    }
  }
};

// The two rows' softmax so far. The maximum follows the scores only once they exceed it by 2^8,
// which float and both 16-bit types hold with the same precision: outputs are rarely rescaled.
struct LazyRowStates {
  static constexpr float kSlack = 8;
  float max[2] = {-kInfinity, -kInfinity};
  float sum[2] = {0, 0};  // of this lane's columns alone

  // Turns scores times scale, as exponents of two, into weights. What was weighted before is to be
  // multiplied by rescale.
  template <int kColumnTiles>
  __device__ void update(float (&scores)[kColumnTiles][4], float scale, float (&rescale)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float new_max = -kInfinity;
#pragma unroll
      for (int i = 0; i < kColumnTiles; ++i) {
        new_max = fmaxf(new_max, fmaxf(scores[i][2 * half], scores[i][2 * half + 1]));
      }
      new_max = fmaxf(new_max, __shfl_xor_sync(~0u, new_max, 1));
      new_max = scale * fmaxf(new_max, __shfl_xor_sync(~0u, new_max, 2));
      rescale[half] = 1;
      if (new_max - max[half] > kSlack) {
        rescale[half] = exp2_approx(max[half] - new_max);
        max[half] = new_max;
      }
      const float shift = max[half] == -kInfinity ? 0 : max[half];
      float new_sum = 0;
#pragma unroll
      for (int i = 0; i < kColumnTiles; ++i) {
#pragma unroll
        for (int j = 2 * half; j < 2 * half + 2; ++j) {
          scores[i][j] = exp2_approx(fmaf(scores[i][j], scale, -shift));
          new_sum += scores[i][j];
        }
      }
      sum[half] = sum[half] * rescale[half] + new_sum;
    }
  }
};

// Writes the 16 rows of a warp from its registers, in whole sectors of 32 bytes: even lanes take
// four columns of a fragment from their neighbour's two and their own, odd ones of the next.
template <class Shape>
__device__ void write_rows(const PagedAttentionParams& p, const GroupDivisor& group,
                           const WorkItem& work, int warp_row, const float (&sums)[2],
                           const float (&out)[Shape::kHeadDim / 8][4]) {
  using T = typename Shape::T;
  const int lane = threadIdx.x % kWarpSize;
  const bool is_odd = lane % 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = sums[half];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const float inverse = sum == 0 ? 0 : __fdividef(1, sum);
    const int row = warp_row + lane / 4 + 8 * half;
    const bool is_valid = row < work.num_rows;
    T* const to = static_cast<T*>(p.out) +
                  group.offset(work, row, p.out_stride_token, p.out_stride_head) + 8 * is_odd +
                  4 * (lane % 4 / 2);
#pragma unroll
    for (int i = 0; i < Shape::kHeadDim / 8; i += 2) {
      const uint32_t even = pack<T>(out[i][2 * half] * inverse, out[i][2 * half + 1] * inverse);
      const uint32_t odd =
          pack<T>(out[i + 1][2 * half] * inverse, out[i + 1][2 * half + 1] * inverse);
      const uint32_t other = __shfl_xor_sync(~0u, is_odd ? even : odd, 1);
      if (is_valid) {
        *reinterpret_cast<uint2*>(to + 8 * i) =
            is_odd ? make_uint2(other, odd) : make_uint2(even, other);
      }
    }
  }
}

// The role of the other warpgroups: each multiplies 64 rows of every item. The loop runs over the
// tiles of tokens of all items. In a turn a warpgroup starts the product of the next tile's keys
// and that of this tile's values; then it is another's turn, while this one makes weights of the
// scores. An item's outputs are written while the next one's first tile is under way.
template <class Shape>
__device__ void attend(const PagedAttentionParams& p, const GroupDivisor& group,
                       Shared<Shape>& shared) {
  using T = typename Shape::T;
  using Tile = typename Shape::Tile;
  constexpr int kHeadDim = Shape::kHeadDim, kTileTokens = Shape::kTileTokens;
  const int lane = threadIdx.x % kWarpSize;
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / kWarpgroupSize, 0) - 1;
  const int warp_row = (threadIdx.x / kWarpSize - kWarpgroupSize / kWarpSize) * 16;
  const int own_barrier = 1 + warpgroup;

  const auto transform = ScoreTransform(p);
  const float scale = Shape::kHasSoftcap ? 1 : transform.scale;
  RingPosition<Shape::kQueryTiles> query;
  RingPosition<Shape::kStages> stage;
  float scores[kTileTokens / 8][4], out[kHeadDim / 8][4];
  uint32_t weights[kTileTokens / 16][4];
  float rescale[2];

  const auto multiply_keys = [&](int stage_index) {
    const uint64_t rows = Tile::along_columns(shared.queries[query.index] +
                                              warpgroup * Tile::bytes(Shape::kWarpgroupRows));
    const uint64_t keys = Tile::along_columns(shared.stages[stage_index]);
    fence_products();
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      Warpgroup<T, kTileTokens>::multiply(scores, rows + Tile::column_step(step),
                                          keys + Tile::column_step(step), step > 0);
    }
    commit_products();
  };
  const auto multiply_values = [&](int stage_index, bool is_sum) {
    const uint64_t values = Tile::along_rows(shared.stages[stage_index]);
    fence_products();
#pragma unroll
    for (int step = 0; step < kTileTokens / 16; ++step) {
      Warpgroup<T, kHeadDim>::multiply(out, weights[step], values + Tile::row_step(step),
                                       is_sum || step > 0);
    }
    commit_products();
  };
  const auto release = [&](Mbarrier& barrier) {
    if (lane == 0) arrive(barrier);
  };
  // Values past the end of the sequence may be NaN, which a weight of zero does not stop.
  const auto clear_past_end = [&](const WorkItem& work, int tile, auto values) {
    const int end = work.seq_len - tile * kTileTokens;
    if (end >= kTileTokens) return;
    wait_barrier(shared.stage_full[values.index], values.parity);
    for (int i = max(end, 0) * Tile::kChunks + threadIdx.x % kWarpgroupSize;
         i < kTileTokens * Tile::kChunks; i += kWarpgroupSize) {
      *reinterpret_cast<uint4*>(shared.stages[values.index] +
                                Tile::offset(i / Tile::kChunks, i % Tile::kChunks)) = uint4{};
    }
    fence_async_proxy();
    sync_named(own_barrier, kWarpgroupSize);
  };

  Items<Shape> items(shared);
  const WorkItem* work = items.next();
  if (work == nullptr) return;
  LazyRowStates states;
  VisibleRows visible(*work, group, warp_row, p.sliding_window);
  int tile = work->last_block;
  bool is_sum = false;

  const auto weigh = [&](int tile) {
    if constexpr (Shape::kHasSoftcap) {
#pragma unroll
      for (int i = 0; i < kTileTokens / 8; ++i) transform.apply(scores[i]);
    }
    visible.mask(scores, tile * kTileTokens);
    states.update(scores, scale, rescale);
  };
  const auto pack_weights = [&] {
#pragma unroll
    for (int i = 0; i < kTileTokens / 16; ++i) {
      pack_operand<T>(weights[i], scores[2 * i], scores[2 * i + 1]);
    }
  };

  wait_barrier(shared.query_full[query.index], query.parity);
  wait_barrier(shared.stage_full[stage.index], stage.parity);
  multiply_keys(stage.index);
  wait_products<0>();
  pin(scores);
  release(shared.stage_empty[stage.index]);
  stage = stage.next();
  if (tile == work->first_block) release(shared.query_empty[query.index]);
  weigh(tile);
  pack_weights();
  wait_barrier(shared.stage_full[stage.index], stage.parity);

  while (true) {
    const bool ends_item = tile == work->first_block;
    const WorkItem* next_work = work;
    if (ends_item) {
      next_work = items.next();
      if (next_work == nullptr) break;
      query = query.next();
      wait_barrier(shared.query_full[query.index], query.parity);
    }
    const int next_tile = ends_item ? next_work->last_block : tile - 1;
    const auto keys = stage, values = stage.next();

    clear_past_end(*work, tile, values);
    pin(scores);
    pin(out);
    multiply_keys(keys.index);
    wait_barrier(shared.stage_full[values.index], values.parity);
    multiply_values(values.index, is_sum);

    wait_products<1>();
    pin(scores);
    release(shared.stage_empty[keys.index]);
    const float sums[2] = {states.sum[0], states.sum[1]};
    if (ends_item) {
      states = LazyRowStates();
      visible = VisibleRows(*next_work, group, warp_row, p.sliding_window);
    }
    if (next_tile == next_work->first_block) release(shared.query_empty[query.index]);
    weigh(next_tile);
    pin(scores);
    stage = values.next();
    wait_barrier(shared.stage_full[stage.index], stage.parity);
    wait_products<0>();
    pin(out);
    release(shared.stage_empty[values.index]);
    if (ends_item) {
      write_rows<Shape>(p, group, *work, warp_row, sums, out);
    } else {
      rescale_rows(out, rescale);
    }
    pack_weights();
    is_sum = !ends_item;
    work = next_work;
    tile = next_tile;
  }

  clear_past_end(*work, tile, stage);
  pin(out);
  multiply_values(stage.index, is_sum);
  wait_products<0>();
  pin(out);
  write_rows<Shape>(p, group, *work, warp_row, states.sum, out);
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kIsSm90 = true;
#else
constexpr bool kIsSm90 = false;  // the kernel is empty; see has_kernels()
#endif

// Grid: as many blocks as multiprocessors; each works on item blockIdx.x of the plan and then on
// the next that nobody has. The rows of a tile are query tokens times the query heads of the group.
// Tiles of tokens start at multiples of their size from the sequence's beginning and are taken from
// the last to the first: a row's bits do not depend on the chunk it came in. One warp loads
// queries, one keys and values; they run ahead of the warpgroups that multiply. The result goes to
// out.
template <class Shape>
__global__ void __launch_bounds__(kIsSm90 ? Shape::kNumThreads : 1, 1)
    prefill_sm90_kernel(const __grid_constant__ PagedAttentionParams p,
                        const __grid_constant__ CacheMaps maps, Plan plan, GroupDivisor group) {
  if constexpr (kIsSm90) {
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    Shared<Shape>& shared = *reinterpret_cast<Shared<Shape>*>(shared_bytes);
    if (threadIdx.x == 0) {
      shared.init_barriers();
      prefetch_map(maps.keys.map);
      prefetch_map(maps.values.map);
    }
    __syncthreads();
    wait_for_last_kernel();

    const int warp = threadIdx.x / kWarpSize;
    if (threadIdx.x < kWarpgroupSize) {
      release_registers<Shape::kProducerRegisters>();
      if (warp == 0) load_caches<Shape>(p, maps, shared);
      if (warp >= 1 && warp <= kQueryWarps) load_queries<Shape>(p, plan, group, shared, warp - 1);
    } else {
      take_registers<Shape::kConsumerRegisters>();
      attend<Shape>(p, group, shared);
    }
  }
}

// Calls run(Shape{}).
template <class Run>
void dispatch_shape(const PagedAttentionParams& p, const Run& run) {
  dispatch_16_bit(p, [&](auto element, auto head_dim) {
    if (p.softcap > 0) {
      run(Shape<decltype(element), head_dim, true>{});
    } else {
      run(Shape<decltype(element), head_dim, false>{});
    }
  });
}

// The last dimension of a cache's map steps over both blocks and heads.
int64_t map_step(const PagedAttentionParams& p, int64_t stride_block, int64_t stride_head) {
  return p.num_kv_heads == 1 ? stride_block : std::gcd(stride_block, stride_head);
}

// Steps of a whole row and more keep the coordinates of any memory below 2^31.
bool can_map(const PagedAttentionParams& p, const void* cache, int64_t stride_block,
             int64_t stride_token, int64_t stride_head) {
  const int64_t step = map_step(p, stride_block, stride_head);
  return reinterpret_cast<uintptr_t>(cache) % 16 == 0 && stride_token > 0 &&
         stride_token % 8 == 0 && step % 8 == 0 && step >= p.head_dim;
}

template <class Shape>
CacheMap make_cache_map(const PagedAttentionParams& p, int box_tokens, const void* cache,
                        int64_t stride_block, int64_t stride_token, int64_t stride_head) {
  using Tile = typename Shape::Tile;
  constexpr uint64_t kElement = sizeof(typename Shape::T);
  const int64_t step = map_step(p, stride_block, stride_head);
  const BoxedTensor tensor = {
      cache,
      // Blocks are not counted: their numbers come from block_tables, which is trusted.
      {Tile::kBlockColumns, 8, Tile::kColumnBlocks, static_cast<uint64_t>(p.block_size / 8),
       uint64_t{1} << 31},
      {stride_token * kElement, Tile::kBlockColumns * kElement, 8 * stride_token * kElement,
       step * kElement},
      {Tile::kBlockColumns, 8, Tile::kColumnBlocks, static_cast<uint32_t>(box_tokens / 8), 1}};
  return {make_tensor_map(tensor, p.dtype, Tile::kSwizzle), static_cast<int>(stride_block / step),
          p.num_kv_heads == 1 ? 0 : static_cast<int>(stride_head / step)};
}

// Whether this build has code for sm_90a: without it the kernel refuses all but one thread.
bool has_kernels() {
  static const bool has = [] {
    using Any = Shape<__half, 128, false>;
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, prefill_sm90_kernel<Any>) == cudaSuccess &&
           attributes.maxThreadsPerBlock >= Any::kNumThreads;
  }();
  return has;
}

int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device) == cudaSuccess &&
            cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess,
        "paged_attention: no CUDA device");
  return value;
}

}  // namespace

bool can_prefill_sm90(const PagedAttentionParams& p) {
  return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
         device_attribute(cudaDevAttrComputeCapabilityMinor) == 0 && has_kernels() &&
         p.dtype != DType::kFloat32 && p.scale > 0 && p.block_size % 8 == 0 &&
         p.num_heads / p.num_kv_heads <= GroupDivisor::kMaxGroup &&
         is_vec_aligned<__half>(p.query, p.query_stride_token, p.query_stride_head) &&
         is_vec_aligned<__half>(p.out, p.out_stride_token, p.out_stride_head) &&
         can_map(p, p.key_cache, p.key_stride_block, p.key_stride_token, p.key_stride_head) &&
         can_map(p, p.value_cache, p.value_stride_block, p.value_stride_token, p.value_stride_head);
}

void launch_prefill_sm90(const PagedAttentionParams& p, cudaStream_t stream) {
  dispatch_shape(p, [&](auto shape) {
    using Shape = decltype(shape);
    const Plan plan(p);
    plan_kernel<<<1, kPlanThreads, 0, stream>>>(p, plan, Shape::kTileRows);
    check_launch("paged_attention plan");

    const int box_tokens = std::gcd(p.block_size, Shape::kTileTokens);
    const CacheMaps maps = {
        make_cache_map<Shape>(p, box_tokens, p.key_cache, p.key_stride_block, p.key_stride_token,
                              p.key_stride_head),
        make_cache_map<Shape>(p, box_tokens, p.value_cache, p.value_stride_block,
                              p.value_stride_token, p.value_stride_head),
        box_tokens};
    const int64_t max_items = PrefillTile::max_tiles(p, Shape::kTileRows) * p.num_kv_heads;
    const int num_blocks = static_cast<int>(
        std::min<int64_t>(max_items, device_attribute(cudaDevAttrMultiProcessorCount)));
    const auto kernel = prefill_sm90_kernel<Shape>;
    const size_t shared_bytes = sizeof(Shared<Shape>);
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             static_cast<int>(shared_bytes));
    check(error == cudaSuccess, "paged_attention prefill: ", shared_bytes,
          " bytes of shared memory refused: ", cudaGetErrorString(error));
    cudaLaunchAttribute overlap;
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(num_blocks);
    config.blockDim = dim3(Shape::kNumThreads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = 1;
    error = cudaLaunchKernelEx(&config, kernel, p, maps, plan,
                               GroupDivisor(p.num_heads / p.num_kv_heads));
    check(error == cudaSuccess,
          "paged_attention prefill: launch failed: ", cudaGetErrorString(error));
  });
}

}  // namespace nano_vllm::cuda
