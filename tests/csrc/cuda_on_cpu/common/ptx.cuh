// What common/ptx.cuh says, on a CPU.
#pragma once

#include "common/cuda_common.cuh"

namespace nano_vllm::cuda {

inline unsigned char* dynamic_shared() { return cuda_on_cpu::shared_memory(); }

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) -
                               cuda_on_cpu::shared_memory());
}

inline uint16_t element_at(const void* row, int i) {
  uint16_t bits;
  std::memcpy(&bits, static_cast<const unsigned char*>(row) + 2 * i, 2);
  return bits;
}
inline uint32_t pair_of(uint16_t low, uint16_t high) { return low | uint32_t{high} << 16; }
template <class T>
float value_of(uint32_t pair, int half) {
  return to_float(T{static_cast<uint16_t>(pair >> 16 * half)});
}

inline void load_matrices(uint32_t (&matrices)[4], const void* row) {
  const auto rows = cuda_on_cpu::gather(row);
  const int lane = cuda_on_cpu::lane();
  for (int i = 0; i < 4; ++i) {
    const void* from = rows.value[8 * i + lane / 4];
    matrices[i] = pair_of(element_at(from, 2 * (lane % 4)), element_at(from, 2 * (lane % 4) + 1));
  }
  cuda_on_cpu::loads_under_way() |= matrices[0];
}
inline void load_matrices_transposed(uint32_t (&matrices)[4], const void* row) {
  const auto rows = cuda_on_cpu::gather(row);
  const int lane = cuda_on_cpu::lane();
  for (int i = 0; i < 4; ++i) {
    matrices[i] = pair_of(element_at(rows.value[8 * i + 2 * (lane % 4)], lane / 4),
                          element_at(rows.value[8 * i + 2 * (lane % 4) + 1], lane / 4));
  }
  cuda_on_cpu::loads_under_way() |= matrices[0];
}

inline uint32_t transpose_matrix(uint32_t matrix) {
  const auto rows = cuda_on_cpu::gather(matrix);
  const int row = cuda_on_cpu::lane() / 4, column = cuda_on_cpu::lane() % 4 * 2;
  const auto element = [&](int r, int c) {
    return static_cast<uint16_t>(rows.value[4 * r + c / 2] >> 16 * (c % 2));
  };
  return pair_of(element(column, row), element(column + 1, row));
}

template <class T>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const auto all = cuda_on_cpu::gather(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int lane = cuda_on_cpu::lane();
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 16; ++k) {
      const uint32_t left = all.value[lane / 4 * 4 + k % 8 / 2].a[i / 2 + k / 8 * 2];
      const uint32_t right = all.value[column * 4 + k % 8 / 2].b[k / 8];
      sums[i] += value_of<T>(left, k % 2) * value_of<T>(right, k % 2);
    }
  }
}

inline void copy_async(void* to, const void* from, bool valid) {
  if (valid) {
    std::memcpy(to, from, 16);
  } else {
    std::memset(to, 0, 16);
  }
}
inline void commit_copies() {}
template <int kPending>
void wait_copies() {}

inline float4 load_past_cache(const float* address) {
  return {address[0], address[1], address[2], address[3]};
}

inline void write_through(uint4* at, uint4 value) { cuda_on_cpu::write_common(at, value); }
inline uint4 read_through(const uint4* at) { return cuda_on_cpu::read_common(at); }
inline void release_to_system(uint32_t* at, uint32_t value) {
  cuda_on_cpu::release_common(at, value);
}
inline uint32_t acquire_from_system(const uint32_t* at) { return cuda_on_cpu::acquire_common(at); }

inline void allow_next_kernel() {}
inline void wait_for_last_kernel() {}

inline float exp2_approx(float x) { return std::exp2(x); }

}  // namespace nano_vllm::cuda
