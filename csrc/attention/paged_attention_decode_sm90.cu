// Decode attention for sm_90: blocks that stream keys and values through shared memory by the copy
// engine, see decode_plan.cuh for who does what.
#include <algorithm>

#include "attention/attention_kernels.cuh"
#include "attention/cache_map.cuh"
#include "attention/decode_operands_float8.cuh"
#include "attention/decode_plan.cuh"
#include "attention/split_results.cuh"

namespace nano_vllm::cuda {
namespace decode_sm90 {  // not anonymous: for other architectures most of it is unused

constexpr int kConsumers = kConsumerWarps * kWarpSize;
constexpr int kNumThreads = kConsumers + kWarpSize;  // and a warp that copies
constexpr int kWarpTokens = kStageTokens / kConsumerWarps;
static_assert(kWarpTokens == 16);  // the K of an mma

template <class T_, class Cache_, int kHeadDim_, int kTileRows_>
struct Shape {
  using T = T_;
  using Cache = Cache_;
  static constexpr int kHeadDim = kHeadDim_, kTileRows = kTileRows_;
  using Tile = CacheTile<Cache, kHeadDim>;  // keys or values of a stage
  using Query = std::conditional_t<kIsFloat8<Cache>, Float8QueryFragments<T, kHeadDim, kTileRows>,
                                   QueryFragments<T, kHeadDim, kTileRows>>;
  using Weight = std::conditional_t<kIsFloat8<Cache>, __half, T>;
  using Results = SplitResults<kHeadDim, kTileRows>;
  static constexpr size_t kTileBytes = Tile::bytes(kStageTokens);
  static constexpr size_t kQueryBytes = kTileRows * Query::kRowStride;
  // The ring takes what the results, queries of two units and barriers leave of a block's share in
  // an SM's 228 KiB, of which each block takes 1 KiB for the system.
  static constexpr int kBlocksPerSm = plan_blocks_per_sm(kHeadDim);
  static constexpr size_t kBudget = 228 * 1024 / kBlocksPerSm - 1024;
  static constexpr int kMaxSlots = 32 / sizeof(Cache);
  static constexpr size_t kFixedBytes =
      sizeof(float) * Results::kFloats + 2 * kQueryBytes + (2 * kMaxSlots + 4) * sizeof(Barrier);
  static constexpr int kSlots =
      std::min(kMaxSlots, static_cast<int>((kBudget - kFixedBytes) / kTileBytes));
  static_assert(kSlots >= 3);
};

template <class Shape>
struct Shared {
  alignas(1024) unsigned char ring[Shape::kSlots][Shape::kTileBytes];
  alignas(16) unsigned char queries[2][Shape::kQueryBytes];
  alignas(16) float results[Shape::Results::kFloats];
  Barrier full[Shape::kSlots], empty[Shape::kSlots];
  Barrier query_full[2], query_empty[2];

  __device__ void init_barriers() {
    for (Barrier& barrier : full) barrier.init(1);
    for (Barrier& barrier : empty) barrier.init(kConsumerWarps);
    for (Barrier& barrier : query_full) barrier.init(1);
    for (Barrier& barrier : query_empty) barrier.init(kConsumerWarps);
    publish_barriers();
  }
};

// A block's part of the line: units one after the other, each with a range of its splits.
struct Part {
  DecodeCut begin, end;

  // Of a unit that is cut. Where it begins in this part, it is the one that the part's end cuts.
  __device__ int owner(int first_split) const { return first_split > 0 ? begin.owner : end.owner; }

  // Calls run(seq, rows, splits, unit, first_split, last_split) for each.
  template <int kTileRows, class Run>
  __device__ void for_each_unit(const AttentionLaunch& p, const DecodeGeometry& geometry,
                                const Run& run) const {
    for (int seq = begin.seq; seq <= end.seq && seq < p.num_seqs; ++seq) {
      const int first_unit = seq == begin.seq ? begin.unit : 0;
      if (seq == end.seq && end.unit == 0 && end.split == 0) break;
      const SequenceRows rows = seq == begin.seq ? begin.rows(geometry.group) : decode_rows(p, seq);
      if (!rows.is_decode(p.max_decode_queries)) continue;
      const DecodeSplits splits(rows, p.sliding_window, geometry.max_splits);
      if (splits.count == 0) continue;
      const int num_units = p.num_kv_heads * ceil_div(rows.num_rows(), kTileRows);
      for (int unit = first_unit; unit < num_units; ++unit) {
        const bool is_begin = seq == begin.seq && unit == begin.unit;
        const bool is_end = seq == end.seq && unit == end.unit;
        const int first_split = is_begin ? begin.split : 0;
        const int last_split = is_end ? end.split : splits.count;
        if (first_split < last_split) run(seq, rows, splits, unit, first_split, last_split);
        if (is_end) break;
      }
    }
  }
};

// --- the copying warp ---

// The numbers of the blocks in which a lane's runs lie, 32 runs of the line of a unit at a time:
// looked up together and one batch ahead, as a look-up may take as long as several stages.
struct BlockLookup {
  const int32_t* block_table;
  BlockDivisor block;
  int run, first_token;  // of the batches; a multiple of run
  TokenRange visible;
  int batch = -1, current = 0, next = 0;

  __device__ int load(int index) const {
    const int token =
        first_token + (index * kWarpSize + static_cast<int>(threadIdx.x % kWarpSize)) * run;
    const bool is_visible = token < visible.end && token + run > visible.begin;
    return is_visible ? block_table[block.block_of(token)] : 0;
  }

  // Of the lane's run, counted from the first_run-th on; called by whole warps with ascending ones
  // that a batch holds together.
  __device__ int block_at(int first_run) {
    const int wanted = first_run / kWarpSize;
    if (wanted != batch) {
      current = wanted == batch + 1 && batch >= 0 ? next : load(wanted);
      batch = wanted;
      next = load(wanted + 1);
    }
    return __shfl_sync(~0u, current, (first_run + threadIdx.x) % kWarpSize);
  }
};

// Brings the queries of each unit of the part, and streams all its stages, a tile of keys and one
// of values each, into the ring. Runs of tokens that nobody sees are not read.
template <class Shape>
__device__ void copy_part(const AttentionLaunch& p, const DecodeGeometry& geometry,
                          const CacheMap& keys, const CacheMap& values, const Part& part,
                          Shared<Shape>& shared) {
  using T = typename Shape::T;
  const int lane = threadIdx.x % kWarpSize;
  const int run = geometry.run_tokens, runs_per_stage = geometry.runs_per_stage;
  const uint32_t run_bytes = Shape::Tile::bytes(run);
  RingPosition<Shape::kSlots> at;
  RingPosition<2> query;
  part.for_each_unit<Shape::kTileRows>(
      p, geometry,
      [&](int seq, const SequenceRows& rows, const DecodeSplits& splits, int unit, int first_split,
          int last_split) {
        const int num_tiles = ceil_div(rows.num_rows(), Shape::kTileRows);
        const int kv_head = unit / num_tiles, first_row = unit % num_tiles * Shape::kTileRows;
        const int last_stage = min(last_split * splits.stages_per_split, splits.num_stages);
        int stage = first_split * splits.stages_per_split;
        BlockLookup lookup{p.block_tables + seq * p.block_tables_stride, geometry.block, run,
                           splits.begin + stage * kStageTokens, splits.visible};

        const int num_rows = min(Shape::kTileRows, rows.num_rows() - first_row);
        constexpr uint32_t kRowBytes = Shape::Query::kRowBytes;
        Barrier& query_full = shared.query_full[query.index];
        shared.query_empty[query.index].wait(query.parity ^ 1);
        if (lane == 0) query_full.arrive_and_expect(num_rows * kRowBytes);
        __syncwarp();
        if (lane < num_rows) {
          const int64_t offset =
              rows.offset(first_row + lane, kv_head, p.query_stride_token, p.query_stride_head);
          bulk_copy(shared.queries[query.index] + lane * Shape::Query::kRowStride,
                    static_cast<const T*>(p.query) + offset, kRowBytes, query_full);
        }
        query = query.next();

#pragma unroll 1
        for (int first_run = 0; stage < last_stage; ++stage, first_run += runs_per_stage) {
          const int token = splits.begin + stage * kStageTokens + lane * run;
          const int block = lookup.block_at(first_run);
          const int row_group = geometry.block.group_in(geometry.block.block_of(token), token);
          const bool copies = lane < runs_per_stage && token < splits.visible.end &&
                              token + run > splits.visible.begin;
          const uint32_t bytes = __popc(__ballot_sync(~0u, copies)) * run_bytes;
#pragma unroll
          for (int tile = 0; tile < 2; ++tile) {
            const CacheMap& cache = tile == 0 ? keys : values;
            shared.empty[at.index].wait(at.parity ^ 1);
            if (lane == 0) shared.full[at.index].arrive_and_expect(bytes);
            __syncwarp();
            if (copies) {
              load_box(shared.ring[at.index] + lane * run_bytes, cache.map, shared.full[at.index],
                       0, 0, 0, row_group, block * cache.block_step + kv_head * cache.head_step);
            }
            at = at.next();
          }
        }
      });
}

// --- the multiplying warps ---

__device__ inline void sync_consumers() { sync_threads(1, kConsumers); }

template <class Shape>
__device__ void multiply_part(const AttentionLaunch& p, const DecodeGeometry& geometry,
                              const DecodePlan& plan, const PrefixSlots& prefix, const Part& part,
                              Shared<Shape>& shared) {
  using T = typename Shape::T;
  using Cache = typename Shape::Cache;
  using Weight = typename Shape::Weight;
  constexpr int kHeadDim = Shape::kHeadDim, kTileRows = Shape::kTileRows;
  constexpr int kCount = kTileRows / 8;  // of queries in a matrix product
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const typename Shape::Results results(shared.results);
  const ScoreTransform transform(p);
  RingPosition<Shape::kSlots> at;
  RingPosition<2> next_query;

  // Waits for the next buffer of a ring and gives it to run, then hands it back: behind what run
  // returns, which it has loaded.
  const auto with_buffer = [&](auto& buffers, auto& full, auto& empty, auto& at, const auto& run) {
    full[at.index].wait(at.parity);
    const uint32_t loaded = run(buffers[at.index]);
    __syncwarp();
    if (lane == 0) empty[at.index].arrive_behind(loaded);
    at = at.next();
  };
  const auto with_next_tile = [&](const auto& run) {
    with_buffer(shared.ring, shared.full, shared.empty, at, run);
  };

  part.for_each_unit<kTileRows>(
      p, geometry,
      [&](int seq, const SequenceRows& rows, const DecodeSplits& splits, int unit, int first_split,
          int last_split) {
        const int num_tiles = ceil_div(rows.num_rows(), kTileRows);
        const int kv_head = unit / num_tiles, first_row = unit % num_tiles * kTileRows;
        const int num_rows = min(kTileRows, rows.num_rows() - first_row);
        const bool is_whole = first_split == 0 && last_split == splits.count;
        const int owner = part.owner(first_split);
        typename Shape::Query query;
        with_buffer(shared.queries, shared.query_full, shared.query_empty, next_query,
                    [&](const unsigned char* rows) { return query.load(rows, num_rows); });
        if constexpr (kIsFloat8<Cache>)
          query.scale_keys(scale_of_head<Cache>(p.key_scale, kv_head));
        TokenRange seen[kCount][2];  // by this lane's queries
#pragma unroll
        for (int i = 0; i < 2 * kCount; ++i) {
          const int row = min(first_row + i / 2 * 8 + lane % 4 * 2 + i % 2, rows.num_rows() - 1);
          seen[i / 2][i % 2] = rows.visible(row, row, p.sliding_window);
        }
        const int last_row = first_row + num_rows - 1;
        const TokenRange seen_by_all{rows.visible(last_row, last_row, p.sliding_window).begin,
                                     rows.position(first_row) + 1};

        const SplitSlots<kHeadDim> slots(p.partial_results, geometry, owner);
        const int prefix_splits = p.prefix_of_seq == nullptr ? 0 : p.prefix_of_seq[seq].num_splits;
        const auto write = [&](int row, RowResult<kHeadDim> result) {
          if (prefix_splits > 0) {
            const int head = kv_head * geometry.group + (first_row + row) % geometry.group;
            result = fold_prefix<kHeadDim>(prefix, prefix_splits, seq, head, result);
          }
          result.write(static_cast<T*>(p.out) + rows.offset(first_row + row, kv_head,
                                                            p.out_stride_token, p.out_stride_head));
        };

        for (int split = first_split; split < last_split; ++split) {
          QueryStates<kCount> states;
          float out[kHeadDim / 16][kCount][4] = {};
          const int last_stage = min((split + 1) * splits.stages_per_split, splits.num_stages);
#pragma unroll 1
          for (int stage = split * splits.stages_per_split; stage < last_stage; ++stage) {
            const int token = splits.begin + stage * kStageTokens + warp * kWarpTokens;
            const bool is_masked =
                token < seen_by_all.begin || token + kWarpTokens > seen_by_all.end;
            float scores[kCount][4];
            with_next_tile([&](const unsigned char* keys) {
              return multiply_keys(scores, query, keys, warp * kWarpTokens);
            });
#pragma unroll
            for (int n = 0; n < kCount; ++n) transform.apply(scores[n]);
            uint32_t keep[2] = {};
            if (is_masked) {
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                const int row = token + lane / 4 + i / 2 * 8;
#pragma unroll
                for (int n = 0; n < kCount; ++n) {
                  const TokenRange range = seen[n][i % 2];
                  if (row < range.begin || row >= range.end) scores[n][i] = -kInfinity;
                }
              }
          // What some query of the sequence sees is in the cache; the rest may be anything.
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                const int column = token + 8 * half + 2 * (lane % 4);
                const auto is_there = [&](int token) {
                  return token >= splits.visible.begin && token < splits.visible.end;
                };
                keep[half] =
                    (is_there(column) ? 0x0000ffff : 0) | (is_there(column + 1) ? 0xffff0000 : 0);
              }
            }
            float rescale[kCount][2];
            if (states.update(scores, rescale)) {
#pragma unroll
              for (int i = 0; i < kHeadDim / 16 * kCount; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j)
                  out[i / kCount][i % kCount][j] *= rescale[i % kCount][j % 2];
              }
            }
            uint32_t weights[kCount][2];
#pragma unroll
            for (int n = 0; n < kCount; ++n) {
              weights[n][0] = transpose_matrix(pack<Weight>(scores[n][0], scores[n][1]));
              weights[n][1] = transpose_matrix(pack<Weight>(scores[n][2], scores[n][3]));
            }
            with_next_tile([&](const unsigned char* values) {
              const int first_row = warp * kWarpTokens;
              return is_masked ? multiply_values<T, Cache, kHeadDim, kCount, true>(
                                     out, weights, values, first_row, keep)
                               : multiply_values<T, Cache, kHeadDim, kCount, false>(
                                     out, weights, values, first_row, keep);
            });
          }
          states.finish();

          if constexpr (kIsFloat8<Cache>) {
            const float value_scale = scale_of_head<Cache>(p.value_scale, kv_head);
#pragma unroll
            for (int i = 0; i < kHeadDim / 16 * kCount; ++i) {
#pragma unroll
              for (float& x : out[i / kCount][i % kCount]) x *= value_scale;
            }
          }
          results.template store<kIsFloat8<Cache>>(out, states, num_rows);
          sync_consumers();
#pragma unroll 1
          for (int row = warp; row < num_rows; row += kConsumerWarps) {
            using Result = RowResult<kHeadDim>;
            const Result merged = results.merge(row);
            if (!is_whole) {
#pragma unroll
              for (int i = 0; i < Result::kCount; ++i) {
                if (!Result::has(i)) continue;
                __stcg(reinterpret_cast<float4*>(slots.out(split, row) + Result::column(i)),
                       vector_of(merged.out[i]));
              }
              if (lane == 0) slots.max_sum(split, row) = make_float2(merged.max, merged.sum);
              continue;
            }
            Result so_far;
            if (split > 0) so_far = results.load_state(row);
            so_far.fold(merged);
            if (split + 1 == splits.count) {
              write(row, so_far);
            } else {
              results.store_state(row, so_far);
            }
          }
          sync_consumers();  // the warps' results may be overwritten
        }
        if (is_whole) return;

        // The last block to bring its splits folds them all. The barrier above has put the other
        // threads' results before this thread's arrival, and the one below theirs after it.
        int* const is_last = reinterpret_cast<int*>(results.max_sum);
        if (threadIdx.x == 0) {
          const int brought = last_split - first_split;
          const bool last = add_arrivals(plan.arrivals + owner, brought) + brought == splits.count;
          if (last) plan.arrivals[owner] = 0;  // for the next launch
          *is_last = last;
        }
        sync_consumers();
        const bool folds = *is_last;
        sync_consumers();
        if (!folds) return;
#pragma unroll 1
        for (int row = warp; row < num_rows; row += kConsumerWarps) {
          write(row, fold_splits(splits.count, row, slots));
        }
      });
}

// Grid: parts of the plan, at the most. A block attends over its part of the line of all splits:
// one warp copies, four multiply 16 tokens of each stage and merge their results at the end of a
// split. Results go to out; those of units that are cut go to the workspace, and from there to out
// by the block that brings the last of them.
template <class Shape>
__global__ void __launch_bounds__(kIsSm90 ? kNumThreads : 1, Shape::kBlocksPerSm)
    decode_kernel(const __grid_constant__ AttentionLaunch p, const DecodeGeometry geometry,
                  const __grid_constant__ CacheMap keys, const __grid_constant__ CacheMap values,
                  const __grid_constant__ PrefixSlots prefix) {
  if constexpr (kIsSm90) {
    Shared<Shape>& shared = *reinterpret_cast<Shared<Shape>*>(dynamic_shared());
    if (threadIdx.x == 0) {
      shared.init_barriers();
      prefetch_map(keys.map);
      prefetch_map(values.map);
    }
    allow_next_kernel();
    // The prefill lets this kernel start once the one before both has ended.
    if (!p.is_beside_prefill) wait_for_last_kernel();
    const DecodePlan plan(p.plan, geometry.max_parts);
    const Part part{plan.cuts[blockIdx.x], plan.cuts[blockIdx.x + 1]};
    if (part.begin.seq < p.num_seqs) {
      __syncthreads();
      if (threadIdx.x >= kConsumers) {
        copy_part<Shape>(p, geometry, keys, values, part, shared);
      } else {
        multiply_part<Shape>(p, geometry, plan, prefix, part, shared);
      }
    }
    // Who waits for this kernel waits for both. The other blocks make room for each other.
    if (p.is_beside_prefill && blockIdx.x == 0) wait_for_last_kernel();
  }
}

template <class Shape>
void launch(const AttentionLaunch& p, const DecodeGeometry& geometry, cudaStream_t stream) {
  const auto map_of = [&](const CacheLayout& cache) {
    return cache.map<typename Shape::Tile>(p.block_size, geometry.run_tokens);
  };
  launch_dependent_kernel("paged_attention decode", decode_kernel<Shape>, dim3(geometry.max_parts),
                          kNumThreads, sizeof(Shared<Shape>), stream, p, geometry,
                          map_of(CacheLayout::keys(p)), map_of(CacheLayout::values(p)),
                          PrefixSlots(p));
}

inline bool has_kernels() {
  static const bool has = has_code(decode_kernel<Shape<__half, __half, 128, 8>>, kNumThreads);
  return has;
}

}  // namespace decode_sm90

bool can_decode_sm90(const AttentionLaunch& p) {
  return p.dtype != DType::kFloat32 && compute_capability() == 90 && decode_sm90::has_kernels() &&
         CacheLayout::keys(p).can_map() && CacheLayout::values(p).can_map() &&
         is_vec_aligned<__half>(p.query, p.query_stride_token, p.query_stride_head) &&
         is_vec_aligned<__half>(p.out, p.out_stride_token, p.out_stride_head);
}

void launch_decode_sm90(const AttentionLaunch& p, cudaStream_t stream) {
  using namespace decode_sm90;
  dispatch_16_bit(p, [&](auto element, auto cache, auto head_dim) {
    using T = decltype(element);
    using Cache = decltype(cache);
    constexpr int kHeadDim = head_dim;
    const DecodeGeometry geometry(p);
    if (geometry.tile_rows == 8) {
      launch<Shape<T, Cache, kHeadDim, 8>>(p, geometry, stream);
    } else {
      launch<Shape<T, Cache, kHeadDim, 16>>(p, geometry, stream);
    }
  });
}

}  // namespace nano_vllm::cuda
