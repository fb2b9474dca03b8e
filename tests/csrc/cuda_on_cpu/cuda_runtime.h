// CUDA C++ on a CPU, as far as the kernels tested here use it: a kernel's clusters run one after
// the other, the threads of their blocks as fibers that take turns where they wait for one another.
// So the kernels' indexing, masks, plans and barriers are tested, under AddressSanitizer too, where
// there is no GPU. What is not seen: the order of unsynchronised memory accesses, and timing.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>

#include "common/stream.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static  // blocks run one after the other; no cluster's kernel has it
#define __CUDA_ARCH__ 900
#define __CUDA_ARCH_FEAT_SM90_ALL

struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the thread that runs

namespace cuda_on_cpu {

constexpr int kWarpSize = 32;
constexpr size_t kSharedBytes = 227 * 1024;

unsigned char* shared_memory();  // [kSharedBytes], at a multiple of 1024

// The same of a block of the cluster that runs, and which of them this thread's is.
unsigned char* shared_memory_of(int rank);
int rank_in_cluster();

// Runs body once for each thread of each block, the blocks of a cluster along x together. Threads
// that all wait for ever are a failure that ends the process.
void run_grid(dim3 grid, dim3 block, unsigned cluster_size, size_t shared_bytes,
              const std::function<void()>& body);

// A barrier among all threads of a cluster.
void arrive_at_cluster();
void wait_for_cluster();

// Lets the other threads run until the condition holds.
void wait_until(const std::function<bool()>& condition);

// Meets the other threads of the same group, `count` in all, with some bytes each; run is called
// once, by the last to come, with the data of all, by rank. Groups are told apart by their key.
void meet(int key, int rank, int count, void* data, const std::function<void(void**)>& run);
// Counts as one of the group, but does not wait for the others.
void arrive(int key, int count);

// One register of each ldmatrix since this thread last handed back what it had loaded, all in one.
// On a GPU these loads may still be under way.
uint32_t& loads_under_way();

// Several GPUs of a host, see devices.cpp: runs body once for each, all at the same time. They take
// turns at random, some more often than others; their sequence is given by the seed. Returns
// whether all have ended, none of them with a failed check.
bool run_devices(int count, unsigned seed, const std::function<void(int)>& body);

// Zeros that all devices have at the same address, of those that run later.
unsigned char* allocate_common(size_t num_bytes);
void free_common(unsigned char* memory, size_t num_bytes);

// A write to common memory lands at some time after, and before those or after those that were made
// before it; at the end of a kernel all have landed. Who reads lets others go on first.
void write_common(uint4* at, uint4 value);
uint4 read_common(const uint4* at);
void land_writes();

// A word that lands like any other, but behind all that its thread has written before, and that the
// others of the block had written before they met at a __syncthreads() since. Reads are made in
// their order: that one is missing between the look at a word and what it tells of is not seen.
void release_common(uint32_t* at, uint32_t value);
uint32_t acquire_common(const uint32_t* at);

// How many __syncthreads() lie behind the thread that runs.
int64_t syncs_of_block();

// Rounds that a warp stays behind the others of its block: now and then some, of several devices.
int lag_of_warp();

inline int lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }
inline int warp() { return static_cast<int>(threadIdx.x) / kWarpSize; }

// Every lane's value, by lane.
template <class T>
struct WarpValues {
  T value[kWarpSize];
};
template <class T>
WarpValues<T> gather(T value) {
  struct Data {
    T in;
    WarpValues<T> out;
  } data{value, {}};
  meet(1000 + warp(), lane(), kWarpSize, &data, [](void** all) {
    WarpValues<T> values;
    for (int i = 0; i < kWarpSize; ++i) values.value[i] = static_cast<Data*>(all[i])->in;
    for (int i = 0; i < kWarpSize; ++i) static_cast<Data*>(all[i])->out = values;
  });
  return data.out;
}

}  // namespace cuda_on_cpu

inline void __syncthreads() {
  cuda_on_cpu::meet(0, threadIdx.x, blockDim.x, nullptr, [](void**) {});
}
// The number of threads of the block for which the value holds.
inline int __syncthreads_count(bool value) {
  struct Data {
    int in, out;
  } data{value, 0};
  cuda_on_cpu::meet(0, threadIdx.x, blockDim.x, &data, [](void** all) {
    int count = 0;
    for (unsigned i = 0; i < blockDim.x; ++i) count += static_cast<Data*>(all[i])->in;
    for (unsigned i = 0; i < blockDim.x; ++i) static_cast<Data*>(all[i])->out = count;
  });
  return data.out;
}
inline bool __syncthreads_or(bool value) { return __syncthreads_count(value) != 0; }
inline void __syncwarp() { cuda_on_cpu::gather(0); }
template <class T>
T __shfl_sync(unsigned, T value, int source) {
  return cuda_on_cpu::gather(value).value[source % cuda_on_cpu::kWarpSize];
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return cuda_on_cpu::gather(value).value[cuda_on_cpu::lane() ^ mask];
}
template <class T>
T __shfl_up_sync(unsigned, T value, int delta) {
  const auto all = cuda_on_cpu::gather(value);
  return all.value[std::max(cuda_on_cpu::lane() - delta, 0) +
                   (cuda_on_cpu::lane() < delta ? cuda_on_cpu::lane() : 0)];
}
inline unsigned __ballot_sync(unsigned, bool value) {
  const auto all = cuda_on_cpu::gather(value);
  unsigned bits = 0;
  for (int i = 0; i < cuda_on_cpu::kWarpSize; ++i) bits |= unsigned{all.value[i]} << i;
  return bits;
}
inline bool __all_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) == ~0u; }
inline bool __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }
template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address += value;
  return old;
}
inline unsigned atomicOr(unsigned* address, unsigned value) {
  const unsigned old = *address;
  *address |= value;
  return old;
}

using std::isinf;
using std::isnan;

inline float __uint_as_float(unsigned x) {
  float y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}
inline unsigned __float_as_uint(float x) {
  unsigned y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}
// Byte i is that of the eight of (y, x) which hexadecimal digit i of the selector names.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned picked = 0;
  for (int i = 0; i < 4; ++i) {
    picked |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  }
  return picked;
}
inline unsigned long long __float2ull_rn(float x) {
  return static_cast<unsigned long long>(std::nearbyint(x));
}
inline float __double2float_ru(double x) {
  const float y = static_cast<float>(x);
  return y < x ? std::nextafter(y, INFINITY) : y;
}
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdividef(float x, float y) { return x / y; }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
template <class T>
void __stcg(T* address, T value) {
  *address = value;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

// --- the run-time library ---

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout
};
constexpr int cudaSharedmemCarveoutMaxShared = 100;
constexpr int cudaLaunchAttributeProgrammaticStreamSerialization = 0;
constexpr int cudaLaunchAttributeClusterDimension = 1;
struct cudaFuncAttributes {
  int maxThreadsPerBlock, ptxVersion;
};
struct cudaLaunchAttribute {
  int id;
  struct {
    int programmaticStreamSerializationAllowed;
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace cuda_on_cpu {
inline int capability = 90;  // of the device that is played
}

inline const char* cudaGetErrorString(cudaError_t) { return "invalid value"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount      ? 3
           : attribute == cudaDevAttrComputeCapabilityMajor ? cuda_on_cpu::capability / 10
                                                            : cuda_on_cpu::capability % 10;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int value) {
  return static_cast<size_t>(value) <= cuda_on_cpu::kSharedBytes ? cudaSuccess
                                                                 : cudaErrorInvalidValue;
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  attributes->maxThreadsPerBlock = 1024;
  attributes->ptxVersion = 90;
  return cudaSuccess;
}
template <class... Parameters, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Args&... args) {
  unsigned cluster_size = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) {
      cluster_size = config->attrs[i].val.clusterDim.x;
    }
  }
  cuda_on_cpu::run_grid(config->gridDim, config->blockDim, cluster_size, config->dynamicSmemBytes,
                        [&] { kernel(args...); });
  return cudaSuccess;
}
