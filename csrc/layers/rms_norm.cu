// CUDA rms_norm: a row's elements stay in registers between the sum and the product.
#include <algorithm>

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "layers/rms_norm.cuh"
#include "layers/rms_norm.h"

namespace nano_vllm::cuda {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kShortRowWarps = 4;  // rows that one warp takes whole, for each block

// Grid: the rows, blockDim.y at a time; the threads along x share one, the vectors of a thread
// lying blockDim.x apart. kVecsPerThread of them are kept, any more read again. A row's elements go
// to threads and are summed in an order set by hidden_size alone, so its bits depend neither on the
// other rows nor on where it lies.
template <class T, int kVecsPerThread, bool kIsAligned>
__global__ void __launch_bounds__(kMaxThreads) rms_norm_kernel(RmsNormParams p, int64_t num_rows) {
  constexpr int kSize = Vec<T>::kSize;
  allow_next_kernel();
  wait_for_last_kernel();
  const int64_t index = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (index >= num_rows) return;
  const int64_t row = index / p.num_heads, head = index % p.num_heads;
  const T* input =
      static_cast<const T*>(p.input) + row * p.input_stride_row + head * p.input_stride_head;
  T* out = static_cast<T*>(p.out) + row * p.out_stride_row + head * p.out_stride_head;
  T* residual = p.residual == nullptr ? nullptr
                                      : static_cast<T*>(p.residual) + row * p.residual_stride_row +
                                            head * p.residual_stride_head;
  const T* weight = static_cast<const T*>(p.weight);
  const int64_t first = int64_t{threadIdx.x} * kSize, step = int64_t{blockDim.x} * kSize;

  float sum = 0.0f;
  const auto read = [&](int64_t at) {
    Vec<T> vec = load_elements<kIsAligned>(input + at, p.hidden_size - at);
    if (residual != nullptr) {
      const Vec<T> old = load_elements<kIsAligned>(residual + at, p.hidden_size - at);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        vec.value[i] = from_float<T>(to_float(vec.value[i]) + to_float(old.value[i]));
      }
      store_elements<kIsAligned>(residual + at, vec, p.hidden_size - at);
    }
    sum = add_squares(sum, vec);
    return vec;
  };
  Vec<T> kept[kVecsPerThread];
#pragma unroll
  for (int j = 0; j < kVecsPerThread; ++j) {
    if (first + j * step < p.hidden_size) kept[j] = read(first + j * step);
  }
  for (int64_t at = first + kVecsPerThread * step; at < p.hidden_size; at += step) read(at);

  sum = blockDim.x == kWarpSize ? warp_sum(sum) : block_sum(sum);
  const float inverse = inverse_rms(sum, p.hidden_size, p.eps);

  const auto write = [&](int64_t at, const Vec<T>& vec) {
    const Vec<T> w = load_elements<kIsAligned>(weight + at, p.hidden_size - at);
    store_elements<kIsAligned>(out + at, normalise(vec, inverse, w), p.hidden_size - at);
  };
#pragma unroll
  for (int j = 0; j < kVecsPerThread; ++j) {
    if (first + j * step < p.hidden_size) write(first + j * step, kept[j]);
  }
  const T* source = residual != nullptr ? residual : input;
  for (int64_t at = first + kVecsPerThread * step; at < p.hidden_size; at += step) {
    write(at, load_elements<kIsAligned>(source + at, p.hidden_size - at));
  }
}

template <class T>
bool fits_vectors(const RmsNormParams& p) {
  return p.hidden_size % Vec<T>::kSize == 0 && is_vec_aligned<T>(p.weight) &&
         is_vec_aligned<T>(p.input, p.input_stride_row, p.input_stride_head) &&
         is_vec_aligned<T>(p.out, p.out_stride_row, p.out_stride_head) &&
         is_vec_aligned<T>(p.residual, p.residual_stride_row, p.residual_stride_head);
}

template <class T, int kVecsPerThread>
void launch(const RmsNormParams& p, dim3 block_dim, cudaStream_t stream) {
  const int64_t num_rows = int64_t{p.num_rows} * p.num_heads;
  const unsigned grid = grid_x("rms_norm", ceil_div<int64_t>(num_rows, block_dim.y));
  const auto kernel = fits_vectors<T>(p) ? rms_norm_kernel<T, kVecsPerThread, true>
                                         : rms_norm_kernel<T, kVecsPerThread, false>;
  launch_in_chain("rms_norm", kernel, dim3(grid), block_dim, stream, p, num_rows);
}

}  // namespace

void rms_norm(const RmsNormParams& params, cudaStream_t stream) {
  if (params.num_rows == 0 || params.num_heads == 0) return;
  dispatch_dtype(params.dtype, [&](auto element) {
    using T = decltype(element);
    const int vecs = ceil_div(params.hidden_size, Vec<T>::kSize);
    if (vecs <= kWarpSize) {
      launch<T, 1>(params, dim3(kWarpSize, kShortRowWarps), stream);
    } else if (vecs <= kMaxThreads) {
      launch<T, 1>(params, dim3(ceil_div(vecs, kWarpSize) * kWarpSize), stream);
    } else {
      launch<T, 4>(params, dim3(kMaxThreads), stream);
    }
  });
}

}  // namespace nano_vllm::cuda
