#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <optional>

#include "attention/paged_attention.h"
#include "bindings/device.h"
#include "bindings/ops.h"
#include "bindings/tensor_checks.h"

namespace nano_vllm {
namespace {

void set_sequences(PagedAttentionParams& params, const Tensor& like, const Tensor& query_start_loc,
                   const Tensor& seq_lens) {
  check_tensor("seq_lens", seq_lens, like, ScalarType::Int, {-1});
  check_tensor("query_start_loc", query_start_loc, like, ScalarType::Int, {seq_lens.size(0) + 1});
  params.num_seqs = to_int32("the number of sequences", seq_lens.size(0));
  params.query_start_loc = static_cast<const int32_t*>(query_start_loc.const_data_ptr());
  params.seq_lens = static_cast<const int32_t*>(seq_lens.const_data_ptr());
}

void set_shared_prefix(PagedAttentionParams& params, const Tensor& like,
                       const std::optional<Tensor>& shared_prefix) {
  if (!shared_prefix.has_value()) return;
  check_tensor("shared_prefix", *shared_prefix, like, ScalarType::Int, {2, params.num_seqs});
  params.prefix_leaders = static_cast<const int32_t*>(shared_prefix->const_data_ptr());
  params.prefix_lens = params.prefix_leaders + shared_prefix->stride(0);
}

void check_heads(const PagedAttentionParams& params) {
  check(params.num_kv_heads > 0 && params.num_heads % params.num_kv_heads == 0,
        "num_heads must be a multiple of num_kv_heads, got ", params.num_heads, " and ",
        params.num_kv_heads);
  const int32_t d = params.head_dim;
  check(d == 64 || d == 80 || d == 96 || d == 128 || d == 192 || d == 256,
        "head_dim must be 64, 80, 96, 128, 192 or 256, got ", d);
}

void set_workspace(PagedAttentionParams& params, const Tensor& like, const Tensor& workspace) {
  check_tensor("workspace", workspace, like, ScalarType::Float, {-1});
  params.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  params.workspace_numel = workspace.numel();
}

void check_workspace(const PagedAttentionParams& params) {
  const int64_t needed =
      paged_attention_workspace_numel(params.num_seqs, params.num_heads, params.head_dim);
  check(params.workspace_numel >= needed, "workspace must hold at least ", needed,
        " elements, got ", params.workspace_numel);
  check(reinterpret_cast<uintptr_t>(params.workspace) % 16 == 0,
        "workspace must lie at a multiple of 16 bytes");
}

}  // namespace

void plan_attention(const Tensor& workspace, const Tensor& query_start_loc, const Tensor& seq_lens,
                    int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                    int64_t min_query_len, int64_t max_query_len, int64_t sliding_window,
                    const std::optional<Tensor>& shared_prefix) {
  PagedAttentionParams params{};
  set_workspace(params, workspace, workspace);
  set_sequences(params, workspace, query_start_loc, seq_lens);
  set_shared_prefix(params, workspace, shared_prefix);
  params.num_heads = to_int32("num_heads", num_heads);
  params.num_kv_heads = to_int32("num_kv_heads", num_kv_heads);
  params.head_dim = to_int32("head_dim", head_dim);
  params.min_query_len = to_int32("min_query_len", min_query_len);
  params.max_query_len = to_int32("max_query_len", max_query_len);
  params.sliding_window = to_int32("sliding_window", sliding_window);
  check_heads(params);
  check_workspace(params);
  NANO_VLLM_DISPATCH(plan_attention, workspace, params);
}

void paged_attention(const Tensor& out, const Tensor& query, const Tensor& key_cache,
                     const Tensor& value_cache, const Tensor& block_tables,
                     const Tensor& query_start_loc, const Tensor& seq_lens, int64_t min_query_len,
                     int64_t max_query_len, int64_t max_seq_len, double scale,
                     int64_t sliding_window, double softcap, const std::optional<Tensor>& workspace,
                     bool is_planned, const std::optional<Tensor>& k_scale,
                     const std::optional<Tensor>& v_scale,
                     const std::optional<Tensor>& shared_prefix) {
  PagedAttentionParams params{};
  params.dtype = float_dtype("query", query);
  const ScalarType dtype = query.scalar_type();
  check_shape("query", query, {-1, -1, -1});
  check_last_contiguous("query", query);
  check_tensor("out", out, query, dtype, {query.size(0), query.size(1), query.size(2)});
  check_device("key_cache", key_cache, query);
  params.cache_dtype = cache_dtype("key_cache", key_cache, params.dtype);
  check_tensor("key_cache", key_cache, query, scalar_type_of(params.cache_dtype),
               {-1, -1, -1, query.size(2)});
  check_tensor("value_cache", value_cache, query, key_cache.scalar_type(),
               {key_cache.size(0), key_cache.size(1), key_cache.size(2), query.size(2)});
  params.key_scale = cache_scale("k_scale", k_scale, key_cache);
  params.value_scale = cache_scale("v_scale", v_scale, value_cache);
  set_sequences(params, query, query_start_loc, seq_lens);
  set_shared_prefix(params, query, shared_prefix);
  check_tensor("block_tables", block_tables, query, ScalarType::Int, {seq_lens.size(0), -1});

  params.num_tokens = to_int32("the number of tokens", query.size(0));
  params.num_heads = to_int32("num_heads", query.size(1));
  params.num_kv_heads = to_int32("num_kv_heads", key_cache.size(2));
  params.head_dim = to_int32("head_dim", query.size(2));
  params.block_size = to_int32("block_size", key_cache.size(1));
  params.min_query_len = to_int32("min_query_len", min_query_len);
  params.max_query_len = to_int32("max_query_len", max_query_len);
  params.max_seq_len = to_int32("max_seq_len", max_seq_len);
  params.sliding_window = to_int32("sliding_window", sliding_window);
  params.scale = static_cast<float>(scale);
  params.softcap = static_cast<float>(softcap);

  check_heads(params);
  check(params.block_size % 8 == 0 && params.block_size >= 8 && params.block_size <= 256,
        "block_size must be a multiple of 8 in [8, 256], got ", params.block_size);
  const int64_t covered = block_tables.size(1) * params.block_size;
  check(params.num_seqs == 0 || max_seq_len <= covered, "max_seq_len must be at most ", covered,
        " (", block_tables.size(1), " blocks of ", params.block_size, "), got ", max_seq_len);
  check(std::isfinite(scale), "scale must be finite, got ", scale);
  check(std::isfinite(softcap) && softcap >= 0, "softcap must be finite and at least 0, got ",
        softcap);

  params.out = out.mutable_data_ptr();
  params.query = query.const_data_ptr();
  params.key_cache = key_cache.const_data_ptr();
  params.value_cache = value_cache.const_data_ptr();
  params.block_tables = static_cast<const int32_t*>(block_tables.const_data_ptr());
  params.out_stride_token = out.stride(0);
  params.out_stride_head = out.stride(1);
  params.query_stride_token = query.stride(0);
  params.query_stride_head = query.stride(1);
  params.key_stride_block = key_cache.stride(0);
  params.key_stride_token = key_cache.stride(1);
  params.key_stride_head = key_cache.stride(2);
  params.value_stride_block = value_cache.stride(0);
  params.value_stride_token = value_cache.stride(1);
  params.value_stride_head = value_cache.stride(2);
  params.block_tables_stride = block_tables.stride(0);

  if (workspace.has_value()) set_workspace(params, query, *workspace);
  if (query.is_cuda()) check_workspace(params);
  params.is_planned = is_planned;
  if (params.num_seqs == 0 || params.num_heads == 0 || query.size(0) == 0) return;
  NANO_VLLM_DISPATCH(paged_attention, query, params);
}

}  // namespace nano_vllm
