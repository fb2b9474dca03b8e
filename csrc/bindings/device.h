// Where an op runs: on the CPU, or on the CUDA device and stream that torch has current.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "common/stream.h"

namespace nano_vllm {

// Makes the device of a CUDA tensor current for the life of the object, and finds torch's current
// stream on it.
class CudaScope {
 public:
  explicit CudaScope(const torch::stable::Tensor& tensor);
  ~CudaScope();
  CudaScope(const CudaScope&) = delete;
  CudaScope& operator=(const CudaScope&) = delete;

  cudaStream_t stream() const { return stream_; }

 private:
  int previous_device_ = 0;
  int device_ = 0;
  cudaStream_t stream_ = nullptr;
};

// Whether the current device can read and write this host memory: it is pinned.
bool is_device_accessible(const void* host_memory);

}  // namespace nano_vllm

// Runs cpu::op(params) or cuda::op(params, stream), by the device of `tensor`.
#ifdef NANO_VLLM_CUDA
#define NANO_VLLM_DISPATCH(op, tensor, params)                                  \
  do {                                                                          \
    if ((tensor).is_cpu()) {                                                    \
      cpu::op(params);                                                          \
    } else {                                                                    \
      check((tensor).is_cuda(), #op, " runs on cpu and cuda, got a tensor on ", \
            device_of(tensor));                                                 \
      const ::nano_vllm::CudaScope cuda_scope((tensor));                        \
      cuda::op(params, cuda_scope.stream());                                    \
    }                                                                           \
  } while (false)
#else
#define NANO_VLLM_DISPATCH(op, tensor, params)                                          \
  do {                                                                                  \
    check((tensor).is_cpu(), #op, ": this build has no CUDA kernels; got a tensor on ", \
          device_of(tensor), "; rebuild with NANO_VLLM_BUILD=cuda");                    \
    cpu::op(params);                                                                    \
  } while (false)
#endif
