// CPU rotary embedding: threads share the tokens; each turns all its query and key heads.
#include <algorithm>

#include "common/parallel.h"
#include "common/simd_convert.h"
#include "layers/rotary_embedding.h"

namespace nano_vllm::cpu {
namespace {

constexpr int64_t kGrainElements = 16384;  // less is not worth waking a thread for

// The vector (x, y) turned by each lane's angle.
template <class Vector>
NANO_VLLM_INLINE void rotate(Vector& x, Vector& y, const Vector& cos, const Vector& sin) {
  const Vector turned = x * cos - y * sin;
  y = y * cos + x * sin;
  x = turned;
}

// (x0, y0, x1, y1, ...) in two vectors to all x in one and all y in the other.
template <class Vector>
NANO_VLLM_INLINE void deinterleave(Vector& a, Vector& b) {
  constexpr int kLanes = simd::kLanesOf<Vector>;
  Vector x{}, y{};
  for (int i = 0; i < kLanes / 2; ++i) {
    x[i] = a[2 * i], x[i + kLanes / 2] = b[2 * i];
    y[i] = a[2 * i + 1], y[i + kLanes / 2] = b[2 * i + 1];
  }
  a = x, b = y;
}

template <class Vector>
NANO_VLLM_INLINE void interleave(Vector& x, Vector& y) {
  constexpr int kLanes = simd::kLanesOf<Vector>;
  Vector a{}, b{};
  for (int i = 0; i < kLanes / 2; ++i) {
    a[2 * i] = x[i], a[2 * i + 1] = y[i];
    b[2 * i] = x[i + kLanes / 2], b[2 * i + 1] = y[i + kLanes / 2];
  }
  x = a, y = b;
}

template <class T, bool kIsNeox>
struct RotaryEmbedding {
  template <int kLanes>
  static NANO_VLLM_INLINE void rotate_head(T* head, const float* cos, const float* sin,
                                           int64_t half) {
    for (int64_t i = 0; i < half; i += kLanes) {
      const int64_t pairs = std::min<int64_t>(kLanes, half - i);
      const simd::Float<kLanes> c = simd::load_partial<kLanes>(cos + i, pairs);
      const simd::Float<kLanes> s = simd::load_partial<kLanes>(sin + i, pairs);
      // Where the first and the second vector lie, and how many of their lanes.
      T* first = kIsNeox ? head + i : head + 2 * i;
      const int64_t first_count = kIsNeox ? pairs : std::min<int64_t>(kLanes, 2 * pairs);
      T* second = kIsNeox ? first + half : first + first_count;
      const int64_t second_count = kIsNeox ? pairs : 2 * pairs - first_count;
      simd::Float<kLanes> x = simd::load_partial<kLanes>(first, first_count);
      simd::Float<kLanes> y = simd::load_partial<kLanes>(second, second_count);
      if (!kIsNeox) deinterleave(x, y);
      rotate(x, y, c, s);
      if (!kIsNeox) interleave(x, y);
      simd::store_partial(first, x, first_count);
      simd::store_partial(second, y, second_count);
    }
  }

  template <int kLanes>
  static NANO_VLLM_INLINE void run(const RotaryEmbeddingParams& p, int64_t begin, int64_t end) {
    const int64_t half = p.rotary_dim / 2;
    for (int64_t token = begin; token < end; ++token) {
      const float* cos = p.cos_sin_cache + p.positions[token] * p.rotary_dim;
      const float* sin = cos + half;
      T* query = static_cast<T*>(p.query) + token * p.query_stride_token;
      T* key = static_cast<T*>(p.key) + token * p.key_stride_token;
      for (int64_t head = 0; head < p.num_heads + p.num_kv_heads; ++head) {
        T* vector = head < p.num_heads ? query + head * p.query_stride_head
                                       : key + (head - p.num_heads) * p.key_stride_head;
        rotate_head<kLanes>(vector, cos, sin, half);
      }
    }
  }
};

}  // namespace

void rotary_embedding(const RotaryEmbeddingParams& params) {
  const int64_t token_elements =
      int64_t{params.num_heads + params.num_kv_heads} * params.rotary_dim;
  const int64_t grain = kGrainElements / std::max<int64_t>(1, token_elements) + 1;
  dispatch_dtype(params.dtype, [&](auto element) {
    using T = decltype(element);
    parallel_for(params.num_tokens, grain, [&](int64_t begin, int64_t end) {
      if (params.is_neox) {
        simd::run<RotaryEmbedding<T, true>>(params, begin, end);
      } else {
        simd::run<RotaryEmbedding<T, false>>(params, begin, end);
      }
    });
  });
}

}  // namespace nano_vllm::cpu
