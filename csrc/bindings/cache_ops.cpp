#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "bindings/device.h"
#include "bindings/linear_params.h"
#include "bindings/ops.h"
#include "bindings/tensor_checks.h"
#include "cache/copy_blocks.h"
#include "cache/reshape_and_cache.h"
#include "cache/rotary_reshape_and_cache.h"
#include "layers/qkv_linear.h"

namespace nano_vllm {

namespace {

// Of so many tokens' keys and values, which are like the tensor.
ReshapeAndCacheParams params_of(const Tensor& like, int64_t num_tokens, int64_t num_kv_heads,
                                int64_t head_dim, const Tensor& key_cache,
                                const Tensor& value_cache, const Tensor& slot_mapping,
                                const std::optional<Tensor>& k_scale,
                                const std::optional<Tensor>& v_scale) {
  ReshapeAndCacheParams params{};
  params.dtype = float_dtype("key", like);
  check_device("key_cache", key_cache, like);
  params.cache_dtype = cache_dtype("key_cache", key_cache, params.dtype);
  check_tensor("key_cache", key_cache, like, scalar_type_of(params.cache_dtype),
               {-1, -1, num_kv_heads, head_dim});
  check_tensor("value_cache", value_cache, like, key_cache.scalar_type(),
               {key_cache.size(0), key_cache.size(1), num_kv_heads, head_dim});
  params.key_scale = cache_scale("k_scale", k_scale, key_cache);
  params.value_scale = cache_scale("v_scale", v_scale, value_cache);
  check_tensor("slot_mapping", slot_mapping, like, ScalarType::Long, {num_tokens});

  params.key_cache = key_cache.mutable_data_ptr();
  params.value_cache = value_cache.mutable_data_ptr();
  params.slot_mapping = static_cast<const int64_t*>(slot_mapping.const_data_ptr());
  params.key_cache_stride_block = key_cache.stride(0);
  params.key_cache_stride_token = key_cache.stride(1);
  params.key_cache_stride_head = key_cache.stride(2);
  params.value_cache_stride_block = value_cache.stride(0);
  params.value_cache_stride_token = value_cache.stride(1);
  params.value_cache_stride_head = value_cache.stride(2);
  params.num_tokens = to_int32("num_tokens", num_tokens);
  params.num_kv_heads = to_int32("num_kv_heads", num_kv_heads);
  params.head_dim = to_int32("head_dim", head_dim);
  params.block_size = to_int32("block_size", key_cache.size(1));
  return params;
}

ReshapeAndCacheParams params_of(const Tensor& key, const Tensor& value, const Tensor& key_cache,
                                const Tensor& value_cache, const Tensor& slot_mapping,
                                const std::optional<Tensor>& k_scale,
                                const std::optional<Tensor>& v_scale) {
  (void)float_dtype("key", key);
  check_shape("key", key, {-1, -1, -1});
  check_last_contiguous("key", key);
  const int64_t num_tokens = key.size(0), num_kv_heads = key.size(1), head_dim = key.size(2);
  check_tensor("value", value, key, key.scalar_type(), {num_tokens, num_kv_heads, head_dim});
  ReshapeAndCacheParams params = params_of(key, num_tokens, num_kv_heads, head_dim, key_cache,
                                           value_cache, slot_mapping, k_scale, v_scale);
  params.key = key.const_data_ptr();
  params.value = value.const_data_ptr();
  params.key_stride_token = key.stride(0);
  params.key_stride_head = key.stride(1);
  params.value_stride_token = value.stride(0);
  params.value_stride_head = value.stride(1);
  return params;
}

// The query with its angles and norms, and kv as it is given.
RotaryReshapeAndCacheParams rotary_params_of(const ReshapeAndCacheParams& kv, const Tensor& query,
                                             const Tensor& positions, const Tensor& key_cache,
                                             const Tensor& cos_sin_cache, bool is_neox,
                                             const std::optional<Tensor>& query_norm_weight,
                                             const std::optional<Tensor>& key_norm_weight,
                                             double norm_eps) {
  RotaryReshapeAndCacheParams params{};
  params.kv = kv;
  const ScalarType dtype = query.scalar_type();
  const int64_t num_tokens = query.size(0), head_dim = query.size(2);
  check_tensor("positions", positions, query, ScalarType::Long, {num_tokens});
  check_tensor("cos_sin_cache", cos_sin_cache, query, ScalarType::Float, {-1, -1});
  if (query_norm_weight.has_value()) {
    check_tensor("query_norm_weight", *query_norm_weight, query, dtype, {head_dim});
    params.query_norm_weight = query_norm_weight->const_data_ptr();
  }
  if (key_norm_weight.has_value()) {
    check_tensor("key_norm_weight", *key_norm_weight, query, dtype, {head_dim});
    params.key_norm_weight = key_norm_weight->const_data_ptr();
  }
  const int64_t rotary_dim = cos_sin_cache.size(1);
  check(head_dim <= kMaxRotaryHeadDim, "head_dim must be at most ", kMaxRotaryHeadDim, ", got ",
        head_dim);
  check(kv.num_kv_heads > 0, "num_kv_heads must be positive, got ", kv.num_kv_heads);
  const int64_t num_slots = key_cache.size(0) * key_cache.size(1);
  check(num_slots <= int64_t{1} << 32, "key_cache must have at most 2^32 slots, got ", num_slots);
  check(rotary_dim % 2 == 0 && rotary_dim <= head_dim,
        "rotary_dim must be even and at most head_dim ", head_dim, ", got ", rotary_dim);
  check(cos_sin_cache.is_contiguous(), "cos_sin_cache must be contiguous");
  check(norm_eps >= 0, "norm_eps must be at least 0, got ", norm_eps);

  params.query = query.mutable_data_ptr();
  params.positions = static_cast<const int64_t*>(positions.const_data_ptr());
  params.cos_sin_cache = static_cast<const float*>(cos_sin_cache.const_data_ptr());
  params.query_stride_token = query.stride(0);
  params.query_stride_head = query.stride(1);
  params.num_heads = to_int32("num_heads", query.size(1));
  params.rotary_dim = to_int32("rotary_dim", rotary_dim);
  params.norm_eps = static_cast<float>(norm_eps);
  params.is_neox = is_neox;
  return params;
}

#ifdef NANO_VLLM_CUDA
// Where vectors of 8 elements are written; of an element's size.
void check_heads_in_vectors(const char* name, const Tensor& tensor) {
  const uint64_t vector = 8 * static_cast<uint64_t>(tensor.element_size());
  bool is_aligned = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % vector == 0;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) is_aligned &= tensor.stride(i) % 8 == 0;
  check(is_aligned, name, " must have heads that begin at multiples of ", vector, " bytes");
}

void qkv_linear_on_cuda(const QkvLinearParams& params, const Tensor& query, const Tensor& input,
                        const Tensor& weight, const Tensor& key_cache, const Tensor& value_cache) {
  const CudaScope cuda_scope(input);
  const RotaryReshapeAndCacheParams& rotary = params.rotary;
  check_on_cuda(params.linear, weight);
  check((rotary.kv.head_dim == 64 || rotary.kv.head_dim == 128) &&
            rotary.rotary_dim == rotary.kv.head_dim,
        "qkv_linear needs heads of 64 or 128 elements, all of them rotated, got ",
        rotary.kv.head_dim, " and ", rotary.rotary_dim);
  for (const auto& [name, pointer] : {std::pair{"bias", params.linear.bias},
                                      {"query_norm_weight", rotary.query_norm_weight},
                                      {"key_norm_weight", rotary.key_norm_weight},
                                      {"cos_sin_cache", rotary.cos_sin_cache}}) {
    check(reinterpret_cast<uintptr_t>(pointer) % 16 == 0, name,
          " must begin at a multiple of 16 bytes");
  }
  check_in_vectors("input", input);
  check_in_vectors("weight", weight);
  check_heads_in_vectors("query", query);
  check_heads_in_vectors("key_cache", key_cache);
  check_heads_in_vectors("value_cache", value_cache);
  cuda::qkv_linear(params, cuda_scope.stream());
}
#endif

}  // namespace

void reshape_and_cache(const Tensor& key, const Tensor& value, const Tensor& key_cache,
                       const Tensor& value_cache, const Tensor& slot_mapping,
                       const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale) {
  const ReshapeAndCacheParams params =
      params_of(key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale);
  if (params.num_tokens == 0 || params.num_kv_heads == 0 || params.head_dim == 0) return;
  NANO_VLLM_DISPATCH(reshape_and_cache, key, params);
}

void rotary_reshape_and_cache(const Tensor& positions, const Tensor& query, const Tensor& key,
                              const Tensor& value, const Tensor& key_cache,
                              const Tensor& value_cache, const Tensor& slot_mapping,
                              const Tensor& cos_sin_cache, bool is_neox,
                              const std::optional<Tensor>& query_norm_weight,
                              const std::optional<Tensor>& key_norm_weight, double norm_eps,
                              const std::optional<Tensor>& k_scale,
                              const std::optional<Tensor>& v_scale) {
  (void)float_dtype("query", query);
  check_shape("query", query, {-1, -1, -1});
  check_last_contiguous("query", query);
  check_tensor("key", key, query, query.scalar_type(), {query.size(0), -1, query.size(2)});
  const RotaryReshapeAndCacheParams params = rotary_params_of(
      params_of(key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale), query,
      positions, key_cache, cos_sin_cache, is_neox, query_norm_weight, key_norm_weight, norm_eps);
  if (params.kv.num_tokens == 0 || params.kv.head_dim == 0) return;
  NANO_VLLM_DISPATCH(rotary_reshape_and_cache, query, params);
}

void qkv_linear(const Tensor& query, const Tensor& input, const Tensor& weight,
                const std::optional<Tensor>& bias, const Tensor& positions, const Tensor& key_cache,
                const Tensor& value_cache, const Tensor& slot_mapping, const Tensor& cos_sin_cache,
                const std::optional<Tensor>& query_norm_weight,
                const std::optional<Tensor>& key_norm_weight, double norm_eps,
                const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale) {
  check(input.is_cuda(), "qkv_linear runs on CUDA alone, got a tensor on ", device_of(input));
  QkvLinearParams params{};
  check_shape("key_cache", key_cache, {-1, -1, -1, -1});
  const int64_t num_kv_heads = key_cache.size(2), head_dim = key_cache.size(3);
  check_device("query", query, input);
  check_dtype("query", query, input.scalar_type());
  check_shape("query", query, {input.size(0), -1, head_dim});
  check_last_contiguous("query", query);
  params.linear =
      linear_params_of(input, weight, bias, (query.size(1) + 2 * num_kv_heads) * head_dim);
  params.rotary =
      rotary_params_of(params_of(input, input.size(0), num_kv_heads, head_dim, key_cache,
                                 value_cache, slot_mapping, k_scale, v_scale),
                       query, positions, key_cache, cos_sin_cache, true, query_norm_weight,
                       key_norm_weight, norm_eps);
  if (params.linear.num_rows == 0) return;
#ifdef NANO_VLLM_CUDA
  return qkv_linear_on_cuda(params, query, input, weight, key_cache, value_cache);
#endif
  fail("qkv_linear: this build has no CUDA kernels; rebuild with NANO_VLLM_BUILD=cuda");
}

bool qkv_linear_pays(const Tensor& weight, int64_t num_rows, int64_t head_dim) {
  check_shape("weight", weight, {-1, -1});
  const int32_t rows = to_int32("num_rows", num_rows);
#ifdef NANO_VLLM_CUDA
  if (weight.is_cuda() && rows > kLinearMaxRows && (head_dim == 64 || head_dim == 128)) {
    const CudaScope cuda_scope(weight);
    const int32_t in_features = to_int32("in_features", weight.size(1));
    const int32_t out_features = to_int32("out_features", weight.size(0));
    return cuda::can_linear(float_dtype("weight", weight), in_features, out_features) &&
           cuda::qkv_linear_pays(rows, in_features, out_features);
  }
#endif
  return false;
}

namespace {

struct Pool {
  int64_t num_planes, num_blocks, stride_plane, stride_block, block_bytes;  // strides in bytes
};

// A cache [num_layers, 2, num_blocks, ...] seen as planes of blocks, each block dense in some order
// of its dimensions.
Pool pool_of(const char* name, const Tensor& cache) {
  const int64_t dim = cache.dim();
  check(dim >= 4 && cache.size(1) == 2, name,
        " must have shape [num_layers, 2, num_blocks, ...], got ", shape_of(cache));
  const int64_t element = static_cast<int64_t>(cache.element_size());
  check(cache.stride(0) == 2 * cache.stride(1) || cache.size(0) == 1, name,
        " must have evenly spaced planes, got strides ", cache.stride(0), " and ", cache.stride(1));
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size) of one block
  for (int64_t i = 3; i < dim; ++i) {
    if (cache.size(i) != 1) dims.emplace_back(cache.stride(i), cache.size(i));
  }
  std::sort(dims.begin(), dims.end());
  int64_t dense = 1;
  for (const auto& [stride, size] : dims) {
    check(stride == dense, name, " must have dense blocks, got stride ", stride, " where ", dense,
          " is expected");
    dense *= size;
  }
  const int64_t bytes = dense * element;
  check(bytes % 16 == 0, name, " must have blocks of a multiple of 16 bytes, got ", bytes);
  return {cache.size(0) * 2, cache.size(2), cache.stride(1) * element, cache.stride(2) * element,
          bytes};
}

CopyBlocksParams params_of(const char* src_name, const Tensor& src, const char* dst_name,
                           const Tensor& dst, const Tensor& block_mapping) {
  const ScalarType dtype = src.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ||
            dtype == ScalarType::Float8_e4m3fn,
        src_name, " must be float32, float16, bfloat16 or float8_e4m3fn, got ", name_of(dtype));
  check_dtype(dst_name, dst, src.scalar_type());
  check_dtype("block_mapping", block_mapping, ScalarType::Long);
  const Pool from = pool_of(src_name, src), to = pool_of(dst_name, dst);
  check(from.num_planes == to.num_planes && from.block_bytes == to.block_bytes &&
            src.dim() == dst.dim(),
        dst_name, " must have layers and blocks like ", src_name, " ", shape_of(src), ", got ",
        shape_of(dst));
  for (int64_t i = 3; i < src.dim(); ++i) {
    check(src.size(i) == dst.size(i) && (src.size(i) == 1 || src.stride(i) == dst.stride(i)),
          dst_name, " must have blocks laid out like those of ", src_name, " ", shape_of(src),
          ", got ", shape_of(dst));
  }
  check_shape("block_mapping", block_mapping, {-1, 2});
  check(block_mapping.is_contiguous(), "block_mapping must be contiguous");

  CopyBlocksParams params{};
  params.src = src.const_data_ptr();
  params.dst = dst.mutable_data_ptr();
  params.block_mapping = static_cast<const int64_t*>(block_mapping.const_data_ptr());
  params.src_stride_plane = from.stride_plane;
  params.src_stride_block = from.stride_block;
  params.dst_stride_plane = to.stride_plane;
  params.dst_stride_block = to.stride_block;
  params.block_bytes = from.block_bytes;
  params.num_planes = to_int32("the number of planes", from.num_planes);
  params.num_pairs = to_int32("the number of pairs", block_mapping.size(0));
  return params;
}

}  // namespace

void copy_blocks(const Tensor& kv_cache, const Tensor& block_mapping) {
  check_device("block_mapping", block_mapping, kv_cache);
  const CopyBlocksParams params =
      params_of("kv_cache", kv_cache, "kv_cache", kv_cache, block_mapping);
  if (params.num_pairs == 0 || params.num_planes == 0 || params.block_bytes == 0) return;
  NANO_VLLM_DISPATCH(copy_blocks, kv_cache, params);
}

void swap_blocks(const Tensor& src_cache, const Tensor& dst_cache, const Tensor& block_mapping) {
  const Tensor& where = src_cache.is_cuda() ? src_cache : dst_cache;
  check_device("block_mapping", block_mapping, where);
  for (const Tensor* cache : {&src_cache, &dst_cache}) {
    check(cache->is_cpu() || device_of(*cache) == device_of(where),
          cache == &src_cache ? "src" : "dst", "_cache must be on cpu or ", device_of(where),
          ", got ", device_of(*cache));
  }
  const CopyBlocksParams params =
      params_of("src_cache", src_cache, "dst_cache", dst_cache, block_mapping);
  if (params.num_pairs == 0 || params.num_planes == 0 || params.block_bytes == 0) return;
#ifdef NANO_VLLM_CUDA
  if (where.is_cuda()) {
    const CudaScope cuda_scope(where);
    for (const Tensor* cache : {&src_cache, &dst_cache}) {
      check(cache->is_cuda() || is_device_accessible(cache->const_data_ptr()),
            cache == &src_cache ? "src" : "dst",
            "_cache must be in pinned memory to be swapped with a GPU, got pageable memory");
    }
    return cuda::copy_blocks(params, cuda_scope.stream());
  }
#endif
  NANO_VLLM_DISPATCH(copy_blocks, where, params);
}

}  // namespace nano_vllm
