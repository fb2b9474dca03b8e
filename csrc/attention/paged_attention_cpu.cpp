// CPU paged attention: one task takes one KV head of one sequence and up to kMaxRows rows, a row
// being a query token and one of the query heads that share the KV head. It passes over the keys in
// tiles of kTileKeys, each read once for all its rows, with the online softmax of FlashAttention
// (arXiv 2205.14135).
//
// A row's result is a function of the row and its keys alone. Keys are tiled from position 0 of the
// sequence; every kSpanKeys of them give one partial result (Flash-Decoding's split, at fixed
// places), and a row's partial results are merged in order. Spans may therefore run on different
// threads, and neither the number of threads nor the chunking of a prompt nor the rest of the batch
// changes a bit.
#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "attention/paged_attention.h"
#include "cache/store_head.h"
#include "common/dot_tile.h"
#include "common/parallel.h"
#include "common/simd_math.h"

namespace nano_vllm::cpu {
namespace {

constexpr int kTileKeys = 64;
constexpr int kSpanKeys = 4 * kTileKeys;
constexpr int kMaxRows = 48;
constexpr int kTasksPerThread = 4;  // enough for threads to finish together
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Task {
  int32_t seq, kv_head;
  int64_t first_row;  // of the sequence's query_len * group rows: row r is token r / group
  int32_t num_rows;
  int64_t key_begin, key_end;  // positions that its rows see
  int64_t partial;             // its first row in the partial results of split tasks

  int64_t first_span() const { return key_begin / kSpanKeys; }
  int64_t num_spans() const { return (key_end + kSpanKeys - 1) / kSpanKeys - first_span(); }
};

// Result of a row over some of its keys: the values weighted by exp(score - max), not yet divided
// by the sum of the weights.
struct Partial {
  float* out;  // [rows, head_dim]
  float* max;  // [rows]
  float* sum;  // [rows]
};

Partial partial_at(float* memory, int64_t rows, int64_t head_dim) {
  return {memory, memory + rows * head_dim, memory + rows * (head_dim + 1)};
}

// Working memory of a task, in floats. Rows of float32, whatever the dtype.
struct TaskScratch {
  float* query;   // [kMaxRows, head_dim]
  float* scores;  // [kMaxRows, kTileKeys]
  float* keys;    // [kTileKeys, head_dim]
  float* values;  // [kTileKeys, head_dim]
  Partial total, span;

  static int64_t numel(int64_t d) { return kMaxRows * (3 * d + 4 + kTileKeys) + 2 * kTileKeys * d; }

  TaskScratch(float* memory, int64_t d)
      : query(memory),
        scores(query + kMaxRows * d),
        keys(scores + kMaxRows * kTileKeys),
        values(keys + kTileKeys * d),
        total(partial_at(values + kTileKeys * d, kMaxRows, d)),
        span(partial_at(values + kTileKeys * d + kMaxRows * (d + 2), kMaxRows, d)) {}
};

template <class T, class Cache>
class Attention {
 public:
  Attention(const PagedAttentionParams& params, const Task& task)
      : p_(params), task_(task), group_(params.num_heads / params.num_kv_heads) {
    query_start_ = p_.query_start_loc[task.seq];
    const int64_t query_len = p_.query_start_loc[task.seq + 1] - query_start_;
    first_position_ = p_.seq_lens[task.seq] - query_len;
    score_scale_ = p_.scale * scale_of_head(p_.key_scale, task.kv_head);
    value_scale_ = scale_of_head(p_.value_scale, task.kv_head);
  }

  template <int kLanes>
  NANO_VLLM_INLINE void load_query(const TaskScratch& scratch) const {
    for (int row = 0; row < task_.num_rows; ++row) {
      const T* query = static_cast<const T*>(p_.query) + token(row) * p_.query_stride_token +
                       head(row) * p_.query_stride_head;
      copy_row<kLanes>(query, scratch.query + row * int64_t{p_.head_dim});
    }
  }

  template <int kLanes>
  NANO_VLLM_INLINE void clear(const Partial& partial) const {
    for (int64_t row = 0; row < task_.num_rows; ++row) {
      partial.max[row] = -kInfinity;
      partial.sum[row] = 0;
      for (int64_t d = 0; d < p_.head_dim; ++d) partial.out[row * p_.head_dim + d] = 0;
    }
  }

  // The partial result of one span: keys span * kSpanKeys and on.
  template <int kLanes>
  NANO_VLLM_INLINE void attend_span(int64_t span, const TaskScratch& scratch,
                                    const Partial& result) const {
    clear<kLanes>(result);
    const int64_t span_end = std::min(task_.key_end, (span + 1) * kSpanKeys);
    for (int64_t tile = span * kSpanKeys; tile < span_end; tile += kTileKeys) {
      const int64_t begin = std::max(tile, task_.key_begin) - tile;
      const int64_t end = std::min<int64_t>(kTileKeys, span_end - tile);
      if (begin < end) attend_tile<kLanes>(tile, begin, end, scratch, result);
    }
  }

  // total = total and part together; the parts come in the order of their keys.
  template <int kLanes>
  NANO_VLLM_INLINE void merge(const Partial& part, const Partial& total) const {
    for (int64_t row = 0; row < task_.num_rows; ++row) {
      if (part.sum[row] == 0) continue;  // it saw no key
      const float max = std::max(total.max[row], part.max[row]);
      const float total_scale = exp_of<kLanes>(total.max[row] - max);
      const float part_scale = exp_of<kLanes>(part.max[row] - max);
      total.max[row] = max;
      total.sum[row] = total.sum[row] * total_scale + part.sum[row] * part_scale;
      float* to = total.out + row * p_.head_dim;
      const float* from = part.out + row * p_.head_dim;
      for (int64_t d = 0; d < p_.head_dim; d += kLanes) {
        simd::store(to + d, simd::load<kLanes>(to + d) * total_scale +
                                simd::load<kLanes>(from + d) * part_scale);
      }
    }
  }

  template <int kLanes>
  NANO_VLLM_INLINE void write(const Partial& total) const {
    for (int row = 0; row < task_.num_rows; ++row) {
      T* out = static_cast<T*>(p_.out) + token(row) * p_.out_stride_token +
               head(row) * p_.out_stride_head;
      const float* from = total.out + row * int64_t{p_.head_dim};
      const float inverse = total.sum[row] == 0 ? 0 : value_scale_ / total.sum[row];
      for (int64_t d = 0; d < p_.head_dim; d += kLanes) {
        simd::store(out + d, simd::load<kLanes>(from + d) * inverse);
      }
    }
  }

 private:
  int64_t token(int64_t row) const { return query_start_ + (task_.first_row + row) / group_; }
  int64_t head(int64_t row) const {
    return int64_t{task_.kv_head} * group_ + (task_.first_row + row) % group_;
  }

  // Keys [begin, end) that the row sees, as lanes of the tile at position `tile`.
  struct Range {
    int64_t begin, end;
  };
  NANO_VLLM_INLINE Range visible(int64_t row, int64_t tile) const {
    const int64_t position = first_position_ + (task_.first_row + row) / group_;
    const int64_t first = p_.sliding_window > 0 ? position - p_.sliding_window + 1 : 0;
    return {std::max<int64_t>(first - tile, 0), std::min<int64_t>(position + 1 - tile, kTileKeys)};
  }

  template <int kLanes, class Element>
  NANO_VLLM_INLINE void copy_row(const Element* from, float* to) const {
    for (int64_t d = 0; d < p_.head_dim; d += kLanes)
      simd::store(to + d, simd::load<kLanes>(from + d));
  }

  template <int kLanes>
  static NANO_VLLM_INLINE float exp_of(float x) {
    return simd::exp(simd::broadcast<kLanes>(x))[0];
  }

  NANO_VLLM_INLINE const Cache* cache_row(const void* cache, int64_t stride_block,
                                          int64_t stride_token, int64_t stride_head,
                                          int64_t position) const {
    const int32_t* block_table = p_.block_tables + task_.seq * p_.block_tables_stride;
    const uint32_t block_size = p_.block_size, at = static_cast<uint32_t>(position);
    return static_cast<const Cache*>(cache) + block_table[at / block_size] * stride_block +
           at % block_size * stride_token + task_.kv_head * stride_head;
  }

  // Key and value of a position to come: a sequence's blocks lie anywhere, the hardware finds no
  // pattern.
  NANO_VLLM_INLINE void prefetch(int64_t position) const {
    if (position >= task_.key_end) return;
    const Cache* key = cache_row(p_.key_cache, p_.key_stride_block, p_.key_stride_token,
                                 p_.key_stride_head, position);
    const Cache* value = cache_row(p_.value_cache, p_.value_stride_block, p_.value_stride_token,
                                   p_.value_stride_head, position);
    constexpr int kLineElements = 64 / sizeof(Cache);
    for (int64_t d = 0; d < p_.head_dim; d += kLineElements) {
      __builtin_prefetch(key + d);
      __builtin_prefetch(value + d);
    }
  }

  // Rows of the tile's keys or values as float32: where they lie in the cache, else in `scratch`.
  // Lanes outside [begin, end) get a row inside, to be computed with and not used.
  template <int kLanes>
  NANO_VLLM_INLINE void find_rows(const void* cache, int64_t stride_block, int64_t stride_token,
                                  int64_t stride_head, int64_t tile, int64_t begin, int64_t end,
                                  float* scratch, const float** rows) const {
    for (int64_t lane = begin; lane < end; ++lane) {
      const Cache* source = cache_row(cache, stride_block, stride_token, stride_head, tile + lane);
      if constexpr (std::is_same_v<Cache, float>) {
        rows[lane] = source;
      } else {
        copy_row<kLanes>(source, scratch + lane * p_.head_dim);
        rows[lane] = scratch + lane * p_.head_dim;
      }
    }
    for (int64_t lane = 0; lane < begin; ++lane) rows[lane] = rows[begin];
    for (int64_t lane = end; lane < kTileKeys; ++lane) rows[lane] = rows[end - 1];
  }

  // Keys `begin` to `end` of the tile at position `tile`, for all rows.
  template <int kLanes>
  NANO_VLLM_INLINE void attend_tile(int64_t tile, int64_t begin, int64_t end,
                                    const TaskScratch& scratch, const Partial& result) const {
    const float* keys[kTileKeys];
    const float* values[kTileKeys];
    find_rows<kLanes>(p_.key_cache, p_.key_stride_block, p_.key_stride_token, p_.key_stride_head,
                      tile, begin, end, scratch.keys, keys);
    find_rows<kLanes>(p_.value_cache, p_.value_stride_block, p_.value_stride_token,
                      p_.value_stride_head, tile, begin, end, scratch.values, values);
    for (int first = 0; first < task_.num_rows; first += kDotRows) {
      const int rows = std::min(kDotRows, task_.num_rows - first);
      const Range seen{visible(first, tile).begin, visible(first + rows - 1, tile).end};
      if (seen.begin >= seen.end) continue;
      score<kLanes>(first, rows, keys, seen, tile, scratch);
      float rescale[kDotRows];
      for (int i = 0; i < rows; ++i) rescale[i] = softmax<kLanes>(first + i, tile, scratch, result);
      add_values<kLanes>(first, rows, values, seen, rescale, scratch, result);
    }
  }

  // Products of query and key, of the lanes that any of the rows sees and some beside them.
  template <int kLanes>
  NANO_VLLM_INLINE void score(int first, int rows, const float* const* keys, Range seen,
                              int64_t tile, const TaskScratch& scratch) const {
    const float* query[kDotRows];
    for (int i = 0; i < kDotRows; ++i)
      query[i] = scratch.query + (first + std::min(i, rows - 1)) * int64_t{p_.head_dim};
    for (int64_t lane = seen.begin / kDotColumns * kDotColumns; lane < seen.end;
         lane += kDotColumns) {
      if (first == 0) {
        for (int64_t i = 0; i < kDotColumns; ++i) prefetch(tile + kTileKeys + lane + i);
      }
      simd::Float<4> products[kDotRows];
      dot_tile<kLanes>(rows, query, keys + lane, p_.head_dim, products);
      for (int i = 0; i < rows; ++i)
        simd::store(scratch.scores + (first + i) * kTileKeys + lane, products[i]);
    }
  }

  // Makes weights exp(score - max) of the row's products, 0 where it sees no key, and returns what
  // the row's earlier sums are to be multiplied with, its maximum having risen.
  template <int kLanes>
  NANO_VLLM_INLINE float softmax(int row, int64_t tile, const TaskScratch& scratch,
                                 const Partial& result) const {
    using Float = simd::Float<kLanes>;
    const Range seen = visible(row, tile);
    if (seen.begin >= seen.end) {
      for (int64_t lane = 0; lane < kTileKeys; ++lane) scratch.scores[row * kTileKeys + lane] = 0;
      return 1;
    }
    Float scores[kTileKeys / kLanes];
    Float max_lanes = simd::broadcast<kLanes>(result.max[row]);
    for (int i = 0; i < kTileKeys / kLanes; ++i) {
      Float x = simd::load<kLanes>(scratch.scores + row * kTileKeys + i * kLanes) * score_scale_;
      if (p_.softcap != 0) x = simd::tanh(x * (1 / p_.softcap)) * p_.softcap;
      const auto lane = simd::iota<kLanes>() + i * kLanes;
      const auto is_seen =
          (lane >= static_cast<int32_t>(seen.begin)) & (lane < static_cast<int32_t>(seen.end));
      scores[i] = is_seen ? x : Float{} - kInfinity;
      max_lanes = simd::max(scores[i], max_lanes);  // drops NaN, which the weights will show
    }
    const float max = simd::max_lane(max_lanes);
    // Only scores of -inf or NaN so far: weights of 0 or NaN.
    const float reference = max == -kInfinity ? 0 : max;
    Float sum{};
    for (int i = 0; i < kTileKeys / kLanes; ++i) {
      const Float weight = simd::exp(scores[i] - reference);
      sum += weight;
      simd::store(scratch.scores + row * kTileKeys + i * kLanes, weight);
    }
    const float rescale = exp_of<kLanes>(result.max[row] - reference);
    result.sum[row] = result.sum[row] * rescale + simd::sum(sum);
    result.max[row] = max;
    return rescale;
  }

  // out = out * rescale + weights * values, for the lanes that any of the rows sees.
  template <int kLanes>
  NANO_VLLM_INLINE void add_values(int first, int rows, const float* const* values, Range seen,
                                   const float* rescale, const TaskScratch& scratch,
                                   const Partial& result) const {
    if (rows == 3) return add_values<kLanes, 3>(first, values, seen, rescale, scratch, result);
    if (rows == 2) return add_values<kLanes, 2>(first, values, seen, rescale, scratch, result);
    return add_values<kLanes, 1>(first, values, seen, rescale, scratch, result);
  }

  template <int kLanes, int kRows>
  NANO_VLLM_INLINE void add_values(int first, const float* const* values, Range seen,
                                   const float* rescale, const TaskScratch& scratch,
                                   const Partial& result) const {
    int64_t d = 0;
    for (; d + 4 * kLanes <= p_.head_dim; d += 4 * kLanes) {
      add_columns<kLanes, kRows, 4>(first, d, values, seen, rescale, scratch, result);
    }
    for (; d < p_.head_dim; d += kLanes) {
      add_columns<kLanes, kRows, 1>(first, d, values, seen, rescale, scratch, result);
    }
  }

  // The same for kColumns vectors from dimension d on.
  template <int kLanes, int kRows, int kColumns>
  NANO_VLLM_INLINE void add_columns(int first, int64_t d, const float* const* values, Range seen,
                                    const float* rescale, const TaskScratch& scratch,
                                    const Partial& result) const {
    const float* weights = scratch.scores + first * kTileKeys;
    float* out = result.out + first * int64_t{p_.head_dim} + d;
    simd::Float<kLanes> sums[kRows][kColumns];
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j) {
        sums[i][j] = simd::load<kLanes>(out + i * p_.head_dim + j * kLanes) * rescale[i];
      }
    }
    for (int64_t lane = seen.begin; lane < seen.end; ++lane) {
      const float* value = values[lane] + d;
      for (int j = 0; j < kColumns; ++j) {
        const simd::Float<kLanes> v = simd::load<kLanes>(value + j * kLanes);
        for (int i = 0; i < kRows; ++i) sums[i][j] += v * weights[i * kTileKeys + lane];
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j)
        simd::store(out + i * p_.head_dim + j * kLanes, sums[i][j]);
    }
  }

  const PagedAttentionParams& p_;
  const Task& task_;
  int64_t group_;           // query heads of a KV head
  int64_t query_start_;     // first query row of the sequence
  int64_t first_position_;  // of that row
  float score_scale_;       // multiplies query . key as it is stored
  float value_scale_;       // multiplies a value as it is stored
};

// A task from its query to its output.
template <class T, class Cache>
struct AttendTask {
  template <int kLanes>
  static NANO_VLLM_INLINE void run(const PagedAttentionParams& p, const Task& task,
                                   const TaskScratch& scratch) {
    const Attention<T, Cache> attention(p, task);
    attention.template load_query<kLanes>(scratch);
    attention.template clear<kLanes>(scratch.total);
    for (int64_t span = 0; span < task.num_spans(); ++span) {
      attention.template attend_span<kLanes>(task.first_span() + span, scratch, scratch.span);
      attention.template merge<kLanes>(scratch.span, scratch.total);
    }
    attention.template write<kLanes>(scratch.total);
  }
};

// One span of a split task.
template <class T, class Cache>
struct AttendSpan {
  template <int kLanes>
  static NANO_VLLM_INLINE void run(const PagedAttentionParams& p, const Task& task, int64_t span,
                                   const TaskScratch& scratch, const Partial& result) {
    const Attention<T, Cache> attention(p, task);
    attention.template load_query<kLanes>(scratch);
    attention.template attend_span<kLanes>(task.first_span() + span, scratch, result);
  }
};

// The spans of a split task put together.
template <class T, class Cache>
struct MergeSpans {
  template <int kLanes>
  static NANO_VLLM_INLINE void run(const PagedAttentionParams& p, const Task& task, float* partials,
                                   const TaskScratch& scratch) {
    const Attention<T, Cache> attention(p, task);
    attention.template clear<kLanes>(scratch.total);
    for (int64_t span = 0; span < task.num_spans(); ++span) {
      float* memory = partials + (task.partial + span * task.num_rows) * (p.head_dim + 2);
      attention.template merge<kLanes>(partial_at(memory, task.num_rows, p.head_dim),
                                       scratch.total);
    }
    attention.template write<kLanes>(scratch.total);
  }
};

// Tasks with the most keys first, so that threads end together.
std::vector<Task> make_tasks(const PagedAttentionParams& p) {
  std::vector<Task> tasks;
  const int64_t group = p.num_heads / p.num_kv_heads;
  for (int32_t seq = 0; seq < p.num_seqs; ++seq) {
    const int64_t query_len = p.query_start_loc[seq + 1] - p.query_start_loc[seq];
    const int64_t first_position = p.seq_lens[seq] - query_len;
    const int64_t rows = query_len * group;
    for (int64_t row = 0; row < rows; row += kMaxRows) {
      const int64_t num_rows = std::min<int64_t>(kMaxRows, rows - row);
      const int64_t key_end = first_position + (row + num_rows - 1) / group + 1;
      int64_t key_begin = 0;
      if (p.sliding_window > 0) {
        key_begin = std::max<int64_t>(0, first_position + row / group - p.sliding_window + 1);
      }
      for (int32_t kv_head = 0; kv_head < p.num_kv_heads; ++kv_head) {
        tasks.push_back({seq, kv_head, row, static_cast<int32_t>(num_rows), key_begin, key_end, 0});
      }
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) {
    return a.num_rows * (a.key_end - a.key_begin) > b.num_rows * (b.key_end - b.key_begin);
  });
  return tasks;
}

TaskScratch task_scratch(int64_t head_dim) {
  thread_local ThreadScratch scratch;
  return TaskScratch(scratch.reserve(TaskScratch::numel(head_dim)), head_dim);
}

// Few tasks with many keys: the spans are shared among the threads, too.
template <class T, class Cache>
void attend_in_spans(const PagedAttentionParams& p, std::vector<Task>& tasks) {
  struct SpanOfTask {
    int64_t task, span;
  };
  std::vector<SpanOfTask> spans;
  int64_t partial_rows = 0;
  for (size_t i = 0; i < tasks.size(); ++i) {
    tasks[i].partial = partial_rows;
    partial_rows += tasks[i].num_spans() * tasks[i].num_rows;
    for (int64_t span = 0; span < tasks[i].num_spans(); ++span)
      spans.push_back({static_cast<int64_t>(i), span});
  }
  thread_local ThreadScratch partial_scratch;
  float* partials = partial_scratch.reserve(partial_rows * (p.head_dim + 2));
  parallel_tasks(static_cast<int64_t>(spans.size()), [&](int64_t i) {
    const Task& task = tasks[spans[i].task];
    float* memory = partials + (task.partial + spans[i].span * task.num_rows) * (p.head_dim + 2);
    simd::run<AttendSpan<T, Cache>>(p, task, spans[i].span, task_scratch(p.head_dim),
                                    partial_at(memory, task.num_rows, p.head_dim));
  });
  parallel_tasks(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    simd::run<MergeSpans<T, Cache>>(p, tasks[i], partials, task_scratch(p.head_dim));
  });
}

template <class T, class Cache>
void attend(const PagedAttentionParams& p) {
  std::vector<Task> tasks = make_tasks(p);
  const int64_t num_tasks = static_cast<int64_t>(tasks.size());
  const int threads = num_threads();
  if (threads > 1 && num_tasks < kTasksPerThread * threads && p.max_seq_len > kSpanKeys) {
    return attend_in_spans<T, Cache>(p, tasks);
  }
  parallel_tasks(num_tasks, [&](int64_t i) {
    simd::run<AttendTask<T, Cache>>(p, tasks[i], task_scratch(p.head_dim));
  });
}

}  // namespace

void paged_attention(const PagedAttentionParams& params) {
  dispatch_dtypes(params.dtype, params.cache_dtype, [&](auto element, auto cached) {
    attend<decltype(element), decltype(cached)>(params);
  });
}

}  // namespace nano_vllm::cpu
