// Threads of the CPU kernels: OpenMP loops, serial where the compiler has none. torch links the
// same libgomp, so both share one pool and torch.set_num_threads is obeyed.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace nano_vllm::cpu {

// Threads a loop started here would get; 1 inside a loop, as loops don't nest.
inline int num_threads() {
#ifdef _OPENMP
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

// Runs body(thread) on `threads` threads. An exception must not leave an OpenMP region: the first
// one is carried out of it and thrown again here.
template <class Body>
void run_on_threads(int threads, const Body& body) {
  if (threads <= 1) return body(0);
#ifdef _OPENMP
  std::exception_ptr error;
#pragma omp parallel num_threads(threads)
  {
    try {
      // The runtime may grant fewer threads than asked for; each then takes several shares.
      for (int i = omp_get_thread_num(); i < threads; i += omp_get_num_threads()) body(i);
    } catch (...) {
#pragma omp critical(nano_vllm_error)
      if (!error) error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
#endif
}

// Runs body(first, last) over equal contiguous shares of [0, count), one a thread; each share
// starts at a multiple of `grain`, and work of no more than one grain stays on the calling thread.
// For even work.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  const int64_t grains = (count + grain - 1) / grain;
  const int threads = static_cast<int>(std::min<int64_t>(num_threads(), grains));
  if (threads <= 1) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  run_on_threads(threads, [&](int thread) {
    const int64_t first = grains * thread / threads * grain;
    const int64_t last = std::min(count, grains * (thread + 1) / threads * grain);
    if (first < last) body(first, last);
  });
}

// Runs body(task) for each task in [0, count), handed out in order to whichever thread is free. For
// uneven work.
template <class Body>
void parallel_tasks(int64_t count, const Body& body) {
  const int threads = static_cast<int>(std::min<int64_t>(num_threads(), count));
  int64_t next = 0;
  run_on_threads(std::max(threads, 1), [&](int) {
    while (true) {
      int64_t task;
#ifdef _OPENMP
#pragma omp atomic capture
#endif
      task = next++;
      if (task >= count) return;
      body(task);
    }
  });
}

// Working memory of one thread, aligned to a cache line, uninitialised. Declare it thread_local: it
// grows to the largest size asked for and is then kept.
class ThreadScratch {
 public:
  ThreadScratch() = default;
  ThreadScratch(const ThreadScratch&) = delete;
  ThreadScratch& operator=(const ThreadScratch&) = delete;
  ~ThreadScratch() { ::operator delete(data_, kAlignment); }

  // The content of earlier calls is lost.
  float* reserve(int64_t numel) {
    if (numel > capacity_) {
      ::operator delete(data_, kAlignment);
      data_ = nullptr;
      capacity_ = 0;
      data_ = ::operator new(static_cast<size_t>(numel) * sizeof(float), kAlignment);
      capacity_ = numel;
    }
    return static_cast<float*>(data_);
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  void* data_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace nano_vllm::cpu
