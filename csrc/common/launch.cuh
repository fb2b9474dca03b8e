// Launches with attributes: shared memory beyond the usual, clusters of blocks, programmatic
// dependence; and what a build has code for.
#pragma once

#include "common/cuda_common.cuh"

namespace nano_vllm::cuda {

// Whether this compilation is for Hopper, and with its own instructions (sm_90a). The kernels that
// need it are empty in others and refuse all but one thread, by which has_code() knows them.
#if __CUDA_ARCH__ == 900
constexpr bool kIsSm90 = true;
#else
constexpr bool kIsSm90 = false;
#endif
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kIsSm90a = true;
#else
constexpr bool kIsSm90a = false;
#endif

// Whether this build has code of the kernel for the current device.
template <class Kernel>
bool has_code(Kernel* kernel, int num_threads) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess &&
         attributes.maxThreadsPerBlock >= num_threads;
}

// What a launch may ask for besides its grid.
struct LaunchOptions {
  size_t shared_bytes = 0;    // dynamic, also beyond the 48 KiB that need no permission
  unsigned cluster_size = 1;  // blocks along x
  bool is_dependent = false;  // the kernel waits for the one before it by itself
};

template <class Kernel, class... Args>
void launch_with_options(const char* name, Kernel* kernel, dim3 grid, dim3 block,
                         const LaunchOptions& options, cudaStream_t stream, const Args&... args) {
  check(grid.y <= 65535 && grid.z <= 65535, name,
        ": a grid has at most 65535 blocks in y and z, got ", grid.y, " and ", grid.z);
  cudaError_t error = cudaSuccess;
  if (options.shared_bytes > 0) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(options.shared_bytes));
    if (error == cudaSuccess) {
      // As many blocks of an SM as its shared memory holds: the first-level cache has no other use.
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                   cudaSharedmemCarveoutMaxShared);
    }
  }
  check(error == cudaSuccess, name, ": ", options.shared_bytes,
        " bytes of shared memory refused: ", cudaGetErrorString(error));
  cudaLaunchAttribute attributes[2] = {};
  unsigned num_attributes = 0;
  if (options.is_dependent) {
    cudaLaunchAttribute& attribute = attributes[num_attributes++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (options.cluster_size > 1) {
    cudaLaunchAttribute& attribute = attributes[num_attributes++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = options.cluster_size;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = options.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = num_attributes;
  error = cudaLaunchKernelEx(&config, kernel, args...);
  check(error == cudaSuccess, name, ": launch failed: ", cudaGetErrorString(error));
}

template <class Kernel, class... Args>
void launch_kernel(const char* name, Kernel* kernel, dim3 grid, int num_threads,
                   size_t shared_bytes, cudaStream_t stream, const Args&... args) {
  launch_with_options(name, kernel, grid, dim3(static_cast<unsigned>(num_threads)), {shared_bytes},
                      stream, args...);
}

// Of a kernel of sm_90 that waits for the one before it in the stream by itself.
template <class Kernel, class... Args>
void launch_dependent_kernel(const char* name, Kernel* kernel, dim3 grid, int num_threads,
                             size_t shared_bytes, cudaStream_t stream, const Args&... args) {
  launch_with_options(name, kernel, grid, dim3(static_cast<unsigned>(num_threads)),
                      {shared_bytes, 1, true}, stream, args...);
}

// Whether kernels of this build can wait for the one before them by themselves, on the current
// device: their code is not for something older.
template <class Kernel>
bool can_depend(Kernel* kernel) {
  static const bool can = [&] {
    cudaFuncAttributes attributes;
    return compute_capability() >= 90 &&
           cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
  }();
  return can;
}

// A small kernel that waits by itself wherever it can.
template <class Kernel, class... Args>
void launch_in_chain(const char* name, Kernel* kernel, dim3 grid, dim3 block, cudaStream_t stream,
                     const Args&... args) {
  launch_with_options(name, kernel, grid, block, {0, 1, can_depend(kernel)}, stream, args...);
}

}  // namespace nano_vllm::cuda
