// The functions behind torch.ops.nano_vllm: each checks its tensors, fills the kernel's Params and
// calls the twin of the tensors' device. nano_vllm/ops.py documents the arguments.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>

namespace nano_vllm {

using torch::stable::Tensor;

void plan_attention(const Tensor& workspace, const Tensor& query_start_loc, const Tensor& seq_lens,
                    int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                    int64_t min_query_len, int64_t max_query_len, int64_t sliding_window,
                    const std::optional<Tensor>& shared_prefix);
void paged_attention(const Tensor& out, const Tensor& query, const Tensor& key_cache,
                     const Tensor& value_cache, const Tensor& block_tables,
                     const Tensor& query_start_loc, const Tensor& seq_lens, int64_t min_query_len,
                     int64_t max_query_len, int64_t max_seq_len, double scale,
                     int64_t sliding_window, double softcap, const std::optional<Tensor>& workspace,
                     bool is_planned, const std::optional<Tensor>& k_scale,
                     const std::optional<Tensor>& v_scale,
                     const std::optional<Tensor>& shared_prefix);

void reshape_and_cache(const Tensor& key, const Tensor& value, const Tensor& key_cache,
                       const Tensor& value_cache, const Tensor& slot_mapping,
                       const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale);
void rotary_reshape_and_cache(const Tensor& positions, const Tensor& query, const Tensor& key,
                              const Tensor& value, const Tensor& key_cache,
                              const Tensor& value_cache, const Tensor& slot_mapping,
                              const Tensor& cos_sin_cache, bool is_neox,
                              const std::optional<Tensor>& query_norm_weight,
                              const std::optional<Tensor>& key_norm_weight, double norm_eps,
                              const std::optional<Tensor>& k_scale,
                              const std::optional<Tensor>& v_scale);
void qkv_linear(const Tensor& query, const Tensor& input, const Tensor& weight,
                const std::optional<Tensor>& bias, const Tensor& positions, const Tensor& key_cache,
                const Tensor& value_cache, const Tensor& slot_mapping, const Tensor& cos_sin_cache,
                const std::optional<Tensor>& query_norm_weight,
                const std::optional<Tensor>& key_norm_weight, double norm_eps,
                const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale);
bool qkv_linear_pays(const Tensor& weight, int64_t num_rows, int64_t head_dim);
void copy_blocks(const Tensor& kv_cache, const Tensor& block_mapping);
void swap_blocks(const Tensor& src_cache, const Tensor& dst_cache, const Tensor& block_mapping);

void rms_norm(const Tensor& out, const Tensor& input, const Tensor& weight, double eps);
void fused_add_rms_norm(const Tensor& out, const Tensor& input, const Tensor& residual,
                        const Tensor& weight, double eps);
void silu_and_mul(const Tensor& out, const Tensor& input);
void gelu_and_mul(const Tensor& out, const Tensor& input, const std::string& approximate);
void linear(const Tensor& out, const Tensor& input, const Tensor& weight,
            const std::optional<Tensor>& bias);

void linear_silu_and_mul(const Tensor& out, const Tensor& input, const Tensor& weight);

bool linear_silu_and_mul_pays(const Tensor& weight, int64_t num_rows);
int64_t linear_max_rows(const Tensor& weight);

int64_t peer_buffer_bytes(int64_t max_bytes, int64_t num_ranks);
int64_t allocate_peer_buffer(const Tensor& like, int64_t num_bytes);
void export_peer_buffer(const Tensor& like, const Tensor& handle, int64_t buffer);
int64_t import_peer_buffer(const Tensor& like, const Tensor& handle);
void release_peer_buffer(const Tensor& like, int64_t buffer, bool is_own);
void all_reduce(const Tensor& out, const Tensor& input, const std::optional<Tensor>& residual,
                const std::optional<Tensor>& weight, double eps, const Tensor& buffers,
                int64_t rank, int64_t max_bytes, const std::string& way);

void quantized_linear(const Tensor& out, const Tensor& input, const Tensor& weight,
                      const std::optional<Tensor>& bias);

void adjust_logits(const Tensor& out, const Tensor& logits, const Tensor& rows,
                   const Tensor& token_ids, const Tensor& slots, const Tensor& new_token_ids,
                   const Tensor& seq_lens, const Tensor& prompt_lens,
                   const Tensor& repetition_penalties, const Tensor& frequency_penalties,
                   const Tensor& presence_penalties, const Tensor& bias_starts,
                   const Tensor& bias_token_ids, const Tensor& bias_values,
                   const Tensor& allowed_starts, const Tensor& allowed_token_ids,
                   const Tensor& end_starts, const Tensor& end_token_ids, const Tensor& min_tokens,
                   const Tensor& bad_word_starts, const Tensor& bad_word_token_starts,
                   const Tensor& bad_word_token_ids);
void sample_tokens(const Tensor& out, const Tensor& logits, const Tensor& temperatures,
                   const Tensor& top_k, const Tensor& top_p, const Tensor& min_p,
                   const Tensor& seeds, const Tensor& streams, const Tensor& seq_lens,
                   const Tensor& prompt_lens, const std::optional<Tensor>& adjusted,
                   const std::optional<Tensor>& adjusted_rows);

}  // namespace nano_vllm
