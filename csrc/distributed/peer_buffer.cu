// Buffers that processes map from each other, by CUDA's handles for it.
#include <algorithm>

#include "common/cuda_common.cuh"
#include "distributed/peer_buffer.h"

namespace nano_vllm::cuda {
namespace {

void check_cuda(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // it is told here, and not by the next launch
  fail(what, ": ", cudaGetErrorString(error));
}

}  // namespace

void* allocate_peer_buffer(int64_t num_bytes) {
  void* buffer = nullptr;
  check_cuda("peer buffer", cudaMalloc(&buffer, static_cast<size_t>(num_bytes)));
  check_cuda("peer buffer", cudaMemset(buffer, 0, static_cast<size_t>(num_bytes)));
  check_cuda("peer buffer", cudaDeviceSynchronize());
  return buffer;
}

void free_peer_buffer(void* buffer) { check_cuda("peer buffer", cudaFree(buffer)); }

void export_peer_buffer(void* buffer, uint8_t* handle) {
  static_assert(sizeof(cudaIpcMemHandle_t) == kPeerHandleBytes);
  cudaIpcMemHandle_t made;
  check_cuda("peer buffer", cudaIpcGetMemHandle(&made, buffer));
  std::copy_n(reinterpret_cast<const uint8_t*>(&made), kPeerHandleBytes, handle);
}

void* import_peer_buffer(const uint8_t* handle) {
  cudaIpcMemHandle_t theirs;
  std::copy_n(handle, kPeerHandleBytes, reinterpret_cast<uint8_t*>(&theirs));
  void* buffer = nullptr;
  check_cuda("a peer's buffer",
             cudaIpcOpenMemHandle(&buffer, theirs, cudaIpcMemLazyEnablePeerAccess));
  return buffer;
}

void close_peer_buffer(void* buffer) {
  check_cuda("a peer's buffer", cudaIpcCloseMemHandle(buffer));
}

}  // namespace nano_vllm::cuda
