// CPU rotary embedding: threads share the tokens; each turns all its query and key heads.
#include <algorithm>

#include "common/parallel.h"
#include "layers/rotary_embedding.h"
#include "layers/rotary_vector.h"

namespace nano_vllm::cpu {
namespace {

constexpr int64_t kGrainElements = 16384;  // less is not worth waking a thread for

template <class T, bool kIsNeox>
struct RotaryEmbedding {
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
        rotate_head<kLanes, kIsNeox>(vector, vector, cos, sin, half);
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
