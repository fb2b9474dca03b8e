// Decode attention for sm_90: blocks that stream keys and values through shared memory
// by bulk copies, see decode_plan.cuh for who does what.
//
// A block of a KV head's tokens lies contiguous in the cache, so it arrives as it is, row after row
// without a swizzle. The matrix products take their operands from there by 16-byte loads: the
// contraction of keys and queries may run over the head dimension in any order, and the columns of
// the values may stand in any order, so each lane takes eight neighbouring elements of a row at
// once.
#include <algorithm>

#include "attention/attention_kernels.cuh"
#include "attention/bulk_copy.cuh"
#include "attention/decode_plan.cuh"
#include "attention/online_softmax.cuh"
#include "attention/swizzled_tile.cuh"

namespace nano_vllm::cuda {
namespace decode_sm90 {  // not anonymous: for other architectures most of it is unused

constexpr int kConsumerWarps = 4;
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

// The tile's query rows as left operands. In step s of the head dimension, lane l has elements
// 32 s + 8 (l % 4) .. + 7 of rows l / 4 and l / 4 + 8; the last step may be half as long.
template <class T, int kHeadDim, int kTileRows>
struct QueryFragments {
  static constexpr int kSteps = kHeadDim / 32, kHalfStep = kHeadDim % 32 == 16;
  uint32_t upper[kSteps * 4 + kHalfStep * 2], lower[kTileRows > 8 ? kSteps * 4 + kHalfStep * 2 : 1];

  __device__ void load(const PagedAttentionParams& p, const SequenceRows& rows, int kv_head,
                       int first_row) {
    load_row(upper, p, rows, kv_head, first_row + threadIdx.x % kWarpSize / 4);
    if constexpr (kTileRows > 8) {
      load_row(lower, p, rows, kv_head, first_row + threadIdx.x % kWarpSize / 4 + 8);
    }
  }

  template <int kCount>
  __device__ static void load_row(uint32_t (&to)[kCount], const PagedAttentionParams& p,
                                  const SequenceRows& rows, int kv_head, int row) {
    const bool valid = row < rows.num_rows();
    const T* from =
        static_cast<const T*>(p.query) +
        rows.offset(valid ? row : 0, kv_head, p.query_stride_token, p.query_stride_head);
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const uint4 x = valid ? *reinterpret_cast<const uint4*>(from + 32 * s + 8 * t) : uint4{};
      to[4 * s] = x.x, to[4 * s + 1] = x.y, to[4 * s + 2] = x.z, to[4 * s + 3] = x.w;
    }
    if constexpr (kHalfStep) {
      const uint2 x = valid ? *reinterpret_cast<const uint2*>(from + 32 * kSteps + 4 * t) : uint2{};
      to[4 * kSteps] = x.x, to[4 * kSteps + 1] = x.y;
    }
  }

  // The left operand of product i, two for each step.
  __device__ void operand(int i, uint32_t (&a)[4]) const {
    a[0] = upper[2 * i], a[2] = upper[2 * i + 1];
    a[1] = kTileRows > 8 ? lower[2 * i] : 0, a[3] = kTileRows > 8 ? lower[2 * i + 1] : 0;
  }
};

// scores[j] = the query rows times keys 8 j .. 8 j + 7 of this warp's 16.
template <class T, int kHeadDim, int kTileRows>
__device__ inline void multiply_keys(float (&scores)[2][4],
                                     const QueryFragments<T, kHeadDim, kTileRows>& query,
                                     const T* keys) {
  using Query = QueryFragments<T, kHeadDim, kTileRows>;
  const int lane = threadIdx.x % kWarpSize;
  const T* row = keys + lane / 4 * kHeadDim;
  uint32_t a[4];
#pragma unroll
  for (int s = 0; s < Query::kSteps; ++s) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint4 x =
          *reinterpret_cast<const uint4*>(row + 8 * j * kHeadDim + 32 * s + 8 * (lane % 4));
      query.operand(2 * s, a);
      multiply_add<T>(scores[j], a, x.x, x.y);
      query.operand(2 * s + 1, a);
      multiply_add<T>(scores[j], a, x.z, x.w);
    }
  }
  if constexpr (Query::kHalfStep) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint2 x = *reinterpret_cast<const uint2*>(row + 8 * j * kHeadDim + 32 * Query::kSteps +
                                                      4 * (lane % 4));
      query.operand(2 * Query::kSteps, a);
      multiply_add<T>(scores[j], a, x.x, x.y);
    }
  }
}

// Columns of the values that a lane has: of each group of 8 kElements columns, lane l multiplies
// kElements neighbours, from kElements (l / 4) on; accumulator i of the group holds in column n the
// n-th lanes' i-th one.
template <int kHeadDim>
struct ValueColumns {
  static constexpr int kElements = kHeadDim % 64 == 0 ? 8 : kHeadDim % 32 == 0 ? 4 : 2;
  static constexpr int kGroups = kHeadDim / (8 * kElements);
};

template <int kCount>
__device__ inline void load_words(uint32_t (&words)[kCount], const void* from) {
  if constexpr (kCount == 4) {
    const uint4 x = *static_cast<const uint4*>(from);
    words[0] = x.x, words[1] = x.y, words[2] = x.z, words[3] = x.w;
  } else if constexpr (kCount == 2) {
    const uint2 x = *static_cast<const uint2*>(from);
    words[0] = x.x, words[1] = x.y;
  } else {
    words[0] = *static_cast<const uint32_t*>(from);
  }
}

// out += weights [16, 16] times this warp's 16 values. Of an operand pair, the halves are tokens
// 2 (l % 4) and the next; those that `keep` masks out count as zeros, whatever they hold.
template <class T, int kHeadDim, bool kMasked>
__device__ inline void multiply_values(float (&out)[kHeadDim / 8][4], const uint32_t (&weights)[4],
                                       const T* values, const uint32_t (&keep)[2]) {
  using Columns = ValueColumns<kHeadDim>;
  constexpr int kElements = Columns::kElements;
  const int lane = threadIdx.x % kWarpSize;
  const T* row = values + 2 * (lane % 4) * kHeadDim + lane / 4 * kElements;
#pragma unroll
  for (int group = 0; group < Columns::kGroups; ++group) {
    uint32_t b[2][kElements];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t even[kElements / 2], odd[kElements / 2];
      const T* from = row + 8 * half * kHeadDim + group * 8 * kElements;
      load_words(even, from);
      load_words(odd, from + kHeadDim);
#pragma unroll
      for (int i = 0; i < kElements / 2; ++i) {
        b[half][2 * i] = __byte_perm(even[i], odd[i], 0x5410);
        b[half][2 * i + 1] = __byte_perm(even[i], odd[i], 0x7632);
        if (kMasked) b[half][2 * i] &= keep[half], b[half][2 * i + 1] &= keep[half];
      }
    }
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      multiply_add<T>(out[group * kElements + i], weights, b[0][i], b[1][i]);
    }
  }
}

// A row's result over some tokens, held by a warp: lane l has columns l, l + 32 and so on of the
// weighted values. Rounded step by step, so that a fold gives the same bits wherever it is made.
template <int kHeadDim>
struct RowResult {
  static constexpr int kColumns = ceil_div(kHeadDim, kWarpSize);
  float max = -kInfinity, sum = 0, out[kColumns] = {};

  __device__ static int column(int i) { return threadIdx.x % kWarpSize + i * kWarpSize; }
  __device__ static bool is_column(int i) {
    return kHeadDim % kWarpSize == 0 || column(i) < kHeadDim;
  }
  __device__ static float shift_of(float max) { return max == -kInfinity ? 0 : max; }

  // this = this * mine + next * its
  __device__ void add(float next_sum, const float (&next_out)[kColumns], float mine, float its) {
    sum = __fmaf_rn(sum, mine, __fmul_rn(next_sum, its));
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      out[i] = __fmaf_rn(out[i], mine, __fmul_rn(next_out[i], its));
    }
  }

  __device__ void fold(const RowResult& next) {
    const float new_max = fmaxf(max, next.max), shift = shift_of(new_max);
    add(next.sum, next.out, exp2_approx(max - shift), exp2_approx(next.max - shift));
    max = new_max;
  }

  template <class T>
  __device__ void write(T* row) const {
    const float inverse = sum == 0 ? 0 : 1 / sum;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (is_column(i)) row[column(i)] = from_float<T>(out[i] * inverse);
    }
  }
};

// What the multiplying warps share: each warp's result of a split, and a unit's result so far.
template <int kHeadDim, int kTileRows>
struct SplitResults {
  static constexpr int kRowStride = kHeadDim + 4;
  float* out;            // [kConsumerWarps, kTileRows, kRowStride]
  float* max_sum;        // [kConsumerWarps, kTileRows, 2]
  float* state;          // [kTileRows, kHeadDim]
  float* state_max_sum;  // [kTileRows, 2]

  __device__ explicit SplitResults(float* memory)
      : out(memory),
        max_sum(out + kConsumerWarps * kTileRows * kRowStride),
        state(max_sum + kConsumerWarps * kTileRows * 2),
        state_max_sum(state + kTileRows * kHeadDim) {}

  // A warp's accumulators; rows at or past num_rows are not wanted.
  __device__ void store(const float (&columns)[kHeadDim / 8][4], const RowStates& states,
                        int num_rows) const {
    using Columns = ValueColumns<kHeadDim>;
    constexpr int kElements = Columns::kElements;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
    for (int half = 0; half < (kTileRows > 8 ? 2 : 1); ++half) {
      const int row = lane / 4 + 8 * half;
      if (row >= num_rows) continue;
      float* to = out + (warp * kTileRows + row) * kRowStride + lane % 4 * 2 * kElements;
#pragma unroll
      for (int group = 0; group < Columns::kGroups; ++group) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
#pragma unroll
          for (int i = 0; i < kElements; i += 2) {
            *reinterpret_cast<float2*>(to + group * 8 * kElements + side * kElements + i) =
                make_float2(columns[group * kElements + i][2 * half + side],
                            columns[group * kElements + i + 1][2 * half + side]);
          }
        }
      }
      if (lane % 4 == 0) {
        *reinterpret_cast<float2*>(max_sum + (warp * kTileRows + row) * 2) =
            make_float2(states.max[half], states.sum[half]);
      }
    }
  }

  // The split's result, the warps' in their order.
  __device__ RowResult<kHeadDim> merge(int row) const {
    using Result = RowResult<kHeadDim>;
    float2 of_warp[kConsumerWarps];
    Result merged;
#pragma unroll
    for (int warp = 0; warp < kConsumerWarps; ++warp) {
      of_warp[warp] = *reinterpret_cast<const float2*>(max_sum + (warp * kTileRows + row) * 2);
      merged.max = fmaxf(merged.max, of_warp[warp].x);
    }
#pragma unroll
    for (int warp = 0; warp < kConsumerWarps; ++warp) {
      float values[Result::kColumns];
#pragma unroll
      for (int i = 0; i < Result::kColumns; ++i) {
        values[i] = Result::is_column(i)
                        ? out[(warp * kTileRows + row) * kRowStride + Result::column(i)]
                        : 0;
      }
      const float weight = exp2_approx(of_warp[warp].x - Result::shift_of(merged.max));
      merged.add(of_warp[warp].y, values, 1, weight);
    }
    return merged;
  }

  __device__ RowResult<kHeadDim> load_state(int row) const {
    using Result = RowResult<kHeadDim>;
    Result so_far;
    so_far.max = state_max_sum[row * 2], so_far.sum = state_max_sum[row * 2 + 1];
#pragma unroll
    for (int i = 0; i < Result::kColumns; ++i) {
      if (Result::is_column(i)) so_far.out[i] = state[row * kHeadDim + Result::column(i)];
    }
    return so_far;
  }

  __device__ void store_state(int row, const RowResult<kHeadDim>& so_far) const {
    using Result = RowResult<kHeadDim>;
#pragma unroll
    for (int i = 0; i < Result::kColumns; ++i) {
      if (Result::is_column(i)) state[row * kHeadDim + Result::column(i)] = so_far.out[i];
    }
    __syncwarp();  // every lane has loaded what is now overwritten
    if (threadIdx.x % kWarpSize == 0) {
      state_max_sum[row * 2] = so_far.max, state_max_sum[row * 2 + 1] = so_far.sum;
    }
    __syncwarp();
  }
};

// The fold of all splits of a row, from the workspace. Lane l looks after split l.
template <int kHeadDim, class Slot>
__device__ RowResult<kHeadDim> fold_splits(int count, int row, const Slot& slot_of) {
  using Result = RowResult<kHeadDim>;
  static_assert(kMaxPlannedSplits == kWarpSize);
  constexpr int kAtOnce = 32 / Result::kColumns;
  const int lane = threadIdx.x % kWarpSize;
  float2 max_sum = make_float2(-kInfinity, 0);
  if (lane < count) {
    max_sum = __ldcg(reinterpret_cast<const float2*>(slot_of(lane).max_sum + row * 2));
  }
  float values[kAtOnce][Result::kColumns];
  const auto load_values = [&](int first) {
#pragma unroll
    for (int s = 0; s < kAtOnce; ++s) {
      const float* from = slot_of(first + s).out + row * kHeadDim;
#pragma unroll
      for (int i = 0; i < Result::kColumns; ++i) {
        const bool is_there = first + s < count && Result::is_column(i);
        values[s][i] = is_there ? __ldcg(from + Result::column(i)) : 0;
      }
    }
  };
  load_values(0);
  float max = max_sum.x;  // of the splits up to this lane's
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const float before = __shfl_up_sync(~0u, max, offset);
    if (lane >= offset) max = fmaxf(max, before);
  }
  const float max_before = __shfl_up_sync(~0u, max, 1);
  const float shift = Result::shift_of(max);
  const float mine = lane == 0 ? 0 : exp2_approx(max_before - shift);
  const float its = exp2_approx(max_sum.x - shift);
  Result result;
#pragma unroll 1
  for (int first = 0; first < count; first += kAtOnce) {
    if (first > 0) load_values(first);
#pragma unroll
    for (int s = 0; s < kAtOnce; ++s) {
      const int split = first + s;
      if (split >= count) break;
      result.add(__shfl_sync(~0u, max_sum.y, split), values[s], __shfl_sync(~0u, mine, split),
                 __shfl_sync(~0u, its, split));
    }
  }
  return result;
}

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
