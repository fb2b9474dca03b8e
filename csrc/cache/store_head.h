// Writing one head's vector into the cache, for the CPU kernels.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/simd_convert.h"

namespace nano_vllm::cpu {

// What a head's elements are divided by; scales [num_kv_heads] or nullptr.
inline float scale_of_head(const float* scales, int64_t head) {
  return scales == nullptr ? 1.0f : scales[head];
}

// A copy, or to = from / scale as a cache of another dtype holds it.
template <int kLanes, class T, class Cache>
NANO_VLLM_INLINE void store_head(Cache* to, const T* from, int64_t size, float scale) {
  if constexpr (std::is_same_v<T, Cache>) {
    std::memcpy(to, from, static_cast<size_t>(size) * sizeof(T));
  } else {
    for (int64_t i = 0; i < size; i += kLanes) {
      simd::store_partial(to + i, simd::load_partial<kLanes>(from + i, size - i) / scale, size - i);
    }
  }
}

}  // namespace nano_vllm::cpu
