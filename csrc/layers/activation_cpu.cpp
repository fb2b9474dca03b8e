// CPU gated activations: threads share pieces of rows, so that one long row keeps them all busy.
#include <algorithm>

#include "common/parallel.h"
#include "common/simd_convert.h"
#include "common/simd_math.h"
#include "layers/activation.h"

namespace nano_vllm::cpu {
namespace {

constexpr int64_t kPieceElements = 1024;
constexpr int64_t kGrainPieces = 4;  // less is not worth waking a thread for

// x / (1 + exp(-x))
struct Silu {
  template <class Vector>
  static NANO_VLLM_INLINE Vector apply(const Vector& x) {
    return x / (simd::exp(-x) + 1.0f);
  }
};

// x Phi(x), where Phi is the normal distribution. The lower tail is taken as it is, not as 1 + erf:
// the difference would have no digits left.
struct Gelu {
  template <class Vector>
  static NANO_VLLM_INLINE Vector apply(const Vector& x) {
    const Vector magnitude = x < 0.0f ? -x : x;
    const Vector tail = simd::normal_tail(magnitude);
    return x * (x < 0.0f ? tail : 1.0f - tail);
  }
};

// (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)), which keeps its digits at large negative u.
struct GeluTanh {
  template <class Vector>
  static NANO_VLLM_INLINE Vector apply(const Vector& x) {
    const Vector u = x * (x * x * 0.044715f + 1.0f) * 0.797884561f;
    return x / (simd::exp(u * -2.0f) + 1.0f);
  }
};

template <class T, class Function>
struct ActivationAndMul {
  template <int kLanes>
  static NANO_VLLM_INLINE void run(const ActivationParams& p, int64_t pieces_per_row, int64_t begin,
                                   int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t token = piece / pieces_per_row;
      const int64_t first = piece % pieces_per_row * kPieceElements;
      const T* gate = static_cast<const T*>(p.input) + token * p.input_stride_token + first;
      const T* up = gate + p.intermediate_size;
      T* out = static_cast<T*>(p.out) + token * p.out_stride_token + first;
      const int64_t size = std::min(kPieceElements, p.intermediate_size - first);
      for (int64_t i = 0; i < size; i += kLanes) {
        const simd::Float<kLanes> x = simd::load_partial<kLanes>(gate + i, size - i);
        const simd::Float<kLanes> y = simd::load_partial<kLanes>(up + i, size - i);
        simd::store_partial(out + i, Function::apply(x) * y, size - i);
      }
    }
  }
};

template <class Function>
void activate(const ActivationParams& params) {
  const int64_t pieces_per_row = (params.intermediate_size + kPieceElements - 1) / kPieceElements;
  dispatch_dtype(params.dtype, [&](auto element) {
    parallel_for(params.num_tokens * pieces_per_row, kGrainPieces, [&](int64_t begin, int64_t end) {
      simd::run<ActivationAndMul<decltype(element), Function>>(params, pieces_per_row, begin, end);
    });
  });
}

}  // namespace

void activation_and_mul(const ActivationParams& params) {
  switch (params.activation) {
    case Activation::kSilu:
      return activate<Silu>(params);
    case Activation::kGelu:
      return activate<Gelu>(params);
    case Activation::kGeluTanh:
      return activate<GeluTanh>(params);
  }
}

}  // namespace nano_vllm::cpu
