// CPU rotary_reshape_and_cache: threads share the tokens; a head goes through its steps before the
// next one begins.
#include <algorithm>
#include <cstring>

#include "cache/rotary_reshape_and_cache.h"
#include "cache/store_head.h"
#include "common/parallel.h"
#include "layers/rms_norm_vector.h"
#include "layers/rotary_vector.h"

namespace nano_vllm::cpu {
namespace {

constexpr int64_t kGrainElements = 16384;  // less is not worth waking a thread for

template <class T, class Cache, bool kIsNeox>
struct RotaryReshapeAndCache {
  template <int kLanes>
  static NANO_VLLM_INLINE void normalise_head(T* out, const T* head, const void* weight,
                                              const RotaryReshapeAndCacheParams& p) {
    normalise<kLanes, T>(out, head, nullptr, static_cast<const T*>(weight), p.kv.head_dim,
                         p.norm_eps);
  }

  template <int kLanes>
  static NANO_VLLM_INLINE void run(const RotaryReshapeAndCacheParams& p, int64_t begin,
                                   int64_t end) {
    const ReshapeAndCacheParams& kv = p.kv;
    const int64_t half = p.rotary_dim / 2;
    const size_t head_bytes = static_cast<size_t>(kv.head_dim) * sizeof(T);
    for (int64_t token = begin; token < end; ++token) {
      const float* angles = p.cos_sin_cache + p.positions[token] * p.rotary_dim;
      T* query = static_cast<T*>(p.query) + token * p.query_stride_token;
      for (int64_t head = 0; head < p.num_heads; ++head) {
        T* vector = query + head * p.query_stride_head;
        if (p.query_norm_weight != nullptr) {
          normalise_head<kLanes>(vector, vector, p.query_norm_weight, p);
        }
        rotate_head<kLanes, kIsNeox>(vector, vector, angles, angles + half, half);
      }
      const int64_t slot = kv.slot_mapping[token];
      if (slot < 0) continue;
      const int64_t block = slot / kv.block_size, row = slot % kv.block_size;
      const T* key = static_cast<const T*>(kv.key) + token * kv.key_stride_token;
      const T* value = static_cast<const T*>(kv.value) + token * kv.value_stride_token;
      Cache* cached_key = static_cast<Cache*>(kv.key_cache) + block * kv.key_cache_stride_block +
                          row * kv.key_cache_stride_token;
      Cache* cached_value = static_cast<Cache*>(kv.value_cache) +
                            block * kv.value_cache_stride_block + row * kv.value_cache_stride_token;
      T turned[kMaxRotaryHeadDim];  // what a cache of another dtype is then given
      for (int64_t head = 0; head < kv.num_kv_heads; ++head) {
        const T* source = key + head * kv.key_stride_head;
        Cache* cached = cached_key + head * kv.key_cache_stride_head;
        T* out = turned;
        if constexpr (std::is_same_v<T, Cache>) out = cached;
        if (p.key_norm_weight != nullptr) {
          normalise_head<kLanes>(out, source, p.key_norm_weight, p);
          source = out;
        } else {
          std::memcpy(out + 2 * half, source + 2 * half, head_bytes - 2 * half * sizeof(T));
        }
        rotate_head<kLanes, kIsNeox>(out, source, angles, angles + half, half);
        if constexpr (!std::is_same_v<T, Cache>) {
          store_head<kLanes>(cached, turned, kv.head_dim, scale_of_head(kv.key_scale, head));
        }
      }
      for (int64_t head = 0; head < kv.num_kv_heads; ++head) {
        store_head<kLanes>(cached_value + head * kv.value_cache_stride_head,
                           value + head * kv.value_stride_head, kv.head_dim,
                           scale_of_head(kv.value_scale, head));
      }
    }
  }
};

}  // namespace

void rotary_reshape_and_cache(const RotaryReshapeAndCacheParams& params) {
  const int64_t token_elements =
      (int64_t{params.num_heads} + 2 * int64_t{params.kv.num_kv_heads}) * params.kv.head_dim;
  const int64_t grain = kGrainElements / (token_elements + 1) + 1;
  dispatch_dtypes(params.kv.dtype, params.kv.cache_dtype, [&](auto element, auto cached) {
    using T = decltype(element);
    using Cache = decltype(cached);
    parallel_for(params.kv.num_tokens, grain, [&](int64_t begin, int64_t end) {
      if (params.is_neox) {
        simd::run<RotaryReshapeAndCache<T, Cache, true>>(params, begin, end);
      } else {
        simd::run<RotaryReshapeAndCache<T, Cache, false>>(params, begin, end);
      }
    });
  });
}

}  // namespace nano_vllm::cpu
