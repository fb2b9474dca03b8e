#include "bindings/device.h"

#ifdef NANO_VLLM_CUDA
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include "bindings/tensor_checks.h"

namespace nano_vllm {
namespace {

// torch's CUDA half is found at run time, not linked: so one library serves CPU and CUDA builds of
// torch, and builds against either. By the time a CUDA tensor exists, torch has loaded it.
using GetCurrentStream = int32_t (*)(int32_t device_index, void** stream);

GetCurrentStream find_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  check(library != nullptr,
        "a CUDA tensor needs a CUDA build of torch: libtorch_cuda.so is not loaded");
  void* symbol = dlsym(library, "aoti_torch_get_current_cuda_stream");
  check(symbol != nullptr,
        "libtorch_cuda.so lacks aoti_torch_get_current_cuda_stream; torch >= 2.11 has it");
  return reinterpret_cast<GetCurrentStream>(symbol);
}

void check_cuda(cudaError_t error) {
  check(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
}

}  // namespace

CudaScope::CudaScope(const Tensor& tensor) : device_(tensor.get_device_index()) {
  static const GetCurrentStream get_current_stream = find_current_stream();
  void* stream = nullptr;
  check(get_current_stream(device_, &stream) == 0,
        "torch has no current stream for cuda:", device_);
  stream_ = static_cast<cudaStream_t>(stream);
  check_cuda(cudaGetDevice(&previous_device_));
  if (previous_device_ != device_) check_cuda(cudaSetDevice(device_));
}

CudaScope::~CudaScope() {
  if (previous_device_ != device_) (void)cudaSetDevice(previous_device_);
}

bool is_device_accessible(const void* host_memory) {
  cudaPointerAttributes attributes{};
  check_cuda(cudaPointerGetAttributes(&attributes, host_memory));
  return attributes.type == cudaMemoryTypeHost && attributes.devicePointer == host_memory;
}

}  // namespace nano_vllm
#endif
