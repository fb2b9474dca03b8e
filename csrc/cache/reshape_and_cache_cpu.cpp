// CPU reshape_and_cache: threads share the tokens; a head is one memcpy, and so is a token whose
// heads lie side by side in source and cache. A cache of float8 is written head by head.
#include <cstring>

#include "cache/reshape_and_cache.h"
#include "cache/store_head.h"
#include "common/parallel.h"

namespace nano_vllm::cpu {
namespace {

constexpr int64_t kGrainBytes = 64 * 1024;  // less is not worth waking a thread for

template <class T, class Cache>
struct ReshapeAndCache {
  template <int kLanes>
  static NANO_VLLM_INLINE void store_token(Cache* to, const T* from, int64_t to_stride_head,
                                           int64_t from_stride_head, const float* scales,
                                           const ReshapeAndCacheParams& p) {
    if (std::is_same_v<T, Cache> && from_stride_head == p.head_dim &&
        to_stride_head == p.head_dim) {
      std::memcpy(to, from, static_cast<size_t>(p.num_kv_heads) * p.head_dim * sizeof(T));
      return;
    }
    for (int64_t head = 0; head < p.num_kv_heads; ++head) {
      store_head<kLanes>(to + head * to_stride_head, from + head * from_stride_head, p.head_dim,
                         scale_of_head(scales, head));
    }
  }

  template <int kLanes>
  static NANO_VLLM_INLINE void run(const ReshapeAndCacheParams& p, int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t slot = p.slot_mapping[token];
      if (slot < 0) continue;
      const int64_t block = slot / p.block_size, row = slot % p.block_size;
      store_token<kLanes>(static_cast<Cache*>(p.key_cache) + block * p.key_cache_stride_block +
                              row * p.key_cache_stride_token,
                          static_cast<const T*>(p.key) + token * p.key_stride_token,
                          p.key_cache_stride_head, p.key_stride_head, p.key_scale, p);
      store_token<kLanes>(static_cast<Cache*>(p.value_cache) + block * p.value_cache_stride_block +
                              row * p.value_cache_stride_token,
                          static_cast<const T*>(p.value) + token * p.value_stride_token,
                          p.value_cache_stride_head, p.value_stride_head, p.value_scale, p);
    }
  }
};

}  // namespace

void reshape_and_cache(const ReshapeAndCacheParams& p) {
  const int64_t token_bytes =
      2 * static_cast<int64_t>(size_of(p.dtype)) * p.num_kv_heads * p.head_dim;
  const int64_t grain = kGrainBytes / (token_bytes + 1) + 1;
  dispatch_dtypes(p.dtype, p.cache_dtype, [&](auto element, auto cached) {
    using Kernel = ReshapeAndCache<decltype(element), decltype(cached)>;
    parallel_for(p.num_tokens, grain,
                 [&](int64_t begin, int64_t end) { simd::run<Kernel>(p, begin, end); });
  });
}

}  // namespace nano_vllm::cpu
