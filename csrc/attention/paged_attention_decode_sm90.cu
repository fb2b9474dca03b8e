// Decode attention for sm_90: blocks that stream keys and values through shared memory
// by bulk copies, see decode_plan.cuh for who does what.
#include <algorithm>

#include "attention/attention_kernels.cuh"
#include "attention/bulk_copy.cuh"
#include "attention/decode_operands.cuh"
#include "attention/decode_plan.cuh"
#include "attention/split_results.cuh"
#include "attention/swizzled_tile.cuh"

namespace nano_vllm::cuda {
namespace decode_sm90 {  // not anonymous: for other architectures most of it is unused

constexpr int kConsumers = kConsumerWarps * kWarpSize;
constexpr int kNumThreads = kConsumers + kWarpSize;  // and a warp that copies
constexpr int kWarpTokens = kStageTokens / kConsumerWarps;
static_assert(kWarpTokens == 16);  // the K of an mma

template <class T, int kHeadDim, int kTileRows>
struct DecodeShape {
  static constexpr int kTileSize = kStageTokens * kHeadDim;  // keys or values of a stage
  static constexpr int kRowStride = kHeadDim + 4;            // of the warps' results, in floats
  // The warps' results of a split, and the unit's result so far, each with (max, sum) for each row.
  static constexpr int kResultFloats = kConsumerWarps * kTileRows * (kRowStride + 2);
  static constexpr int kStateFloats = kTileRows * (kHeadDim + 2);
  static constexpr size_t kFixedBytes = sizeof(float) * (kResultFloats + kStateFloats) + 256;
  // Of an SM's 228 KiB each block takes 1 KiB for the system.
  static constexpr int kBlocksPerSm = plan_blocks_per_sm(kHeadDim);
  static constexpr size_t kBudget = 228 * 1024 / kBlocksPerSm - 1024;
  static constexpr size_t kTileBytes = kTileSize * sizeof(T);
  static constexpr int kMaxSlots = 16;
  static constexpr int kSlots =
      std::min(kMaxSlots, static_cast<int>((kBudget - kFixedBytes) / kTileBytes));
  static constexpr size_t kSharedBytes = kFixedBytes + kSlots * kTileBytes;
  static_assert(kSlots >= 3 && 2 * kMaxSlots * sizeof(Barrier) <= 256);
};

// A block's part of the line: units one after the other, each with a range of its splits.
struct Part {
  DecodeCut begin, end;

  // Of a unit that is cut. Where it begins in this part, it is the one that the part's end cuts.
  __device__ int owner(int first_split) const { return first_split > 0 ? begin.owner : end.owner; }

  // Calls run(seq, rows, splits, unit, first_split, last_split) for each.
  template <class Run>
  __device__ void for_each_unit(const AttentionLaunch& p, int tile_rows, const Run& run) const {
    for (int seq = begin.seq; seq <= end.seq && seq < p.num_seqs; ++seq) {
      const int first_unit = seq == begin.seq ? begin.unit : 0;
      if (seq == end.seq && end.unit == 0 && end.split == 0) break;
      const SequenceRows rows = seq == begin.seq ? begin.rows(p) : SequenceRows(p, seq);
      if (!rows.is_decode(p.max_decode_queries)) continue;
      const DecodeSplits splits(rows, p.sliding_window);
      if (splits.count == 0) continue;
      const int num_units = p.num_kv_heads * ceil_div(rows.num_rows(), tile_rows);
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

// Tokens that lie together in the cache wherever a run of them begins at a multiple.
__device__ inline int run_tokens(int block_size) {
  if (block_size % kStageTokens == 0) return kStageTokens;
  return kStageTokens % block_size == 0 ? block_size : kRunTokens;
}

// The numbers of the blocks in which a lane's runs lie, 32 runs of the line of a unit at a time:
// looked up together and one batch ahead, as a look-up may take as long as several stages.
struct BlockLookup {
  const int32_t* block_table;
  int block_size, run, first_token;  // of the batches; a multiple of run
  TokenRange visible;
  int batch = -1, current = 0, next = 0;

  __device__ int load(int index) const {
    const int token =
        first_token + (index * kWarpSize + static_cast<int>(threadIdx.x % kWarpSize)) * run;
    const bool is_visible = token < visible.end && token + run > visible.begin;
    return is_visible ? block_table[token / block_size] : 0;
  }

  // Of the run at this token; called by whole warps with ascending stages.
  __device__ int block_at(int token) {
    const int index = (token - first_token) / run;
    const int wanted = __shfl_sync(~0u, index, 0) / kWarpSize;
    if (wanted != batch) {
      current = wanted == batch + 1 && batch >= 0 ? next : load(wanted);
      batch = wanted;
      next = load(wanted + 1);
    }
    return __shfl_sync(~0u, current, index % kWarpSize);
  }
};

// Streams all stages of the part, a tile of keys and one of values each, into the ring. Runs of
// tokens that nobody sees are not read.
template <class T, int kHeadDim, int kSlots>
__device__ void copy_part(const AttentionLaunch& p, int tile_rows, const Part& part, T* ring,
                          Barrier* full, Barrier* empty) {
  constexpr int kTileSize = kStageTokens * kHeadDim;
  const int lane = threadIdx.x % kWarpSize, run = run_tokens(p.block_size);
  RingPosition<kSlots> at;
  part.for_each_unit(
      p, tile_rows,
      [&](int seq, const SequenceRows& rows, const DecodeSplits& splits, int unit, int first_split,
          int last_split) {
        const int kv_head = unit / ceil_div(rows.num_rows(), tile_rows);
        const T* keys = static_cast<const T*>(p.key_cache) + kv_head * p.key_stride_head;
        const T* values = static_cast<const T*>(p.value_cache) + kv_head * p.value_stride_head;
        const int last_stage = min(last_split * splits.stages_per_split, splits.num_stages);
        int stage = first_split * splits.stages_per_split;
        BlockLookup lookup{p.block_tables + seq * p.block_tables_stride, p.block_size, run,
                           splits.begin + stage * kStageTokens, splits.visible};
#pragma unroll 1
        for (; stage < last_stage; ++stage) {
          const int token = splits.begin + stage * kStageTokens + lane * run;
          const int64_t block = lookup.block_at(token), row = token % p.block_size;
          const bool copies = lane * run < kStageTokens && token < splits.visible.end &&
                              token + run > splits.visible.begin;
          const T* key = keys + block * p.key_stride_block + row * kHeadDim;
          const T* value = values + block * p.value_stride_block + row * kHeadDim;
          const uint32_t run_bytes = run * kHeadDim * sizeof(T);
          const uint32_t bytes = __popc(__ballot_sync(~0u, copies)) * run_bytes;
#pragma unroll
          for (int tile = 0; tile < 2; ++tile) {
            empty[at.index].wait(at.parity ^ 1);
            if (lane == 0) full[at.index].arrive_and_expect(bytes);
            __syncwarp();
            if (copies) {
              bulk_copy(ring + at.index * kTileSize + lane * run * kHeadDim,
                        tile == 0 ? key : value, run_bytes, full[at.index]);
            }
            at = at.next();
          }
        }
      });
}

// --- the multiplying warps ---

__device__ inline void sync_consumers() { sync_threads(1, kConsumers); }

template <class T, int kHeadDim, int kTileRows>
__device__ void multiply_part(const AttentionLaunch& p, const DecodeGeometry& geometry,
                              const DecodePlan& plan, const Part& part, const T* ring,
                              Barrier* full, Barrier* empty, float* memory) {
  using Shape = DecodeShape<T, kHeadDim, kTileRows>;
  constexpr int kTileSize = Shape::kTileSize;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const SplitResults<kHeadDim, kTileRows> results(memory);
  const ScoreTransform transform(p);
  RingPosition<Shape::kSlots> at;

  // Waits for the next tile and gives this warp's tokens of it to run, then hands the slot back.
  const auto with_next_tile = [&](const auto& run) {
    full[at.index].wait(at.parity);
    run(ring + at.index * kTileSize + warp * kWarpTokens * kHeadDim);
    __syncwarp();
    if (lane == 0) empty[at.index].arrive();
    at = at.next();
  };

  part.for_each_unit(
      p, kTileRows,
      [&](int, const SequenceRows& rows, const DecodeSplits& splits, int unit, int first_split,
          int last_split) {
        const int num_tiles = ceil_div(rows.num_rows(), kTileRows);
        const int kv_head = unit / num_tiles, first_row = unit % num_tiles * kTileRows;
        const int num_rows = min(kTileRows, rows.num_rows() - first_row);
        const bool is_whole = first_split == 0 && last_split == splits.count;
        const int owner = part.owner(first_split);
        QueryFragments<T, kHeadDim, kTileRows> query;
        query.load(p, rows, kv_head, first_row);
        TokenRange seen[2];  // by this lane's rows, and by all rows of the tile
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = min(first_row + lane / 4 + 8 * half, rows.num_rows() - 1);
          seen[half] = rows.visible(row, row, p.sliding_window);
        }
        const int last_row = first_row + num_rows - 1;
        const TokenRange seen_by_all{rows.visible(last_row, last_row, p.sliding_window).begin,
                                     rows.position(first_row) + 1};

        const auto slot_of = [&](int split) {
          return SplitSlot(p.partial_results, geometry, owner, split, kHeadDim);
        };
        const auto out_row = [&](int row) {
          return static_cast<T*>(p.out) +
                 rows.offset(first_row + row, kv_head, p.out_stride_token, p.out_stride_head);
        };

        for (int split = first_split; split < last_split; ++split) {
          RowStates states;
          float out[kHeadDim / 8][4] = {};
          const int last_stage = min((split + 1) * splits.stages_per_split, splits.num_stages);
#pragma unroll 1
          for (int stage = split * splits.stages_per_split; stage < last_stage; ++stage) {
            const int token = splits.begin + stage * kStageTokens + warp * kWarpTokens;
            const bool is_masked =
                token < seen_by_all.begin || token + kWarpTokens > seen_by_all.end;
            float scores[2][4] = {};
            with_next_tile(
                [&](const T* keys) { multiply_keys<T, kHeadDim, kTileRows>(scores, query, keys); });
            transform.apply(scores[0]);
            transform.apply(scores[1]);
            uint32_t keep[2] = {};
            if (is_masked) {
#pragma unroll
              for (int j = 0; j < 2; ++j) {
                const int column = token + 8 * j + 2 * (lane % 4);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                  const TokenRange range = seen[i / 2];
                  if (column + i % 2 < range.begin || column + i % 2 >= range.end) {
                    scores[j][i] = -kInfinity;
                  }
                }
                // What some query of the sequence sees is in the cache; the rest may be anything.
                const auto is_there = [&](int token) {
                  return token >= splits.visible.begin && token < splits.visible.end;
                };
                keep[j] =
                    (is_there(column) ? 0x0000ffff : 0) | (is_there(column + 1) ? 0xffff0000 : 0);
              }
            }
            float rescale[2];
            states.update(scores, rescale);
            rescale_rows(out, rescale);
            uint32_t weights[4];
            pack_operand<T>(weights, scores[0], scores[1]);
            with_next_tile([&](const T* values) {
              if (is_masked) {
                multiply_values<T, kHeadDim, true>(out, weights, values, keep);
              } else {
                multiply_values<T, kHeadDim, false>(out, weights, values, keep);
              }
            });
          }
          states.finish();

          results.store(out, states, num_rows);
          sync_consumers();
          for (int row = warp; row < num_rows; row += kConsumerWarps) {
            using Result = RowResult<kHeadDim>;
            const Result merged = results.merge(row);
            if (!is_whole) {
              const SplitSlot slot = slot_of(split);
#pragma unroll
              for (int i = 0; i < Result::kColumns; ++i) {
                if (Result::is_column(i))
                  slot.out[row * kHeadDim + Result::column(i)] = merged.out[i];
              }
              if (lane == 0) {
                *reinterpret_cast<float2*>(slot.max_sum + row * 2) =
                    make_float2(merged.max, merged.sum);
              }
              continue;
            }
            Result so_far;
            if (split > 0) so_far = results.load_state(row);
            so_far.fold(merged);
            if (split + 1 == splits.count) {
              so_far.write(out_row(row));
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
        for (int row = warp; row < num_rows; row += kConsumerWarps) {
          fold_splits<kHeadDim>(splits.count, row, slot_of).write(out_row(row));
        }
      });
}

// Grid: parts of the plan, at the most. A block attends over its part of the line of all splits:
// one warp copies, four multiply 16 tokens of each stage and merge their results at the end of a
// split. Results go to out; those of units that are cut go to the workspace, and from there to out
// by the block that brings the last of them.
template <class T, int kHeadDim, int kTileRows>
__global__ void __launch_bounds__(kIsSm90 ? kNumThreads : 1,
                                  (DecodeShape<T, kHeadDim, kTileRows>::kBlocksPerSm))
    decode_kernel(const __grid_constant__ AttentionLaunch p, const DecodeGeometry geometry) {
  if constexpr (kIsSm90) {
    using Shape = DecodeShape<T, kHeadDim, kTileRows>;
    constexpr int kSlots = Shape::kSlots;
    unsigned char* const shared = dynamic_shared();
    T* const ring = reinterpret_cast<T*>(shared);
    float* const results = reinterpret_cast<float*>(ring + kSlots * Shape::kTileSize);
    Barrier* const full =
        reinterpret_cast<Barrier*>(results + Shape::kResultFloats + Shape::kStateFloats);
    Barrier* const empty = full + kSlots;
    const DecodePlan plan(p.plan, geometry.max_parts);
    const Part part{plan.cuts[blockIdx.x], plan.cuts[blockIdx.x + 1]};
    if (part.begin.seq >= p.num_seqs) return;

    if (threadIdx.x == 0) {
      for (int slot = 0; slot < kSlots; ++slot) {
        full[slot].init(1);
        empty[slot].init(kConsumerWarps);
      }
      publish_barriers();
    }
    __syncthreads();
    if (threadIdx.x >= kConsumers) {
      copy_part<T, kHeadDim, kSlots>(p, kTileRows, part, ring, full, empty);
    } else {
      multiply_part<T, kHeadDim, kTileRows>(p, geometry, plan, part, ring, full, empty, results);
    }
  }
}

template <class T, int kHeadDim, int kTileRows>
void launch(const AttentionLaunch& p, const DecodeGeometry& geometry, cudaStream_t stream) {
  using Shape = DecodeShape<T, kHeadDim, kTileRows>;
  launch_kernel("paged_attention decode", decode_kernel<T, kHeadDim, kTileRows>,
                dim3(geometry.max_parts), kNumThreads, Shape::kSharedBytes, stream, p, geometry);
}

inline bool has_kernels() {
  static const bool has = has_code(decode_kernel<__half, 128, 8>, kNumThreads);
  return has;
}

}  // namespace decode_sm90

bool can_decode_sm90(const AttentionLaunch& p) {
  const auto is_together = [&](int64_t stride_token, int64_t stride_head, int64_t stride_block,
                               const void* cache) {
    return stride_token == p.head_dim && is_vec_aligned<__half>(cache, stride_head, stride_block);
  };
  return p.dtype != DType::kFloat32 && compute_capability() == 90 && decode_sm90::has_kernels() &&
         is_together(p.key_stride_token, p.key_stride_head, p.key_stride_block, p.key_cache) &&
         is_together(p.value_stride_token, p.value_stride_head, p.value_stride_block,
                     p.value_cache) &&
         is_vec_aligned<__half>(p.query, p.query_stride_token, p.query_stride_head);
}

void launch_decode_sm90(const AttentionLaunch& p, cudaStream_t stream) {
  using namespace decode_sm90;
  dispatch_16_bit(p, [&](auto element, auto head_dim) {
    using T = decltype(element);
    constexpr int kHeadDim = head_dim;
    const DecodeGeometry geometry(p);
    if (geometry.tile_rows == 8) {
      launch<T, kHeadDim, 8>(p, geometry, stream);
    } else {
      launch<T, kHeadDim, 16>(p, geometry, stream);
    }
  });
}

}  // namespace nano_vllm::cuda
