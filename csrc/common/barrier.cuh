// Barriers among threads, among blocks, and with the copy engine of sm_90 (PTX ISA, "mbarrier").
#pragma once

#include "common/ptx.cuh"

namespace nano_vllm::cuda {

// A barrier in shared memory. It completes a phase when all expected arrivals and all expected
// bytes have come; phases alternate between parity 0 and 1, the first being 0.
struct Barrier {
  uint64_t state;

  __device__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&state)),
                 "r"(arrivals)
                 : "memory");
  }
  __device__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&state))
                 : "memory");
  }
  // The same once `loaded` is in its register: made of one register of each load from what the
  // barrier guards. To arrive does not wait for a thread's loads, and one that is under way still
  // may read what the copy engine has put there since.
  __device__ void arrive_behind(uint32_t loaded) {
    // Blocks have one dimension, which the compiler does not know: the address is the same.
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&state) +
                                                                  (loaded & threadIdx.y))
                 : "memory");
  }
  // At the same barrier of another block of the cluster.
  __device__ void arrive_at_block(int rank) {
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
        "}" ::"r"(shared_address(&state)),
        "r"(rank)
        : "memory");
  }
  // Arrives, and the phase waits for that many bytes of copies besides.
  __device__ void arrive_and_expect(uint32_t bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&state)),
        "r"(bytes)
        : "memory");
  }
  // Whether the phase of this parity is complete.
  __device__ bool test(uint32_t parity) {
    uint32_t is_complete;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}"
        : "=r"(is_complete)
        : "r"(shared_address(&state)), "r"(parity)
        : "memory");
    return is_complete;
  }
  // Returns once the phase of this parity is complete; on a fresh barrier at once for parity 1.
  __device__ void wait(uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(shared_address(&state)),
        "r"(parity)
        : "memory");
  }
};

// Makes initialised barriers visible to the copy engine; a block barrier has to follow.
__device__ inline void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Adds to a counter in global memory; what this thread, and those it has met at a barrier, wrote
// before is seen by whoever finds the new count. Returns the old one.
__device__ inline int add_arrivals(int* counter, int count) {
  int old;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(counter), "r"(count)
               : "memory");
  return old;
}

// A barrier among num_threads threads of the block, by number 1 to 15; 0 is __syncthreads.
__device__ inline void sync_threads(int barrier, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}
// The same for those of the threads that do not wait for the others.
__device__ inline void arrive_threads(int barrier, int num_threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}

}  // namespace nano_vllm::cuda
