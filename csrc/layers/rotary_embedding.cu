// CUDA rotary_embedding: a thread keeps its angles while it goes through the heads.
#include <algorithm>

#include "layers/rotary_embedding.cuh"
#include "layers/rotary_embedding.h"

namespace nano_vllm::cuda {
namespace {

constexpr int kNumThreads = 256;

// Turns (x, y) by the angle.
template <class T>
__device__ void rotate_pair(T& x, T& y, float cos, float sin) {
  const T old_x = x;
  x = rotate(x, y, cos, -sin);
  y = rotate(y, old_x, cos, sin);
}

// Pairs of elements that a thread turns at once: two vectors of partners in neox order, one vector
// of neighbours in gptj order.
template <class T, bool kIsNeox>
constexpr int kPairs = kIsNeox ? Vec<T>::kSize : Vec<T>::kSize / 2;

// Grid: the tokens. The threads along x share the pairs of a head, those along y the heads,
// queries' and keys'.
template <class T, bool kIsNeox, bool kIsAligned>
__global__ void __launch_bounds__(kNumThreads) rotary_embedding_kernel(RotaryEmbeddingParams p) {
  constexpr int kCount = kPairs<T, kIsNeox>;
  const int64_t token = blockIdx.x;
  const int half = p.rotary_dim / 2;
  const float* angles = p.cos_sin_cache + p.positions[token] * p.rotary_dim;
  T* query = static_cast<T*>(p.query) + token * p.query_stride_token;
  T* key = static_cast<T*>(p.key) + token * p.key_stride_token;
  for (int pair = threadIdx.x * kCount; pair < half; pair += blockDim.x * kCount) {
    float cos[kCount], sin[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      cos[i] = pair + i < half ? angles[pair + i] : 0.0f;
      sin[i] = pair + i < half ? angles[half + pair + i] : 0.0f;
    }
    for (int h = threadIdx.y; h < p.num_heads + p.num_kv_heads; h += blockDim.y) {
      T* head = h < p.num_heads ? query + h * p.query_stride_head
                                : key + (h - p.num_heads) * p.key_stride_head;
      if constexpr (kIsNeox) {
        Vec<T> x = load_elements<kIsAligned>(head + pair, half - pair);
        Vec<T> y = load_elements<kIsAligned>(head + half + pair, half - pair);
#pragma unroll
        for (int i = 0; i < kCount; ++i) rotate_pair(x.value[i], y.value[i], cos[i], sin[i]);
        store_elements<kIsAligned>(head + pair, x, half - pair);
        store_elements<kIsAligned>(head + half + pair, y, half - pair);
      } else {
        Vec<T> xy = load_elements<kIsAligned>(head + 2 * pair, 2 * (half - pair));
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          rotate_pair(xy.value[2 * i], xy.value[2 * i + 1], cos[i], sin[i]);
        }
        store_elements<kIsAligned>(head + 2 * pair, xy, 2 * (half - pair));
      }
    }
  }
}

template <class T, bool kIsNeox>
void launch(const RotaryEmbeddingParams& p, cudaStream_t stream) {
  const int half = p.rotary_dim / 2;
  const bool is_aligned = half % kPairs<T, kIsNeox> == 0 &&
                          is_vec_aligned<T>(p.query, p.query_stride_token, p.query_stride_head) &&
                          is_vec_aligned<T>(p.key, p.key_stride_token, p.key_stride_head);
  const int x = std::min(ceil_div(half, kPairs<T, kIsNeox>), kNumThreads);
  const int y = std::min(kNumThreads / x, p.num_heads + p.num_kv_heads);
  const auto kernel = is_aligned ? rotary_embedding_kernel<T, kIsNeox, true>
                                 : rotary_embedding_kernel<T, kIsNeox, false>;
  kernel<<<static_cast<unsigned>(p.num_tokens), dim3(x, y), 0, stream>>>(p);
  check_launch("rotary_embedding");
}

}  // namespace

void rotary_embedding(const RotaryEmbeddingParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0 || params.num_heads + params.num_kv_heads == 0 ||
      params.rotary_dim == 0) {
    return;
  }
  dispatch_dtype(params.dtype, [&](auto element) {
    using T = decltype(element);
    params.is_neox ? launch<T, true>(params, stream) : launch<T, false>(params, stream);
  });
}

}  // namespace nano_vllm::cuda
