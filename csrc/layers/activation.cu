// CUDA gated activations: one vector of the output for each thread.
#include <algorithm>

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "layers/activation.h"

namespace nano_vllm::cuda {
namespace {

constexpr int kNumThreads = 128;
constexpr int64_t kMaxGridY = 65535;

struct Silu {
  __device__ static float apply(float x) { return x / (1.0f + expf(-x)); }
};

// x Phi(x), where Phi is the normal distribution.
struct Gelu {
  __device__ static float apply(float x) { return x * normcdff(x); }
};

// (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)), which keeps its digits at large negative u.
struct GeluTanh {
  __device__ static float apply(float x) {
    const float u = 0.797884561f * x * (1.0f + 0.044715f * x * x);
    return x / (1.0f + expf(-2.0f * u));
  }
};

// Grid: tokens along x, pieces of kNumThreads vectors of a row along y.
template <class T, class Function, bool kIsAligned>
__global__ void __launch_bounds__(kNumThreads) activation_and_mul_kernel(ActivationParams p) {
  constexpr int64_t kSize = Vec<T>::kSize;
  allow_next_kernel();
  wait_for_last_kernel();
  const int64_t token = blockIdx.x;
  const T* gate = static_cast<const T*>(p.input) + token * p.input_stride_token;
  const T* up = gate + p.intermediate_size;
  T* out = static_cast<T*>(p.out) + token * p.out_stride_token;
  const int64_t first = (int64_t{blockIdx.y} * kNumThreads + threadIdx.x) * kSize;
  for (int64_t at = first; at < p.intermediate_size; at += gridDim.y * kNumThreads * kSize) {
    const int64_t count = p.intermediate_size - at;
    Vec<T> x = load_elements<kIsAligned>(gate + at, count);
    const Vec<T> y = load_elements<kIsAligned>(up + at, count);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      x.value[i] = from_float<T>(Function::apply(to_float(x.value[i])) * to_float(y.value[i]));
    }
    store_elements<kIsAligned>(out + at, x, count);
  }
}

template <class Function>
void launch(const ActivationParams& p, cudaStream_t stream) {
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    const bool is_aligned = is_vec_aligned<T>(p.input, p.input_stride_token, p.intermediate_size) &&
                            is_vec_aligned<T>(p.out, p.out_stride_token);
    const int64_t pieces = ceil_div<int64_t>(p.intermediate_size, kNumThreads * Vec<T>::kSize);
    const dim3 grid(static_cast<unsigned>(p.num_tokens),
                    static_cast<unsigned>(std::min(pieces, kMaxGridY)));
    const auto kernel = is_aligned ? activation_and_mul_kernel<T, Function, true>
                                   : activation_and_mul_kernel<T, Function, false>;
    launch_in_chain("activation_and_mul", kernel, grid, dim3(kNumThreads), stream, p);
  });
}

}  // namespace

void activation_and_mul(const ActivationParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0 || params.intermediate_size == 0) return;
  switch (params.activation) {
    case Activation::kSilu:
      return launch<Silu>(params, stream);
    case Activation::kGelu:
      return launch<Gelu>(params, stream);
    case Activation::kGeluTanh:
      return launch<GeluTanh>(params, stream);
  }
}

}  // namespace nano_vllm::cuda
