// Prefill attention on Hopper's asynchronous tensor cores (FlashAttention-3, arXiv 2407.08608),
// chunked prefill included. Warps have roles: some load, the others multiply.
#include "attention/cache_map.cuh"
#include "attention/online_softmax.cuh"
#include "attention/prefill_plan.cuh"

namespace nano_vllm::cuda {
namespace prefill_sm90 {  // not anonymous: for other architectures most of it is unused

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

constexpr int kQueryWarps = 2;  // that load queries

// An item is published when the queries of the one before are loaded: by then the third before may
// still be written out, the fourth before has been.
constexpr int kItemSlots = 5;

template <class Shape>
struct Shared {
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
    for (Barrier& barrier : query_full) barrier.init(kQueryWarps);
    for (Barrier& barrier : query_empty) barrier.init(kConsumerWarps);
    for (Barrier& barrier : stage_full) barrier.init(1);
    for (Barrier& barrier : stage_empty) barrier.init(kConsumerWarps);
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

// The role of kQueryWarps warps: load the items' queries; the first warp claims the items.
template <class Shape>
__device__ void load_queries(const AttentionLaunch& p, const PrefillPlan& plan,
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
        shared.item_wanted.wait(wanted.parity);
        wanted = wanted.next();
        if (lane == 0) item = gridDim.x + atomicAdd(plan.num_claimed, 1);
        item = __shfl_sync(~0u, item, 0);
      }
      const PrefillItem found = find_prefill_item<Shape>(p, plan, item);
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
    if (lane == 0) shared.query_full[query.index].arrive();
    query = query.next();
  }
}

struct CacheMaps {
  CacheMap keys, values;
  int box_tokens;
};

// The role of one warp: loads tiles of keys and values, each item's from the last to the first, in
// the order they are multiplied: the keys of a tile before the values of the one before. Lane l
// loads the l-th box. Boxes without a visible token are read outside the tensor, which gives zeros:
// their block may not exist, and a weight of zero times what is in the tile must be zero.
template <class Shape>
__device__ void load_caches(const AttentionLaunch& p, const CacheMaps& maps,
                            Shared<Shape>& shared) {
  constexpr int kOutside = -1;
  // With this tile, counted from an item's last one, the next item is claimed: early enough to load
  // its queries, and late enough to leave it to a block that is free before.
  constexpr int kClaimAhead = 3;
  const int lane = threadIdx.x % kWarpSize;
  const bool has_box = lane < Shape::kTileTokens / maps.box_tokens;
  RingPosition<Shape::kStages> stage;

  struct Box {
    int block, kv_head, row_group;
  };
  const auto find_box = [&](const PrefillItem& work, int tile) -> Box {
    const int token = tile * Shape::kTileTokens + lane * maps.box_tokens;
    const int index = token / p.block_size;
    const bool is_visible =
        has_box && token < work.visible.end && token + maps.box_tokens > work.visible.begin;
    return {is_visible ? p.block_tables[work.seq * p.block_tables_stride + index] : kOutside,
            work.kv_head, (token - index * p.block_size) / 8};
  };
  const auto load = [&](const CacheMap& cache, const Box& box) {
    shared.stage_empty[stage.index].wait(stage.parity ^ 1);
    if (lane == 0) {
      shared.stage_full[stage.index].arrive_and_expect(Shared<Shape>::kStageBytes);
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
}

// What a lane's two rows of a tile see, and what all rows of its warp do.
struct VisibleRows {
  TokenRange row[2], all;

  __device__ VisibleRows(const PrefillItem& work, const GroupDivisor& group, int warp_row,
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
// tiles of tokens of all items as if they were one: it starts the product of the next tile's keys
// and that of this tile's values, and makes weights of the scores while the latter is under way. At
// the end of an item the next tile is the next item's first.
template <class Shape>
__device__ void attend(const AttentionLaunch& p, const GroupDivisor& group, Shared<Shape>& shared) {
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
  const auto release = [&](Barrier& barrier) {
    if (lane == 0) barrier.arrive();
  };
  // Values past the end of the sequence may be NaN, which a weight of zero does not stop. Each
  // warpgroup clears them for itself: the others may have started their product, of zeros, too.
  const auto clear_past_end = [&](const PrefillItem& work, int tile, auto values) {
    const int end = work.seq_len - tile * kTileTokens;
    if (end >= kTileTokens) return;
    shared.stage_full[values.index].wait(values.parity);
    for (int i = max(end, 0) * Tile::kChunks + threadIdx.x % kWarpgroupSize;
         i < kTileTokens * Tile::kChunks; i += kWarpgroupSize) {
      *reinterpret_cast<uint4*>(shared.stages[values.index] +
                                Tile::offset(i / Tile::kChunks, i % Tile::kChunks)) = uint4{};
    }
    fence_async_proxy();
    sync_threads(own_barrier, kWarpgroupSize);
  };

  Items<Shape> items(shared);
  const PrefillItem* work = items.next();
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

  shared.query_full[query.index].wait(query.parity);
  shared.stage_full[stage.index].wait(stage.parity);
  multiply_keys(stage.index);
  wait_products<0>();
  pin(scores);
  release(shared.stage_empty[stage.index]);
  stage = stage.next();
  if (tile == work->first_block) release(shared.query_empty[query.index]);
  weigh(tile);
  pack_weights();
  shared.stage_full[stage.index].wait(stage.parity);

  while (true) {
    const bool ends_item = tile == work->first_block;
    const PrefillItem* next_work = work;
    if (ends_item) {
      next_work = items.next();
      if (next_work == nullptr) break;
      query = query.next();
      shared.query_full[query.index].wait(query.parity);
    }
    const int next_tile = ends_item ? next_work->last_block : tile - 1;
    const auto keys = stage, values = stage.next();

    clear_past_end(*work, tile, values);
    pin(scores);
    pin(out);
    multiply_keys(keys.index);
    shared.stage_full[values.index].wait(values.parity);
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
    // Waiting for the next keys here, not where they are used, keeps the compiler from moving the
    // work on the weights behind the wait for the product of the values.
    stage = values.next();
    shared.stage_full[stage.index].wait(stage.parity);
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

// Grid: as many blocks as multiprocessors; each works on item blockIdx.x of the plan and then on
// the next that nobody has. The rows of a tile are query tokens times the query heads of the group.
// Tiles of tokens start at multiples of their size from the sequence's beginning and are taken from
// the last to the first: a row's bits do not depend on the chunk it came in. Of the first
// warpgroup, one warp loads keys and values and kQueryWarps queries; they run ahead of the other
// warpgroups, which multiply. The result goes to out.
template <class Shape>
__global__ void __launch_bounds__(kIsSm90a ? Shape::kNumThreads : 1, 1)
    prefill_sm90_kernel(const __grid_constant__ AttentionLaunch p,
                        const __grid_constant__ CacheMaps maps, PrefillPlan plan,
                        GroupDivisor group) {
  if constexpr (kIsSm90a) {
    Shared<Shape>& shared = *reinterpret_cast<Shared<Shape>*>(dynamic_shared());
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
void dispatch_shape(const AttentionLaunch& p, const Run& run) {
  dispatch_16_bit(p, [&](auto element, auto head_dim) {
    if (p.softcap > 0) {
      run(Shape<decltype(element), head_dim, true>{});
    } else {
      run(Shape<decltype(element), head_dim, false>{});
    }
  });
}

inline bool has_kernels() {
  using Any = Shape<__half, 128, false>;
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
         CacheLayout::keys(p).can_map(p.head_dim) && CacheLayout::values(p).can_map(p.head_dim);
}

void launch_prefill_sm90(const AttentionLaunch& p, cudaStream_t stream) {
  using namespace prefill_sm90;
  dispatch_shape(p, [&](auto shape) {
    using Shape = decltype(shape);
    using Tile = typename Shape::Tile;
    const PrefillPlan plan(p);
    launch_plan_prefill(p, plan, Shape::kTileRows, stream);

    const int box_tokens = std::gcd(p.block_size, Shape::kTileTokens);
    const CacheMaps maps = {CacheLayout::keys(p).map<Tile>(p.dtype, p.block_size, box_tokens),
                            CacheLayout::values(p).map<Tile>(p.dtype, p.block_size, box_tokens),
                            box_tokens};
    const int64_t max_items = PrefillTile::max_tiles(p, Shape::kTileRows) * p.num_kv_heads;
    const auto num_blocks = std::min<int64_t>(max_items, num_multiprocessors());
    launch_dependent_kernel("paged_attention prefill", prefill_sm90_kernel<Shape>,
                            static_cast<unsigned>(num_blocks), Shape::kNumThreads,
                            sizeof(Shared<Shape>), stream, p, maps, plan,
                            GroupDivisor(p.num_heads / p.num_kv_heads));
  });
}

}  // namespace nano_vllm::cuda
