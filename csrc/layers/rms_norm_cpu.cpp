// CPU rms_norm: threads share the vectors; each is read twice, the second time from cache.
#include "common/parallel.h"
#include "layers/rms_norm.h"
#include "layers/rms_norm_vector.h"

namespace nano_vllm::cpu {
namespace {

constexpr int64_t kGrainElements = 16384;  // less is not worth waking a thread for

template <class T>
struct RmsNorm {
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
      normalise<kLanes>(out, input, residual, weight, size, p.eps);
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
