// CPU reshape_and_cache: threads share the tokens; a head is one memcpy, and so is a token whose
// heads lie side by side in source and cache.
#include <cstring>

#include "cache/reshape_and_cache.h"
#include "common/parallel.h"

namespace nano_vllm::cpu {
namespace {

constexpr int64_t kGrainBytes = 64 * 1024;  // less is not worth waking a thread for

// Copies num_heads vectors; offsets and strides in elements.
struct HeadCopy {
  const char* src;
  char* dst;
  int64_t element_bytes, src_stride_head, dst_stride_head, num_heads, head_dim;

  void operator()(int64_t src_offset, int64_t dst_offset) const {
    const char* from = src + src_offset * element_bytes;
    char* to = dst + dst_offset * element_bytes;
    const size_t head_bytes = static_cast<size_t>(head_dim * element_bytes);
    if (src_stride_head == head_dim && dst_stride_head == head_dim) {
      std::memcpy(to, from, static_cast<size_t>(num_heads) * head_bytes);
      return;
    }
    for (int64_t head = 0; head < num_heads; ++head) {
      std::memcpy(to + head * dst_stride_head * element_bytes,
                  from + head * src_stride_head * element_bytes, head_bytes);
    }
  }
};

}  // namespace

void reshape_and_cache(const ReshapeAndCacheParams& p) {
  const int64_t element_bytes = static_cast<int64_t>(size_of(p.dtype));
  const HeadCopy copy_key{static_cast<const char*>(p.key),
                          static_cast<char*>(p.key_cache),
                          element_bytes,
                          p.key_stride_head,
                          p.key_cache_stride_head,
                          p.num_kv_heads,
                          p.head_dim};
  const HeadCopy copy_value{static_cast<const char*>(p.value),
                            static_cast<char*>(p.value_cache),
                            element_bytes,
                            p.value_stride_head,
                            p.value_cache_stride_head,
                            p.num_kv_heads,
                            p.head_dim};
  const int64_t token_bytes = 2 * element_bytes * p.num_kv_heads * p.head_dim;
  parallel_for(p.num_tokens, kGrainBytes / (token_bytes + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t slot = p.slot_mapping[token];
      if (slot < 0) continue;
      const int64_t block = slot / p.block_size, row = slot % p.block_size;
      copy_key(token * p.key_stride_token,
               block * p.key_cache_stride_block + row * p.key_cache_stride_token);
      copy_value(token * p.value_stride_token,
                 block * p.value_cache_stride_block + row * p.value_cache_stride_token);
    }
  });
}

}  // namespace nano_vllm::cpu
