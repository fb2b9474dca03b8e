// Prefill attention on Hopper's asynchronous tensor cores (FlashAttention-3, arXiv 2407.08608),
// chunked prefill included. Warps have roles: some load, the others multiply.
#include "attention/cache_map.cuh"
#include "attention/float8.cuh"
#include "attention/online_softmax.cuh"
#include "attention/prefix_plan.cuh"

namespace nano_vllm::cuda {
namespace prefill_sm90 {  // not anonymous: for other architectures most of it is unused

// kIsPrefix: of the prefixes that decodes share, in place of the prefills.
template <class T_, class Cache_, int kHeadDim_, bool kHasSoftcap_, bool kIsPrefix_>
struct Shape {
  using T = T_;
  using Cache = Cache_;
  using Tile = SwizzledTile<kHeadDim_>;            // as it is multiplied
  using LoadedTile = CacheTile<Cache, kHeadDim_>;  // as the caches hold it
  static constexpr bool kIsWidened = kIsFloat8<Cache>;
  using Plan = std::conditional_t<kIsPrefix_, PrefixPlan, PrefillPlan>;
  using Rows = std::conditional_t<kIsPrefix_, PrefixRows, GroupDivisor>;
  static constexpr bool kIsPrefix = kIsPrefix_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kHasSoftcap = kHasSoftcap_;
  static constexpr int kTileRows = prefill_tile_rows(kHeadDim);
  static constexpr int kTileTokens = prefill_tile_tokens(kHeadDim);
  static constexpr int kWarpgroupRows = 64;
  static constexpr int kConsumers = kTileRows / kWarpgroupRows;  // warpgroups that multiply
  static constexpr int kNumThreads = kWarpgroupSize * (1 + kConsumers);
  // As many tiles as shared memory allows. Keys and values share one ring.
  static constexpr int kQueryTiles = kHeadDim <= 128 ? 2 : 1;
  // Those of float8 are loaded beside the ring.
  static constexpr int kLoadedBeside = 2;
  static constexpr int kStages = (kHeadDim == 64                       ? 8
                                  : kHeadDim <= 96                     ? 6
                                  : kHeadDim == 128 || kHeadDim == 256 ? 5
                                                                       : 4) -
                                 (kIsWidened && kHeadDim > 96 ? 1 : 0);
  static constexpr int kLoadedTiles = kIsWidened ? kLoadedBeside : kStages;
  // Warps of the first warpgroup: one loads keys and values; of the others two load queries, or one
  // does and the other two help the first to widen.
  static constexpr int kQueryWarps = kIsWidened ? 1 : 2;
  static constexpr int kWideningWarps = 3;
  // Together no more than the block starts with: 168 or 128 a thread.
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;
};

// An item is published when the queries of the one before are loaded: by then the third before may
// still be written out, the fourth before has been.
constexpr int kItemSlots = 5;

// Tiles of float8 as they are loaded, on their way into the ring.
template <class Shape, bool kIsWidened>
struct LoadedBeside {};
template <class Shape>
struct LoadedBeside<Shape, true> {
  alignas(
      1024) unsigned char tiles[Shape::kLoadedBeside][Shape::LoadedTile::bytes(Shape::kTileTokens)];
  Barrier tile_full[Shape::kLoadedBeside], tile_empty[Shape::kLoadedBeside];
};

template <class Shape>
struct Shared : LoadedBeside<Shape, Shape::kIsWidened> {
  static constexpr size_t kQueryBytes = Shape::Tile::bytes(Shape::kTileRows);
  static constexpr size_t kStageBytes = Shape::Tile::bytes(Shape::kTileTokens);

  alignas(1024) unsigned char queries[Shape::kQueryTiles][kQueryBytes];
  alignas(1024) unsigned char stages[Shape::kStages][kStageBytes];
  PrefillItem items[kItemSlots];
  Barrier item_full[kItemSlots], item_wanted;
  Barrier query_full[Shape::kQueryTiles], query_empty[Shape::kQueryTiles];
  Barrier stage_full[Shape::kStages], stage_empty[Shape::kStages];

  __device__ void init_barriers() {
    constexpr int kConsumerWarps = Shape::kConsumers * kWarpgroupSize / kWarpSize;
    for (Barrier& barrier : item_full) barrier.init(1);
    item_wanted.init(1);
    for (Barrier& barrier : query_full) barrier.init(Shape::kQueryWarps);
    for (Barrier& barrier : query_empty) barrier.init(kConsumerWarps);
    for (Barrier& barrier : stage_full) {
      barrier.init(Shape::kIsWidened ? Shape::kWideningWarps : 1);
    }
    for (Barrier& barrier : stage_empty) barrier.init(kConsumerWarps);
    if constexpr (Shape::kIsWidened) {
      for (Barrier& barrier : this->tile_full) barrier.init(1);
      for (Barrier& barrier : this->tile_empty) barrier.init(Shape::kWideningWarps);
    }
    publish_barriers();
  }
};

// The items of a block in order, as all roles but the one that claims them see them.
template <class Shape>
struct Items {
  Shared<Shape>& shared;
  RingPosition<kItemSlots> slot;

  __device__ explicit Items(Shared<Shape>& shared) : shared(shared) {}

  // The next one; null if there is none.
  __device__ const PrefillItem* next() {
    shared.item_full[slot.index].wait(slot.parity);
    const PrefillItem* item = &shared.items[slot.index];
    slot = slot.next();
    return item->seq < 0 ? nullptr : item;
  }
};

// The role of Shape::kQueryWarps warps: load the items' queries; the first warp claims the items.
template <class Shape>
__device__ void load_queries(const AttentionLaunch& p, const typename Shape::Plan& plan,
                             const typename Shape::Rows& group, Shared<Shape>& shared,
                             int query_warp) {
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
        shared.item_wanted.wait(wanted.parity);
        wanted = wanted.next();
        if (lane == 0) item = plan.claim(item);
        item = __shfl_sync(~0u, item, 0);
      }
      const PrefillItem found = find_item<Shape>(p, plan, item);
      if (lane == 0) {
        shared.items[items.slot.index] = found;
        shared.item_full[items.slot.index].arrive();
      }
    }
    const PrefillItem* const work = items.next();
    if (work == nullptr) return;
    shared.query_empty[query.index].wait(query.parity ^ 1);

    // Lane l finds row l of a set; then the warp copies the set's chunks one after the other.
    unsigned char* const tile = shared.queries[query.index];
#pragma unroll 1
    for (int set = query_warp * kWarpSize; set < Shape::kTileRows;
         set += Shape::kQueryWarps * kWarpSize) {
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
    if (lane == 0) shared.query_full[query.index].arrive();
    query = query.next();
  }
}

// The work of kWideningWarps warps on each tile of float8: from beside the ring into its next
// stage. Rows from num_tokens on become zeros.
template <class Shape>
struct Widening {
  using Tile = typename Shape::Tile;
  using LoadedTile = typename Shape::LoadedTile;
  Shared<Shape>& shared;
  int thread;  // of those that widen
  RingPosition<Shape::kLoadedBeside> loaded;
  RingPosition<Shape::kStages> stage;

  __device__ Widening(Shared<Shape>& shared, int warp)
      : shared(shared), thread(warp * kWarpSize + threadIdx.x % kWarpSize) {}

  __device__ void widen_next(int num_tokens) {
    shared.tile_full[loaded.index].wait(loaded.parity);
    shared.stage_empty[stage.index].wait(stage.parity ^ 1);
    const unsigned char* const from = shared.tiles[loaded.index];
    unsigned char* const to = shared.stages[stage.index];
#pragma unroll 2
    for (int i = thread; i < Shape::kTileTokens * LoadedTile::kChunks;
         i += Shape::kWideningWarps * kWarpSize) {
      const int row = i / LoadedTile::kChunks, chunk = i % LoadedTile::kChunks;
      uint4 bytes = *reinterpret_cast<const uint4*>(from + LoadedTile::offset(row, chunk));
      if (row >= num_tokens) bytes = uint4{};
      uint32_t pairs[4][2];
      widen<typename Shape::T>(pairs[0], bytes.x);
      widen<typename Shape::T>(pairs[1], bytes.y);
      widen<typename Shape::T>(pairs[2], bytes.z);
      widen<typename Shape::T>(pairs[3], bytes.w);
      const uint4 low{pairs[0][0], pairs[0][1], pairs[1][0], pairs[1][1]};
      const uint4 high{pairs[2][0], pairs[2][1], pairs[3][0], pairs[3][1]};
      // Lanes whose chunks lie in every other block of columns store the second half first: the
      // blocks' even chunks share banks.
      const int swaps = 2 * chunk * 8 / Tile::kBlockColumns % 2;
      *reinterpret_cast<uint4*>(to + Tile::offset(row, 2 * chunk + swaps)) = swaps ? high : low;
      *reinterpret_cast<uint4*>(to + Tile::offset(row, 2 * chunk + 1 - swaps)) = swaps ? low : high;
    }
    fence_async_proxy();
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) {
      shared.stage_full[stage.index].arrive();
      shared.tile_empty[loaded.index].arrive();
    }
    loaded = loaded.next();
    stage = stage.next();
  }
};

// The role of the warps that only widen.
template <class Shape>
__device__ void widen_tiles(Shared<Shape>& shared, int widening_warp) {
  Widening<Shape> widening(shared, widening_warp);
  Items<Shape> items(shared);
  // In the order they are loaded: the keys of a tile before the values of the one before.
  bool has_values = false;
  int num_values = 0;
  while (const PrefillItem* work = items.next()) {
    const auto num_tokens = [&](int tile) { return work->seq_len - tile * Shape::kTileTokens; };
#pragma unroll 1
    for (int tile = work->last_block; tile >= work->first_block; --tile) {
      widening.widen_next(num_tokens(tile));
      if (has_values) widening.widen_next(num_values);
      has_values = true;
      num_values = num_tokens(tile);
    }
  }
  if (has_values) widening.widen_next(num_values);
}

struct CacheMaps {
  CacheMap keys, values;
  int box_tokens;
  uint32_t zero = 0;  // which ptxas must not know, see attend
};

// The role of one warp: loads tiles of keys and values, each item's from the last to the first, in
// the order they are multiplied: the keys of a tile before the values of the one before. Lane l
// loads the l-th box. Boxes without a visible token are read outside the tensor, which gives zeros:
// their block may not exist, and a weight of zero times what is in the tile must be zero. Between
// one tile of float8 and the next the warp does its share of widening the one before.
template <class Shape>
__device__ void load_caches(const AttentionLaunch& p, const CacheMaps& maps,
                            Shared<Shape>& shared) {
  constexpr int kOutside = -1;
  // With this tile, counted from an item's last one, the next item is claimed: early enough to load
  // its queries, and late enough to leave it to a block that is free before.
  constexpr int kClaimAhead = 3;
  const int lane = threadIdx.x % kWarpSize;
  const bool has_box = lane < Shape::kTileTokens / maps.box_tokens;
  RingPosition<Shape::kLoadedTiles> at;

  struct Box {
    int block, kv_head, row_group;
    int num_tokens;  // from the tile's first to the sequence's end
  };
  const auto find_box = [&](const PrefillItem& work, int tile) -> Box {
    const int token = tile * Shape::kTileTokens + lane * maps.box_tokens;
    const int index = token / p.block_size;
    const bool is_visible =
        has_box && token < work.visible.end && token + maps.box_tokens > work.visible.begin;
    return {is_visible ? p.block_tables[work.seq * p.block_tables_stride + index] : kOutside,
            work.kv_head, (token - index * p.block_size) / 8,
            work.seq_len - tile * Shape::kTileTokens};
  };
  const auto load_into = [&](auto& tiles, auto& full, auto& empty, const CacheMap& cache,
                             const Box& box) {
    empty[at.index].wait(at.parity ^ 1);
    if (lane == 0) full[at.index].arrive_and_expect(sizeof(tiles[0]));
    __syncwarp();
    if (has_box) {
      const int block = box.block == kOutside
                            ? kOutside
                            : box.block * cache.block_step + box.kv_head * cache.head_step;
      load_box(tiles[at.index] + lane * Shape::LoadedTile::bytes(maps.box_tokens), cache.map,
               full[at.index], 0, 0, 0, box.row_group, block);
    }
    at = at.next();
  };
  [[maybe_unused]] Widening<Shape> widening(shared, 0);
  [[maybe_unused]] int num_loaded = -1;  // tokens of the tile before, if there is one
  const auto load = [&](const CacheMap& cache, const Box& box) {
    if constexpr (Shape::kIsWidened) {
      load_into(shared.tiles, shared.tile_full, shared.tile_empty, cache, box);
      if (num_loaded >= 0) widening.widen_next(num_loaded);
      num_loaded = max(box.num_tokens, 0);
    } else {
      load_into(shared.stages, shared.stage_full, shared.stage_empty, cache, box);
    }
  };

  Items<Shape> items(shared);
  const PrefillItem* work = items.next();
  if (work == nullptr) return;
  int tile = work->last_block;
  const auto load_keys = [&](const Box& box) {
    load(maps.keys, box);
    if (lane == 0 && tile == min(work->first_block + kClaimAhead, work->last_block)) {
      shared.item_wanted.arrive();
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
  if constexpr (Shape::kIsWidened) widening.widen_next(num_loaded);
}

// What a lane's two rows of a tile see, and what all rows of its warp do.
struct VisibleRows {
  TokenRange row[2], all;

  template <class Rows>
  __device__ VisibleRows(const PrefillItem& work, const Rows& group, int warp_row,
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

// Writes the 16 rows of a warp from its registers, in whole sectors of 32 bytes: even lanes take
// four columns of a fragment from their neighbour's two and their own, odd ones of the next.
template <class Shape>
__device__ void write_rows(const AttentionLaunch& p, const GroupDivisor& group,
                           const PrefillItem& work, int warp_row, const float (&sums)[2],
                           const float (&out)[Shape::kHeadDim / 8][4]) {
  using T = typename Shape::T;
  const int lane = threadIdx.x % kWarpSize;
  const bool is_odd = lane % 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = sums[half];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const float value_scale = scale_of_head<typename Shape::Cache>(p.value_scale, work.kv_head);
    const float inverse = sum == 0 ? 0 : __fdividef(value_scale, sum);
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

// Of a prefix: the same rows as results to be folded.
template <class Shape>
__device__ void store_rows(const AttentionLaunch& p, const PrefixSlots& slots,
                           const PrefixRows& rows, const PrefillItem& work, int warp_row,
                           const LazyRowStates<typename Shape::T>& states,
                           const float (&out)[Shape::kHeadDim / 8][4]) {
  const int lane = threadIdx.x % kWarpSize;
  const float value_scale = scale_of_head<typename Shape::Cache>(p.value_scale, work.kv_head);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = states.sum[half];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const int row = warp_row + lane / 4 + 8 * half;
    if (row >= work.num_rows) continue;
    const int64_t slot = slots.row(work.split, rows.member(work, row), rows.head(work, row));
    float* const to = slots.out(slot) + 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < Shape::kHeadDim / 8; ++i) {
      *reinterpret_cast<float2*>(to + 8 * i) =
          make_float2(out[i][2 * half] * value_scale, out[i][2 * half + 1] * value_scale);
    }
    if (lane % 4 == 0) slots.max_sum(slot) = make_float2(states.reference[half], sum);
  }
}

// The role of the other warpgroups: each multiplies 64 rows of every item. The loop runs over the
// tiles of tokens of all items as if they were one: it starts the product of the next tile's keys
// and that of this tile's values, and makes weights of the scores while the latter is under way. At
// the end of an item the next tile is the next item's first. Warpgroups start products in turn, so
// that the tensor cores have those of one while another makes its weights.
template <class Shape>
__device__ void attend(const AttentionLaunch& p, const typename Shape::Rows& group,
                       const PrefixSlots& slots, uint32_t zero, Shared<Shape>& shared) {
  using T = typename Shape::T;
  using Cache = typename Shape::Cache;
  using Tile = typename Shape::Tile;
  constexpr int kHeadDim = Shape::kHeadDim, kTileTokens = Shape::kTileTokens;
  const int lane = threadIdx.x % kWarpSize;
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / kWarpgroupSize, 0) - 1;
  const int warp_row = (threadIdx.x / kWarpSize - kWarpgroupSize / kWarpSize) * 16;
  // Numbers of barriers: each warpgroup has one for itself and one that lets it start products.
  const int own_barrier = 1 + warpgroup;
  constexpr int kFirstTurn = 1 + Shape::kConsumers;

  ScoreTransform transform(p);
  RingPosition<Shape::kQueryTiles> query;
  RingPosition<Shape::kStages> stage;
  float scores[kTileTokens / 8][4], out[kHeadDim / 8][4];
  uint32_t weights[kTileTokens / 16][4], next_weights[kTileTokens / 16][4];
  float rescale[2];

  // Descriptors of the first tiles; those of others are so many units further.
  const uint64_t first_rows =
      Tile::along_columns(shared.queries[0] + warpgroup * Tile::bytes(Shape::kWarpgroupRows));
  const uint64_t first_keys = Tile::along_columns(shared.stages[0]);
  const uint64_t first_values = Tile::along_rows(shared.stages[0]);

  const auto multiply_keys = [&](int stage_index) {
    const uint64_t rows = first_rows + query.index * (Shared<Shape>::kQueryBytes / 16);
    const uint64_t keys = first_keys + stage_index * (Shared<Shape>::kStageBytes / 16);
    fence_products();
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      Warpgroup<T, kTileTokens>::multiply(scores, rows + Tile::column_step(step),
                                          keys + Tile::column_step(step), step > 0);
    }
    commit_products();
  };
  const auto multiply_values = [&](int stage_index, bool is_sum) {
    const uint64_t values = first_values + stage_index * (Shared<Shape>::kStageBytes / 16);
    fence_products();
#pragma unroll
    for (int step = 0; step < kTileTokens / 16; ++step) {
      Warpgroup<T, kHeadDim>::multiply(out, weights[step], values + Tile::row_step(step),
                                       is_sum || step > 0);
    }
    commit_products();
  };
  const auto release = [&](Barrier& barrier) {
    if (lane == 0) barrier.arrive();
  };
  // As often as each warpgroup takes its turn, the one before it has passed it on; the last one's
  // first time stands before the loop.
  const auto take_turn = [&] { sync_threads(kFirstTurn + warpgroup, 2 * kWarpgroupSize); };
  const auto pass_turn = [&] {
    arrive_threads(kFirstTurn + (warpgroup + 1) % Shape::kConsumers, 2 * kWarpgroupSize);
  };
  // Values past the end of the sequence may be NaN, which a weight of zero does not stop. Each
  // warpgroup clears them for itself: the others may have started their product, of zeros, too.
  // Of float8, they became zeros on the way.
  const auto clear_past_end = [&](int num_tokens, auto values) {
    if (Shape::kIsWidened || num_tokens >= kTileTokens) return;
    shared.stage_full[values.index].wait(values.parity);
    for (int i = max(num_tokens, 0) * Tile::kChunks + threadIdx.x % kWarpgroupSize;
         i < kTileTokens * Tile::kChunks; i += kWarpgroupSize) {
      *reinterpret_cast<uint4*>(shared.stages[values.index] +
                                Tile::offset(i / Tile::kChunks, i % Tile::kChunks)) = uint4{};
    }
    fence_async_proxy();
    sync_threads(own_barrier, kWarpgroupSize);
  };

  // A tile of an item. What the loop asks of it is here, in registers: a trip to shared memory and
  // a branch on what it brings would take as long as a tenth of a tile's products.
  struct Work {
    const PrefillItem* item;
    int tile, first_tile;
    int num_tokens;  // from the tile's first to the sequence's end; at least kTileTokens: all exist

    __device__ explicit Work(const PrefillItem* item) : item(item) {
      if (item == nullptr) return;
      tile = item->last_block;
      first_tile = item->first_block;
      num_tokens = item->seq_len - tile * kTileTokens;
    }
    __device__ bool is_last() const { return tile == first_tile; }
  };

  Items<Shape> items(shared);
  Work work(items.next());
  if (work.item == nullptr) return;
  LazyRowStates<T> states;
  VisibleRows visible(*work.item, group, warp_row, p.sliding_window);
  bool is_sum = false;

  const auto scale = [&] { return Shape::kHasSoftcap ? 1 : transform.scale; };
  const auto set_head = [&](int kv_head) {
    if constexpr (Shape::kIsWidened) {
      transform = ScoreTransform(p, scale_of_head<Cache>(p.key_scale, kv_head));
    }
  };
  set_head(work.item->kv_head);
  const auto mask_scores = [&](int tile) {
    if constexpr (Shape::kHasSoftcap) {
#pragma unroll
      for (int i = 0; i < kTileTokens / 8; ++i) transform.apply(scores[i]);
    }
    visible.mask(scores, tile * kTileTokens);
  };

  const auto write = [&](const PrefillItem& item, const LazyRowStates<T>& states) {
    if constexpr (Shape::kIsPrefix) {
      store_rows<Shape>(p, slots, group, item, warp_row, states, out);
    } else {
      write_rows<Shape>(p, group, item, warp_row, states.sum, out);
    }
  };

  shared.query_full[query.index].wait(query.parity);
  shared.stage_full[stage.index].wait(stage.parity);
  multiply_keys(stage.index);
  wait_products<0>();
  pin(scores);
  release(shared.stage_empty[stage.index]);
  stage = stage.next();
  if (work.is_last()) release(shared.query_empty[query.index]);
  mask_scores(work.tile);
  states.follow(scores, scale(), weights, rescale);
  bool has_keys = false, has_values = false;
  const bool is_last_warpgroup = warpgroup + 1 == Shape::kConsumers;
  if (is_last_warpgroup) pass_turn();

  while (true) {
    const bool ends_item = work.is_last();
    Work next = work;
    if (ends_item) {
      next = Work(items.next());
      if (next.item == nullptr) break;
      query = query.next();
      shared.query_full[query.index].wait(query.parity);
    } else {
      --next.tile;
      next.num_tokens = kTileTokens;
    }
    const auto keys = stage, values = stage.next();

    clear_past_end(work.num_tokens, values);
    pin(scores);
    pin(out);
    if (!has_keys) shared.stage_full[keys.index].wait(keys.parity);
    take_turn();
    multiply_keys(keys.index);
    if (!has_values) shared.stage_full[values.index].wait(values.parity);
    multiply_values(values.index, is_sum);
    pass_turn();

    const LazyRowStates<T> states_of_item = states;
    if (ends_item) {
      states = LazyRowStates<T>();
      visible = VisibleRows(*next.item, group, warp_row, p.sliding_window);
      set_head(next.item->kv_head);
    }
    wait_products<1>();
    pin(scores);
    mask_scores(next.tile);
    release(shared.stage_empty[keys.index]);
    if (next.is_last()) release(shared.query_empty[query.index]);
    const bool keeps_out = !ends_item && states.weigh(scores, scale(), next_weights);
    if (!keeps_out) states.follow(scores, scale(), next_weights, rescale);
    // Asked here, the answer is there when the next products start.
    stage = values.next();
    has_keys = shared.stage_full[stage.index].test(stage.parity);
    has_values = shared.stage_full[stage.next().index].test(stage.next().parity);
    wait_products<0>();
    pin(out);
    pin(next_weights);
    release(shared.stage_empty[values.index]);
    if (ends_item) {
      write(*work.item, states_of_item);
    } else if (!keeps_out) {
      rescale_rows(out, rescale);
    }
    // ptxas runs all products one by one if a register that one reads is written while another is
    // under way. The weights were made meanwhile, so they come to those registers now, and by an
    // instruction: a plain copy it would take out.
#pragma unroll
    for (int i = 0; i < kTileTokens / 16; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) weights[i][j] = next_weights[i][j] ^ zero;
    }
    is_sum = !ends_item;
    work = next;
  }

  shared.stage_full[stage.index].wait(stage.parity);
  clear_past_end(work.num_tokens, stage);
  pin(out);
  take_turn();
  multiply_values(stage.index, is_sum);
  if (!is_last_warpgroup) pass_turn();
  wait_products<0>();
  pin(out);
  write(*work.item, states);
}

// Grid: as many blocks as multiprocessors; each works on item blockIdx.x of the plan and then on
// the next that nobody has. The rows of a tile are query tokens times the query heads of the group.
// Tiles of tokens start at multiples of their size from the sequence's beginning and are taken from
// the last to the first: a row's bits do not depend on the chunk it came in. Of the first
// warpgroup, one warp loads keys and values and others queries; they run ahead of the other
// warpgroups, which multiply. The result goes to out.
template <class Shape>
__global__ void __launch_bounds__(kIsSm90a ? Shape::kNumThreads : 1, 1)
    prefill_sm90_kernel(const __grid_constant__ AttentionLaunch p,
                        const __grid_constant__ CacheMaps maps, typename Shape::Plan plan,
                        typename Shape::Rows group, const __grid_constant__ PrefixSlots slots) {
  if constexpr (kIsSm90a) {
    Shared<Shape>& shared = *reinterpret_cast<Shared<Shape>*>(dynamic_shared());
    if (threadIdx.x == 0) {
      shared.init_barriers();
      prefetch_map(maps.keys.map);
      prefetch_map(maps.values.map);
    }
    __syncthreads();
    wait_for_last_kernel();
    allow_next_kernel();  // decodes beside this kernel read what the one before it wrote

    const int warp = threadIdx.x / kWarpSize;
    if (threadIdx.x < kWarpgroupSize) {
      release_registers<Shape::kProducerRegisters>();
      if (warp == 0) load_caches<Shape>(p, maps, shared);
      if (warp >= 1 && warp <= Shape::kQueryWarps) {
        load_queries<Shape>(p, plan, group, shared, warp - 1);
      }
      if constexpr (Shape::kIsWidened) {
        if (warp > Shape::kQueryWarps) widen_tiles<Shape>(shared, warp - Shape::kQueryWarps);
      }
    } else {
      take_registers<Shape::kConsumerRegisters>();
      attend<Shape>(p, group, slots, maps.zero, shared);
    }
  }
}

// Calls run(Shape{}).
template <bool kIsPrefix, class Run>
void dispatch_shape(const AttentionLaunch& p, const Run& run) {
  dispatch_16_bit(p, [&](auto element, auto cache, auto head_dim) {
    if (p.softcap > 0) {
      run(Shape<decltype(element), decltype(cache), head_dim, true, kIsPrefix>{});
    } else {
      run(Shape<decltype(element), decltype(cache), head_dim, false, kIsPrefix>{});
    }
  });
}

template <class Shape>
void launch(const AttentionLaunch& p, const char* name, int64_t max_items,
            const typename Shape::Plan& plan, const typename Shape::Rows& rows,
            cudaStream_t stream) {
  using Tile = typename Shape::LoadedTile;
  const int box_tokens = std::gcd(p.block_size, Shape::kTileTokens);
  const CacheMaps maps = {CacheLayout::keys(p).map<Tile>(p.block_size, box_tokens),
                          CacheLayout::values(p).map<Tile>(p.block_size, box_tokens), box_tokens};
  const auto num_blocks = std::min<int64_t>(max_items, num_multiprocessors());
  launch_dependent_kernel(name, prefill_sm90_kernel<Shape>, static_cast<unsigned>(num_blocks),
                          Shape::kNumThreads, sizeof(Shared<Shape>), stream, p, maps, plan, rows,
                          PrefixSlots(p));
}

inline bool has_kernels() {
  using Any = Shape<__half, __half, 128, false, false>;
  static const bool has = has_code(prefill_sm90_kernel<Any>, Any::kNumThreads);
  return has;
}

}  // namespace prefill_sm90

bool can_prefill_sm90(const AttentionLaunch& p) {
  using namespace prefill_sm90;
  return compute_capability() == 90 && has_kernels() && p.dtype != DType::kFloat32 && p.scale > 0 &&
         p.num_heads / p.num_kv_heads <= GroupDivisor::kMaxGroup &&
         is_vec_aligned<__half>(p.query, p.query_stride_token, p.query_stride_head) &&
         is_vec_aligned<__half>(p.out, p.out_stride_token, p.out_stride_head) &&
         CacheLayout::keys(p).can_map() && CacheLayout::values(p).can_map();
}

void launch_prefill_sm90(const AttentionLaunch& p, cudaStream_t stream) {
  using namespace prefill_sm90;
  dispatch_shape<false>(p, [&](auto shape) {
    using Shape = decltype(shape);
    const PrefillPlan plan(p);
    launch<Shape>(p, "paged_attention prefill",
                  PrefillTile::max_tiles(p, Shape::kTileRows) * p.num_kv_heads, plan,
                  GroupDivisor(p.num_heads / p.num_kv_heads), stream);
  });
}

void launch_prefix_sm90(const AttentionLaunch& p, cudaStream_t stream) {
  using namespace prefill_sm90;
  dispatch_shape<true>(p, [&](auto shape) {
    const PrefixPlan plan(p);
    launch<decltype(shape)>(
        p, "paged_attention prefix", num_multiprocessors(), plan,
        {GroupDivisor(p.num_heads / p.num_kv_heads), plan.members, p.query_start_loc}, stream);
  });
}

}  // namespace nano_vllm::cuda
