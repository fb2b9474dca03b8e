// CUDA reshape_and_cache: a copy, in units as wide as pointers and strides allow; to a cache of
// float8, a division and a rounding on the way.
#include <algorithm>

#include "cache/reshape_and_cache.cuh"

namespace nano_vllm::cuda {
namespace {

constexpr int kNumThreads = 256;

// Strides in units, of the source and of the cache. Units that differ are elements, or vectors of
// them, and what they become in a cache of float8.
template <class Unit, class Cached>
struct TokenCopy {
  const Unit* src;      // [num_tokens, num_heads, units_per_head]
  Cached* dst;          // [num_blocks, block_size, num_heads, units_per_head]
  const float* scales;  // [num_heads]
  int64_t src_stride_token, src_stride_head;
  int64_t dst_stride_block, dst_stride_token, dst_stride_head;

  __device__ const Unit* from(int64_t token, int64_t head, int64_t unit) const {
    return src + token * src_stride_token + head * src_stride_head + unit;
  }
  __device__ Cached* to(int64_t block, int64_t row, int64_t head, int64_t unit) const {
    return dst + block * dst_stride_block + row * dst_stride_token + head * dst_stride_head + unit;
  }
  __device__ Cached cached(const Unit& unit, int64_t head) const {
    if constexpr (std::is_same_v<Unit, Cached>) {
      return unit;
    } else if constexpr (std::is_same_v<Cached, Float8E4M3>) {
      return quantize(to_float(unit), scale_of_head(scales, head));
    } else {
      return quantize(unit, scale_of_head(scales, head));
    }
  }
};

// Grid: ceil(num_tokens / blockDim.y). threadIdx.y is a token of the block's; the threads along x
// share its units, each copying a unit of the key and the same of the value.
template <class Unit, class Cached>
__global__ void __launch_bounds__(kNumThreads)
    reshape_and_cache_kernel(TokenCopy<Unit, Cached> key, TokenCopy<Unit, Cached> value,
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
    *key.to(block, row, head, unit) = key.cached(k, head);
    *value.to(block, row, head, unit) = value.cached(v, head);
  }
}

template <class Unit, class Cached = Unit>
void launch(const ReshapeAndCacheParams& p, cudaStream_t stream) {
  const int64_t ratio = static_cast<int64_t>(sizeof(Unit) / size_of(p.dtype));
  const TokenCopy<Unit, Cached> key{static_cast<const Unit*>(p.key),
                                    static_cast<Cached*>(p.key_cache),
                                    p.key_scale,
                                    p.key_stride_token / ratio,
                                    p.key_stride_head / ratio,
                                    p.key_cache_stride_block / ratio,
                                    p.key_cache_stride_token / ratio,
                                    p.key_cache_stride_head / ratio};
  const TokenCopy<Unit, Cached> value{static_cast<const Unit*>(p.value),
                                      static_cast<Cached*>(p.value_cache),
                                      p.value_scale,
                                      p.value_stride_token / ratio,
                                      p.value_stride_head / ratio,
                                      p.value_cache_stride_block / ratio,
                                      p.value_cache_stride_token / ratio,
                                      p.value_cache_stride_head / ratio};
  const int32_t units_per_head = static_cast<int32_t>(p.head_dim / ratio);
  const int64_t units = int64_t{p.num_kv_heads} * units_per_head;
  unsigned threads = kWarpSize;
  while (threads < units && threads < kNumThreads) threads *= 2;
  const dim3 block_dim(threads, kNumThreads / threads);
  const unsigned grid = ceil_div(static_cast<unsigned>(p.num_tokens), block_dim.y);
  reshape_and_cache_kernel<Unit, Cached><<<grid, block_dim, 0, stream>>>(
      key, value, p.slot_mapping, p.num_tokens, p.num_kv_heads, units_per_head, p.block_size);
  check_launch("reshape_and_cache");
}

}  // namespace

void reshape_and_cache(const ReshapeAndCacheParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return;
  if (params.cache_dtype == DType::kFloat8E4M3) {
    return dispatch_dtype(params.dtype, [&](auto element) {
      using T = decltype(element);
      if (fits_vectors<T>(params)) {
        launch<Vec<T>, Float8Vec<T>>(params, stream);
      } else {
        launch<T, Float8E4M3>(params, stream);
      }
    });
  }
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
