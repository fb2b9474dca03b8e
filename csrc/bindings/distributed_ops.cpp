#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>

#include "bindings/device.h"
#include "bindings/ops.h"
#include "bindings/tensor_checks.h"
#include "distributed/all_reduce.h"
#include "distributed/peer_buffer.h"

namespace nano_vllm {
namespace {

// All of these run on CUDA alone.
void check_cuda(const char* op, const Tensor& tensor) {
#ifdef NANO_VLLM_CUDA
  check(tensor.is_cuda(), op, " runs on CUDA alone, got a tensor on ", device_of(tensor));
#else
  fail(op, ": this build has no CUDA kernels; got a tensor on ", device_of(tensor),
       "; rebuild with NANO_VLLM_BUILD=cuda");
#endif
}

void check_rows(const char* name, const Tensor& tensor, const Tensor& input) {
  check_tensor(name, tensor, input, input.scalar_type(), {input.size(0), input.size(1)});
  check(tensor.stride(0) == tensor.size(1) || tensor.size(0) <= 1, name,
        " must have rows one behind the other, got stride ", tensor.stride(0), " for rows of ",
        tensor.size(1));
}

void check_handle(const Tensor& handle) {
  check(handle.is_cpu(), "handle must be on cpu, got ", device_of(handle));
  check_dtype("handle", handle, ScalarType::Byte);
  check_shape("handle", handle, {cuda::kPeerHandleBytes});
}

void check_max_bytes(int64_t max_bytes) {
  check(max_bytes > 0 && max_bytes % 16 == 0, "max_bytes must be a positive multiple of 16, got ",
        max_bytes);
}

AllReduceWay read_way(const std::string& way) {
  if (way == "one-shot") return AllReduceWay::kOneShot;
  if (way == "two-shot") return AllReduceWay::kTwoShot;
  check(way == "plain", "way must be one-shot, two-shot or plain, got ", way);
  return AllReduceWay::kPlain;
}

#ifdef NANO_VLLM_CUDA
void* as_pointer(int64_t address) { return reinterpret_cast<void*>(address); }
#endif

}  // namespace

int64_t peer_buffer_bytes(int64_t max_bytes, int64_t num_ranks) {
  check(num_ranks >= 2 && num_ranks <= kMaxPeers, "num_ranks must be in [2, ", kMaxPeers, "], got ",
        num_ranks);
  check_max_bytes(max_bytes);
  return size_of_peer_buffer(max_bytes, static_cast<int>(num_ranks));
}

void all_reduce(const Tensor& out, const Tensor& input, const std::optional<Tensor>& residual,
                const std::optional<Tensor>& weight, double eps, const Tensor& buffers,
                int64_t rank, int64_t max_bytes, const std::string& way) {
  check_cuda("all_reduce", input);
  AllReduceParams params{};
  params.dtype = float_dtype("input", input);
  check_shape("input", input, {-1, -1});
  check_rows("input", input, input);
  check_rows("out", out, input);
  check(residual.has_value() == weight.has_value(), "residual and weight come together");
  if (residual.has_value()) {
    check_rows("residual", *residual, input);
    check_tensor("weight", *weight, input, input.scalar_type(), {input.size(1)});
  }
  check(buffers.is_cpu(), "buffers must be on cpu, got ", device_of(buffers));
  check_dtype("buffers", buffers, ScalarType::Long);
  check_shape("buffers", buffers, {-1});
  check_last_contiguous("buffers", buffers);
  const int64_t num_ranks = buffers.size(0);
  check(num_ranks >= 2 && num_ranks <= kMaxPeers, "there must be 2 to ", kMaxPeers,
        " buffers, got ", num_ranks);
  check(rank >= 0 && rank < num_ranks, "rank must be in [0, ", num_ranks, "), got ", rank);
  const auto row_bytes = input.size(1) * static_cast<int64_t>(size_of(params.dtype));
  check(row_bytes > 0 && row_bytes % 16 == 0, "a row must be a multiple of 16 bytes, got ",
        row_bytes);
  check_max_bytes(max_bytes);
  params.way = read_way(way);
  const int64_t limit = params.way == AllReduceWay::kTwoShot
                            ? max_bytes
                            : max_one_shot_bytes(max_bytes, static_cast<int>(num_ranks));
  check(input.size(0) * row_bytes <= limit, "a ", way, " message has at most ", limit,
        " bytes, got ", input.size(0) * row_bytes);
  for (const Tensor* tensor : {&out, &input}) {
    check(reinterpret_cast<uintptr_t>(tensor->const_data_ptr()) % 16 == 0,
          "input, out, residual and weight must begin at a multiple of 16 bytes");
  }
  params.out = out.mutable_data_ptr();
  params.input = input.const_data_ptr();
  if (residual.has_value()) {
    params.residual = residual->mutable_data_ptr();
    params.weight = weight->const_data_ptr();
    check((reinterpret_cast<uintptr_t>(params.residual) |
           reinterpret_cast<uintptr_t>(params.weight)) %
                  16 ==
              0,
          "input, out, residual and weight must begin at a multiple of 16 bytes");
  }
  params.eps = static_cast<float>(eps);
  params.num_rows = to_int32("num_rows", input.size(0));
  params.hidden_size = to_int32("hidden_size", input.size(1));
  params.rank = static_cast<int32_t>(rank);
  params.num_ranks = static_cast<int32_t>(num_ranks);
  params.max_bytes = max_bytes;
#ifdef NANO_VLLM_CUDA
  const auto* addresses = static_cast<const int64_t*>(buffers.const_data_ptr());
  std::transform(addresses, addresses + num_ranks, params.buffers, as_pointer);
  const CudaScope cuda_scope(input);
  cuda::all_reduce(params, cuda_scope.stream());
#endif
}

int64_t allocate_peer_buffer(const Tensor& like, int64_t num_bytes) {
  check_cuda("allocate_peer_buffer", like);
#ifdef NANO_VLLM_CUDA
  const CudaScope cuda_scope(like);
  return reinterpret_cast<int64_t>(cuda::allocate_peer_buffer(num_bytes));
#else
  return num_bytes;
#endif
}

void export_peer_buffer(const Tensor& like, const Tensor& handle, int64_t buffer) {
  check_cuda("export_peer_buffer", like);
  check_handle(handle);
#ifdef NANO_VLLM_CUDA
  const CudaScope cuda_scope(like);
  cuda::export_peer_buffer(as_pointer(buffer), static_cast<uint8_t*>(handle.mutable_data_ptr()));
#endif
}

int64_t import_peer_buffer(const Tensor& like, const Tensor& handle) {
  check_cuda("import_peer_buffer", like);
  check_handle(handle);
#ifdef NANO_VLLM_CUDA
  const CudaScope cuda_scope(like);
  const auto* bytes = static_cast<const uint8_t*>(handle.const_data_ptr());
  return reinterpret_cast<int64_t>(cuda::import_peer_buffer(bytes));
#else
  return 0;
#endif
}

void release_peer_buffer(const Tensor& like, int64_t buffer, bool is_own) {
  check_cuda("release_peer_buffer", like);
#ifdef NANO_VLLM_CUDA
  const CudaScope cuda_scope(like);
  (is_own ? cuda::free_peer_buffer : cuda::close_peer_buffer)(as_pointer(buffer));
#endif
}

}  // namespace nano_vllm
