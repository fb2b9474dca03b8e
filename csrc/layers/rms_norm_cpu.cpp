// CPU rms_norm: threads share the vectors; each is read twice, the second time from cache.
#include <cmath>

#include "common/parallel.h"
#include "common/simd_convert.h"
#include "layers/rms_norm.h"

namespace nano_vllm::cpu {
namespace {

constexpr int64_t kGrainElements = 16384;  // less is not worth waking a thread for

template <class T>
struct RmsNorm {
  // The vector's elements squared and summed, after residual += input where there is a residual.
  template <int kLanes>
  static NANO_VLLM_INLINE float sum_of_squares(const T* input, T* residual, int64_t size) {
    constexpr int kSums = 4;  // independent additions in flight
    simd::Float<kLanes> sums[kSums] = {};
    for (int64_t i = 0; i < size; i += kSums * kLanes) {
      for (int j = 0; j < kSums; ++j) {
        const int64_t at = i + j * kLanes;
        if (at >= size) break;
        simd::Float<kLanes> x = simd::load_partial<kLanes>(input + at, size - at);
        if (residual != nullptr) {
          x += simd::load_partial<kLanes>(residual + at, size - at);
          simd::store_partial(residual + at, x, size - at);
          x = simd::load_partial<kLanes>(residual + at, size - at);  // as it was rounded
        }
        sums[j] += x * x;
      }
    }
    return simd::sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }

  template <int kLanes>
  static NANO_VLLM_INLINE void run(const RmsNormParams& p, int64_t begin, int64_t end) {
    const int64_t size = p.hidden_size;
    const T* weight = static_cast<const T*>(p.weight);
    for (int64_t vector = begin; vector < end; ++vector) {
      const int64_t row = vector / p.num_heads, head = vector % p.num_heads;
      const T* input =
          static_cast<const T*>(p.input) + row * p.input_stride_row + head * p.input_stride_head;
      T* out = static_cast<T*>(p.out) + row * p.out_stride_row + head * p.out_stride_head;
      T* residual = nullptr;
      if (p.residual != nullptr) {
        residual = static_cast<T*>(p.residual) + row * p.residual_stride_row +
                   head * p.residual_stride_head;
      }
      const float mean = sum_of_squares<kLanes>(input, residual, size) / static_cast<float>(size);
      const float inverse = 1.0f / std::sqrt(mean + p.eps);
      const T* source = residual != nullptr ? residual : input;
      for (int64_t i = 0; i < size; i += kLanes) {
        const simd::Float<kLanes> x = simd::load_partial<kLanes>(source + i, size - i);
        const simd::Float<kLanes> w = simd::load_partial<kLanes>(weight + i, size - i);
        simd::store_partial(out + i, x * inverse * w, size - i);
      }
    }
  }
};

}  // namespace

void rms_norm(const RmsNormParams& params) {
  const int64_t vectors = int64_t{params.num_rows} * params.num_heads;
  const int64_t grain = kGrainElements / params.hidden_size + 1;
  dispatch_dtype(params.dtype, [&](auto element) {
    parallel_for(vectors, grain, [&](int64_t begin, int64_t end) {
      simd::run<RmsNorm<decltype(element)>>(params, begin, end);
    });
  });
}

}  // namespace nano_vllm::cpu
