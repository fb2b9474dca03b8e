// What common/barrier.cuh says, on a CPU.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "common/ptx.cuh"

namespace nano_vllm::cuda {

struct Barrier {
  uint64_t phase : 1, expected : 12, pending : 12, bytes : 39;

  void init(int arrivals) {
    phase = 0, bytes = 0;
    expected = pending = static_cast<uint64_t>(arrivals);
  }
  void arrive() { arrive_behind(0); }
  void arrive_at_block(int rank) {
    reinterpret_cast<Barrier*>(cuda_on_cpu::shared_memory_of(rank) + shared_address(this))
        ->arrive();
  }
  // Bits of a load that are not in `loaded` say that it is not waited for.
  void arrive_behind(uint32_t loaded) {
    if ((cuda_on_cpu::loads_under_way() & ~loaded) != 0) {
      std::fprintf(stderr, "a thread arrives while its loads are under way\n");
      std::abort();
    }
    cuda_on_cpu::loads_under_way() = 0;
    pending = pending - 1;
    complete();
  }
  void arrive_and_expect(uint32_t more) {
    bytes = bytes + more;
    arrive();
  }
  void arrived(uint32_t count) {
    bytes = bytes - count;
    complete();
  }
  bool test(uint32_t parity) { return phase != parity; }
  void wait(uint32_t parity) {
    cuda_on_cpu::wait_until([&] { return phase != parity; });
  }

 private:
  void complete() {
    if (pending != 0 || bytes != 0) return;
    phase = phase ^ 1;
    pending = expected;
  }
};
static_assert(sizeof(Barrier) == 8);

inline void publish_barriers() {}

inline int add_arrivals(int* counter, int count) { return atomicAdd(counter, count); }

inline void sync_threads(int barrier, int num_threads) {
  cuda_on_cpu::meet(barrier, static_cast<int>(threadIdx.x) % num_threads, num_threads, nullptr,
                    [](void**) {});
}
inline void arrive_threads(int barrier, int num_threads) {
  cuda_on_cpu::arrive(barrier, num_threads);
}

}  // namespace nano_vllm::cuda
