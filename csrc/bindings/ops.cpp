// The table of ops, registered through LibTorch's stable ABI: one build serves every torch
// from 2.11 on.
#include "bindings/ops.h"

#include <torch/csrc/stable/library.h>

#include "attention/paged_attention.h"

namespace nano_vllm {
namespace {

bool has_cuda() {
#ifdef NANO_VLLM_CUDA
  return true;
#else
  return false;
#endif
}

int64_t workspace_numel(int64_t num_seqs, int64_t num_heads, int64_t head_dim) {
  return paged_attention_workspace_numel(num_seqs, num_heads, head_dim);
}

}  // namespace
}  // namespace nano_vllm

STABLE_TORCH_LIBRARY(nano_vllm, library) {
  library.def("has_cuda() -> bool");
  library.def("paged_attention_workspace_numel(int num_seqs, int num_heads, int head_dim) -> int");
  library.def(
      "plan_attention(Tensor(a!) workspace, Tensor query_start_loc, Tensor seq_lens, int "
      "num_heads, "
      "int num_kv_heads, int head_dim, int min_query_len, int max_query_len, int sliding_window, "
      "Tensor? "
      "shared_prefix) -> ()");
  library.def(
      "paged_attention(Tensor(a!) out, Tensor query, Tensor key_cache, Tensor value_cache, Tensor "
      "block_tables, "
      "Tensor query_start_loc, Tensor seq_lens, int min_query_len, int max_query_len, int "
      "max_seq_len, float scale, "
      "int sliding_window, "
      "float softcap, Tensor(b!)? workspace, bool is_planned, Tensor? k_scale, Tensor? v_scale, "
      "Tensor? shared_prefix) -> ()");
  library.def(
      "reshape_and_cache(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
      "Tensor slot_mapping, Tensor? k_scale, Tensor? v_scale) -> ()");
  library.def(
      "rotary_reshape_and_cache(Tensor positions, Tensor(a!) query, Tensor key, Tensor value, "
      "Tensor(b!) key_cache, Tensor(c!) value_cache, Tensor slot_mapping, Tensor cos_sin_cache, "
      "bool is_neox, Tensor? query_norm_weight, Tensor? key_norm_weight, float norm_eps, "
      "Tensor? k_scale, Tensor? v_scale) -> ()");
  library.def(
      "qkv_linear(Tensor(a!) query, Tensor input, Tensor weight, Tensor? bias, Tensor positions, "
      "Tensor(b!) key_cache, Tensor(c!) value_cache, Tensor slot_mapping, Tensor cos_sin_cache, "
      "Tensor? query_norm_weight, Tensor? key_norm_weight, float norm_eps, "
      "Tensor? k_scale, Tensor? v_scale) -> ()");
  library.def("qkv_linear_pays(Tensor weight, int num_rows, int head_dim) -> bool");
  library.def("copy_blocks(Tensor(a!) kv_cache, Tensor block_mapping) -> ()");
  library.def("swap_blocks(Tensor src_cache, Tensor(a!) dst_cache, Tensor block_mapping) -> ()");
  library.def("rms_norm(Tensor(a!) out, Tensor input, Tensor weight, float eps) -> ()");
  library.def(
      "fused_add_rms_norm(Tensor(a!) out, Tensor input, Tensor(b!) residual, Tensor weight, float "
      "eps) -> ()");
  library.def("silu_and_mul(Tensor(a!) out, Tensor input) -> ()");
  library.def("gelu_and_mul(Tensor(a!) out, Tensor input, str approximate) -> ()");
  library.def("linear(Tensor(a!) out, Tensor input, Tensor weight, Tensor? bias) -> ()");
  library.def("linear_silu_and_mul(Tensor(a!) out, Tensor input, Tensor weight) -> ()");
  library.def("linear_silu_and_mul_pays(Tensor weight, int num_rows) -> bool");
  library.def("linear_max_rows(Tensor weight) -> int");
  library.def("peer_buffer_bytes(int max_bytes, int num_ranks) -> int");
  library.def("allocate_peer_buffer(Tensor like, int num_bytes) -> int");
  library.def("export_peer_buffer(Tensor like, Tensor(a!) handle, int buffer) -> ()");
  library.def("import_peer_buffer(Tensor like, Tensor handle) -> int");
  library.def("release_peer_buffer(Tensor like, int buffer, bool is_own) -> ()");
  library.def(
      "all_reduce(Tensor(a!) out, Tensor input, Tensor(b!)? residual, Tensor? weight, float eps, "
      "Tensor buffers, int rank, int max_bytes, str way) -> ()");
  library.def("quantized_linear(Tensor(a!) out, Tensor input, Tensor weight, Tensor? bias) -> ()");
  library.def(
      "adjust_logits(Tensor(a!) out, Tensor logits, Tensor rows, Tensor(b!) token_ids, Tensor "
      "slots, Tensor new_token_ids, Tensor seq_lens, Tensor prompt_lens, Tensor "
      "repetition_penalties, Tensor frequency_penalties, Tensor presence_penalties, Tensor "
      "bias_starts, Tensor bias_token_ids, Tensor bias_values, Tensor allowed_starts, Tensor "
      "allowed_token_ids, Tensor end_starts, Tensor end_token_ids, Tensor min_tokens, Tensor "
      "bad_word_starts, Tensor bad_word_token_starts, Tensor bad_word_token_ids) -> ()");
  library.def(
      "sample_tokens(Tensor(a!) out, Tensor logits, Tensor temperatures, Tensor top_k, Tensor "
      "top_p, Tensor min_p, Tensor seeds, Tensor streams, Tensor seq_lens, Tensor prompt_lens, "
      "Tensor? adjusted, Tensor? adjusted_rows) -> ()");
}

// One entry for all devices: which twin runs is decided by the tensors, after they are checked
// against each other.
STABLE_TORCH_LIBRARY_IMPL(nano_vllm, CompositeExplicitAutograd, library) {
  library.impl("has_cuda", TORCH_BOX(&nano_vllm::has_cuda));
  library.impl("paged_attention_workspace_numel", TORCH_BOX(&nano_vllm::workspace_numel));
  library.impl("plan_attention", TORCH_BOX(&nano_vllm::plan_attention));
  library.impl("paged_attention", TORCH_BOX(&nano_vllm::paged_attention));
  library.impl("reshape_and_cache", TORCH_BOX(&nano_vllm::reshape_and_cache));
  library.impl("rotary_reshape_and_cache", TORCH_BOX(&nano_vllm::rotary_reshape_and_cache));
  library.impl("qkv_linear", TORCH_BOX(&nano_vllm::qkv_linear));
  library.impl("qkv_linear_pays", TORCH_BOX(&nano_vllm::qkv_linear_pays));
  library.impl("copy_blocks", TORCH_BOX(&nano_vllm::copy_blocks));
  library.impl("swap_blocks", TORCH_BOX(&nano_vllm::swap_blocks));
  library.impl("rms_norm", TORCH_BOX(&nano_vllm::rms_norm));
  library.impl("fused_add_rms_norm", TORCH_BOX(&nano_vllm::fused_add_rms_norm));
  library.impl("silu_and_mul", TORCH_BOX(&nano_vllm::silu_and_mul));
  library.impl("gelu_and_mul", TORCH_BOX(&nano_vllm::gelu_and_mul));
  library.impl("linear", TORCH_BOX(&nano_vllm::linear));
  library.impl("linear_silu_and_mul", TORCH_BOX(&nano_vllm::linear_silu_and_mul));
  library.impl("linear_silu_and_mul_pays", TORCH_BOX(&nano_vllm::linear_silu_and_mul_pays));
  library.impl("linear_max_rows", TORCH_BOX(&nano_vllm::linear_max_rows));
  library.impl("peer_buffer_bytes", TORCH_BOX(&nano_vllm::peer_buffer_bytes));
  library.impl("allocate_peer_buffer", TORCH_BOX(&nano_vllm::allocate_peer_buffer));
  library.impl("export_peer_buffer", TORCH_BOX(&nano_vllm::export_peer_buffer));
  library.impl("import_peer_buffer", TORCH_BOX(&nano_vllm::import_peer_buffer));
  library.impl("release_peer_buffer", TORCH_BOX(&nano_vllm::release_peer_buffer));
  library.impl("all_reduce", TORCH_BOX(&nano_vllm::all_reduce));
  library.impl("quantized_linear", TORCH_BOX(&nano_vllm::quantized_linear));
  library.impl("adjust_logits", TORCH_BOX(&nano_vllm::adjust_logits));
  library.impl("sample_tokens", TORCH_BOX(&nano_vllm::sample_tokens));
}
