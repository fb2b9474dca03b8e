// CUDA all_reduce in one shot: each rank sends its rows to all others, and sums what it gets.
//
// What travels has a flag beside every 4 bytes, the number of the call, as in NCCL's protocol for
// low latency: 16 bytes are written at once, so that data has come where its flag has. There is no
// other synchronisation: one way over the link is all that a call waits for.
//
// The memory of call n is used again by call n + 2. A rank that writes there has ended call n + 1,
// so it has got everybody's rows of that, and they have ended call n: kernels of a stream come one
// after the other.
#include <algorithm>

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "distributed/all_reduce.h"
#include "layers/rms_norm.cuh"

namespace nano_vllm::cuda {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxVecsPerThread = 4;

struct Counters {
  uint32_t last_call;
  uint32_t num_ended_blocks;  // of the call under way
};

__device__ inline uint32_t next_call(uint32_t call) {
  return call == ~0u ? 2 : call + 1;  // never 0, as fresh memory is, and never twice even or odd
}

__device__ inline void write_through(uint4* at, uint4 value) {
  asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

__device__ inline uint4 read_through(const uint4* at) {
  uint4 value;
  asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(at)
               : "memory");
  return value;
}

// Where a rank's vectors of one call lie in some rank's buffer: first all of their first halves.
struct Inbox {
  uint4* vecs;
  int64_t capacity;

  __device__ Inbox(const AllReduceParams& p, int owner, int sender, uint32_t call)
      : capacity(p.max_bytes / 16) {
    auto* data = reinterpret_cast<uint4*>(static_cast<char*>(p.buffers[owner]) + kPeerHeaderBytes);
    vecs = data + ((call & 1) * p.num_ranks + sender) * 2 * capacity;
  }

  template <class T>
  __device__ void send(int64_t place, const Vec<T>& vec, uint32_t call) const {
    const uint4 words = reinterpret_cast<const uint4&>(vec);
    write_through(vecs + place, {words.x, call, words.y, call});
    write_through(vecs + capacity + place, {words.z, call, words.w, call});
  }

  template <class T>
  __device__ Vec<T> receive(int64_t place, uint32_t call) const {
    uint4 low, high;
    do {
      low = read_through(vecs + place);
      high = read_through(vecs + capacity + place);
    } while (low.y != call || low.w != call || high.y != call || high.w != call);
    const uint4 words{low.x, low.z, high.x, high.z};
    return reinterpret_cast<const Vec<T>&>(words);
  }
};

// Grid: any number of blocks, which take turns at the rows. A row's elements go to the threads as
// in rms_norm.
template <class T, int kVecsPerThread>
__global__ void __launch_bounds__(kMaxThreads) all_reduce_kernel(AllReduceParams p) {
  constexpr int kSize = Vec<T>::kSize;
  allow_next_kernel();
  wait_for_last_kernel();
  auto* counters = static_cast<Counters*>(p.buffers[p.rank]);
  const uint32_t call = next_call(*static_cast<volatile uint32_t*>(&counters->last_call));
  const int vecs_per_row = p.hidden_size / kSize;

  // All rows of the block are on their way before it waits for any.
  for (int row = blockIdx.x; row < p.num_rows; row += gridDim.x) {
    for (int at = threadIdx.x; at < vecs_per_row; at += blockDim.x) {
      const int64_t place = int64_t{row} * vecs_per_row + at;
      const Vec<T> vec = load_vec(static_cast<const T*>(p.input) + place * kSize);
      for (int step = 1; step < p.num_ranks; ++step) {
        const int peer = (p.rank + step) % p.num_ranks;  // not all at the same link first
        Inbox(p, peer, p.rank, call).send(place, vec, call);
      }
    }
  }
  for (int row = blockIdx.x; row < p.num_rows; row += gridDim.x) {
    Vec<T> kept[kVecsPerThread];
    float sum_of_squares = 0.0f;
#pragma unroll
    for (int j = 0; j < kVecsPerThread; ++j) {
      const int at = threadIdx.x + j * blockDim.x;
      if (at >= vecs_per_row) continue;
      const int64_t place = int64_t{row} * vecs_per_row + at;
      float sums[kSize] = {};
      for (int sender = 0; sender < p.num_ranks; ++sender) {
        const Vec<T> vec = sender == p.rank
                               ? load_vec(static_cast<const T*>(p.input) + place * kSize)
                               : Inbox(p, p.rank, sender, call).template receive<T>(place, call);
#pragma unroll
        for (int i = 0; i < kSize; ++i) sums[i] += to_float(vec.value[i]);
      }
      Vec<T>& vec = kept[j];
#pragma unroll
      for (int i = 0; i < kSize; ++i) vec.value[i] = from_float<T>(sums[i]);
      if (p.residual == nullptr) {
        store_vec(static_cast<T*>(p.out) + place * kSize, vec);
        continue;
      }
      T* residual = static_cast<T*>(p.residual) + place * kSize;
      const Vec<T> old = load_vec(residual);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        vec.value[i] = from_float<T>(to_float(vec.value[i]) + to_float(old.value[i]));
      }
      store_vec(residual, vec);
      sum_of_squares = add_squares(sum_of_squares, vec);
    }
    if (p.residual == nullptr) continue;
    __syncthreads();  // block_sum's memory is read no more
    const float inverse = inverse_rms(block_sum(sum_of_squares), p.hidden_size, p.eps);
#pragma unroll
    for (int j = 0; j < kVecsPerThread; ++j) {
      const int at = threadIdx.x + j * blockDim.x;
      if (at >= vecs_per_row) continue;
      const int64_t place = int64_t{row} * vecs_per_row + at;
      const Vec<T> weight = load_vec(static_cast<const T*>(p.weight) + int64_t{at} * kSize);
      store_vec(static_cast<T*>(p.out) + place * kSize, normalise(kept[j], inverse, weight));
    }
  }

  // Whoever ends last counts the call: by then every block has read its number.
  __syncthreads();
  if (threadIdx.x == 0 && atomicAdd(&counters->num_ended_blocks, 1) == gridDim.x - 1) {
    counters->num_ended_blocks = 0;
    counters->last_call = call;
  }
}

template <class T, int kVecsPerThread>
void launch(const AllReduceParams& p, int num_threads, cudaStream_t stream) {
  const int grid = std::min(p.num_rows, 2 * num_multiprocessors());
  launch_in_chain("all_reduce", all_reduce_kernel<T, kVecsPerThread>,
                  dim3(static_cast<unsigned>(grid)), dim3(static_cast<unsigned>(num_threads)),
                  stream, p);
}

void check_cuda(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // it is told here, and not by the next launch
  fail(what, ": ", cudaGetErrorString(error));
}

}  // namespace

void all_reduce(const AllReduceParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return;
  dispatch_dtype(params.dtype, [&](auto element) {
    using T = decltype(element);
    const int vecs = params.hidden_size / Vec<T>::kSize;
    check(vecs <= kMaxThreads * kMaxVecsPerThread, "all_reduce: a row has at most ",
          kMaxThreads * kMaxVecsPerThread * Vec<T>::kSize, " elements, got ", params.hidden_size);
    if (vecs <= kMaxThreads) {
      launch<T, 1>(params, (vecs + kWarpSize - 1) / kWarpSize * kWarpSize, stream);
    } else {
      launch<T, kMaxVecsPerThread>(params, kMaxThreads, stream);
    }
  });
}

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
