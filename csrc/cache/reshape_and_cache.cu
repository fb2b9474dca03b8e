// CUDA reshape_and_cache: a copy, in units as wide as pointers and strides allow.
#include <algorithm>

#include "cache/reshape_and_cache.cuh"

namespace nano_vllm::cuda {
namespace {

constexpr int kNumThreads = 256;

// Strides in units.
template <class Unit>
struct TokenCopy {
  const Unit* src;  // [num_tokens, num_heads, units_per_head]
  Unit* dst;        // [num_blocks, block_size, num_heads, units_per_head]
  int64_t src_stride_token, src_stride_head;
  int64_t dst_stride_block, dst_stride_token, dst_stride_head;

  __device__ const Unit* from(int64_t token, int64_t head, int64_t unit) const {
    return src + token * src_stride_token + head * src_stride_head + unit;
  }
  __device__ Unit* to(int64_t block, int64_t row, int64_t head, int64_t unit) const {
    return dst + block * dst_stride_block + row * dst_stride_token + head * dst_stride_head + unit;
  }
};

// Grid: ceil(num_tokens / blockDim.y). threadIdx.y is a token of the block's; the threads along x
// share its units, each copying a unit of the key and the same of the value.
template <class Unit>
__global__ void __launch_bounds__(kNumThreads)
    reshape_and_cache_kernel(TokenCopy<Unit> key, TokenCopy<Unit> value,
                             const int64_t* slot_mapping, int32_t num_tokens, int32_t num_heads,
                             int32_t units_per_head, int32_t block_size) {
  const int64_t token = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (token >= num_tokens) return;
  const int64_t slot = slot_mapping[token];
  if (slot < 0) return;
  const int64_t block = slot / block_size, row = slot % block_size;
  const int64_t units = int64_t{num_heads} * units_per_head;
  for (int64_t i = threadIdx.x; i < units; i += blockDim.x) {
    const int64_t head = i / units_per_head, unit = i % units_per_head;
    const Unit k = *key.from(token, head, unit), v = *value.from(token, head, unit);
    *key.to(block, row, head, unit) = k;
    *value.to(block, row, head, unit) = v;
  }
}

template <class Unit>
void launch(const ReshapeAndCacheParams& p, cudaStream_t stream) {
  const int64_t ratio = static_cast<int64_t>(sizeof(Unit) / size_of(p.dtype));
  const TokenCopy<Unit> key{static_cast<const Unit*>(p.key),  static_cast<Unit*>(p.key_cache),
                            p.key_stride_token / ratio,       p.key_stride_head / ratio,
                            p.key_cache_stride_block / ratio, p.key_cache_stride_token / ratio,
                            p.key_cache_stride_head / ratio};
  const TokenCopy<Unit> value{
      static_cast<const Unit*>(p.value),  static_cast<Unit*>(p.value_cache),
      p.value_stride_token / ratio,       p.value_stride_head / ratio,
      p.value_cache_stride_block / ratio, p.value_cache_stride_token / ratio,
      p.value_cache_stride_head / ratio};
  const int32_t units_per_head = static_cast<int32_t>(p.head_dim / ratio);
  const int64_t units = int64_t{p.num_kv_heads} * units_per_head;
  unsigned threads = kWarpSize;
  while (threads < units && threads < kNumThreads) threads *= 2;
  const dim3 block_dim(threads, kNumThreads / threads);
  const unsigned grid = ceil_div(static_cast<unsigned>(p.num_tokens), block_dim.y);
  reshape_and_cache_kernel<Unit><<<grid, block_dim, 0, stream>>>(
      key, value, p.slot_mapping, p.num_tokens, p.num_kv_heads, units_per_head, p.block_size);
  check_launch("reshape_and_cache");
}

}  // namespace

void reshape_and_cache(const ReshapeAndCacheParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return;
  const bool is_wide = size_of(params.dtype) == 4;
  if (is_wide ? fits_vectors<float>(params) : fits_vectors<__half>(params)) {
    launch<uint4>(params, stream);
  } else if (is_wide) {
    launch<uint32_t>(params, stream);
  } else {
    launch<uint16_t>(params, stream);
  }
}

}  // namespace nano_vllm::cuda
