// CPU linear: the weights stream from memory once, in blocks that stay in cache while every row of
// the input passes over them.
#include <algorithm>

#include "common/dot_tile.h"
#include "common/parallel.h"
#include "layers/linear.h"

namespace nano_vllm::cpu {
namespace {

constexpr int64_t kWeightBlockBytes = 96 * 1024;  // as float32: a part of the second-level cache

// The input as float32, [num_rows, in_features].
struct Rows {
  const float* data;
  int64_t stride;
};

template <class T>
struct WidenRows {
  template <int kLanes>
  static NANO_VLLM_INLINE void run(const T* src, int64_t src_stride, float* dst, int64_t dst_stride,
                                   int64_t num_rows, int64_t size) {
    for (int64_t row = 0; row < num_rows; ++row) {
      const T* from = src + row * src_stride;
      float* to = dst + row * dst_stride;
      int64_t k = 0;
      for (; k + kLanes <= size; k += kLanes) simd::store(to + k, simd::load<kLanes>(from + k));
      simd::store_partial(to + k, simd::load_partial<kLanes>(from + k, size - k), size - k);
    }
  }
};

template <class T>
struct Linear {
  // One block of weight rows times all input rows.
  template <int kLanes, class W>
  static NANO_VLLM_INLINE void multiply_block(const LinearParams& p, Rows input, const W* weight,
                                              int64_t weight_stride, int64_t first, int64_t count) {
    T* out = static_cast<T*>(p.out);
    const T* bias = static_cast<const T*>(p.bias);
    const int64_t num_tiles = (p.num_rows + kDotRows - 1) / kDotRows;
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      // Even tiles: four rows are two and two, not three and one.
      const int64_t row = p.num_rows * tile / num_tiles;
      const int rows = static_cast<int>(p.num_rows * (tile + 1) / num_tiles - row);
      const float* x[kDotRows];
      for (int i = 0; i < kDotRows; ++i)
        x[i] = input.data + (row + std::min(i, rows - 1)) * input.stride;
      for (int64_t n = 0; n < count; n += kDotColumns) {
        const int64_t columns = std::min<int64_t>(kDotColumns, count - n);
        const W* w[kDotColumns];
        for (int64_t j = 0; j < kDotColumns; ++j)
          w[j] = weight + (n + std::min(j, columns - 1)) * weight_stride;
        simd::Float<4> sums[kDotRows];
        dot_tile<kLanes>(rows, x, w, p.in_features, sums);
        simd::Float<4> bias_lanes{};
        if (bias != nullptr) bias_lanes = simd::load_partial<4>(bias + first + n, columns);
        for (int i = 0; i < rows; ++i) {
          simd::store_partial(out + (row + i) * p.out_stride_row + first + n, sums[i] + bias_lanes,
                              columns);
        }
      }
    }
  }

  template <int kLanes>
  static NANO_VLLM_INLINE void run(const LinearParams& p, Rows input, float* scratch,
                                   int64_t block_rows, int64_t begin, int64_t end) {
    const T* weight = static_cast<const T*>(p.weight);
    for (int64_t first = begin; first < end; first += block_rows) {
      const int64_t count = std::min(block_rows, end - first);
      const T* block = weight + first * p.weight_stride_row;
      if (scratch == nullptr) {
        multiply_block<kLanes>(p, input, block, p.weight_stride_row, first, count);
      } else {
        WidenRows<T>::template run<kLanes>(block, p.weight_stride_row, scratch, p.in_features,
                                           count, p.in_features);
        multiply_block<kLanes>(p, input, static_cast<const float*>(scratch), p.in_features, first,
                               count);
      }
    }
  }
};

template <class T>
void linear(const LinearParams& p) {
  Rows input{};
  if constexpr (std::is_same_v<T, float>) {
    input = {static_cast<const float*>(p.input), p.input_stride_row};
  } else {
    thread_local ThreadScratch input_scratch;
    float* data = input_scratch.reserve(int64_t{p.num_rows} * p.in_features);
    parallel_for(p.num_rows, std::max<int64_t>(1, 65536 / std::max(1, p.in_features)),
                 [&](int64_t begin, int64_t end) {
                   simd::run<WidenRows<T>>(
                       static_cast<const T*>(p.input) + begin * p.input_stride_row,
                       p.input_stride_row, data + begin * p.in_features, int64_t{p.in_features},
                       end - begin, int64_t{p.in_features});
                 });
    input = {data, p.in_features};
  }
  const int64_t row_bytes = std::max<int64_t>(1, p.in_features) * 4;
  const int64_t block_rows =
      std::max<int64_t>(1, kWeightBlockBytes / row_bytes / kDotColumns) * kDotColumns;
  // Where several tiles of rows pass over a block, it is widened once for all of them.
  const bool widen = !std::is_same_v<T, float> && p.num_rows > kDotRows;
  parallel_for(p.out_features, 16, [&](int64_t begin, int64_t end) {
    thread_local ThreadScratch weight_scratch;
    float* scratch = widen ? weight_scratch.reserve(block_rows * p.in_features) : nullptr;
    simd::run<Linear<T>>(p, input, scratch, block_rows, begin, end);
  });
}

}  // namespace

void linear(const LinearParams& params) {
  dispatch_dtype(params.dtype, [&](auto element) { linear<decltype(element)>(params); });
}

}  // namespace nano_vllm::cpu
