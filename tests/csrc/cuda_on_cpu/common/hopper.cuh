// What common/hopper.cuh says, on a CPU: products and copies are done at once.
#pragma once

#include <vector>

#include "common/barrier.cuh"
#include "common/launch.cuh"
#include "common/swizzled_tile.cuh"

struct alignas(64) CUtensorMap {
  nano_vllm::cuda::BoxedTensor tensor;
  int swizzle_bytes;
};

namespace nano_vllm::cuda {

inline void fence_async_proxy() {}
inline void prefetch_map(const CUtensorMap&) {}
template <int kCount>
void release_registers() {}
template <int kCount>
void take_registers() {}
inline void fence_products() {}
inline void commit_products() {}
template <int kPending>
void wait_products() {}
template <class T, int kCount>
void pin(T (&)[kCount][4]) {}

inline CUtensorMap make_tensor_map(const BoxedTensor& tensor, int swizzle_bytes) {
  return {tensor, swizzle_bytes};
}

template <class Tile>
CUtensorMap make_matrix_map(const void* base, int64_t stride, int64_t rows, int64_t columns,
                            int box_rows) {
  return make_tensor_map(matrix_boxes<Tile>(base, stride, rows, columns, box_rows), Tile::kSwizzle);
}

// The address that the copy engine and the tensor cores make of one in a swizzled tile.
inline uint32_t swizzle(uint32_t address, int swizzle_bytes) {
  const uint32_t mask = static_cast<uint32_t>(swizzle_bytes) / 16 - 1;
  return address ^ (address >> 7 & mask) << 4;
}

inline void arrive_at_cluster_relaxed() { cuda_on_cpu::arrive_at_cluster(); }
inline void wait_for_cluster() { cuda_on_cpu::wait_for_cluster(); }

inline void load_box_for_cluster(void* to, const CUtensorMap& map, Barrier& barrier, int c0, int c1,
                                 int c2, int c3, int c4, uint16_t blocks) {
  const BoxedTensor& tensor = map.tensor;
  const int64_t first[5] = {c0, c1, c2, c3, c4};
  const uint32_t start = shared_address(to);
  uint32_t at = 0;
  uint32_t place[5];
  for (place[4] = 0; place[4] < tensor.box[4]; ++place[4])
    for (place[3] = 0; place[3] < tensor.box[3]; ++place[3])
      for (place[2] = 0; place[2] < tensor.box[2]; ++place[2])
        for (place[1] = 0; place[1] < tensor.box[1]; ++place[1])
          for (place[0] = 0; place[0] < tensor.box[0]; ++place[0], at += 2) {
            bool is_inside = true;
            int64_t offset = 0;
            for (int i = 0; i < 5; ++i) {
              const int64_t c = first[i] + place[i];
              is_inside = is_inside && c >= 0 && static_cast<uint64_t>(c) < tensor.size[i];
              offset += c * (i == 0 ? 2 : static_cast<int64_t>(tensor.stride[i - 1]));
            }
            for (int block = 0; blocks >> block != 0; ++block) {
              if ((blocks >> block & 1) == 0) continue;
              unsigned char* target =
                  cuda_on_cpu::shared_memory_of(block) + swizzle(start + at, map.swizzle_bytes);
              if (is_inside) {
                std::memcpy(target, static_cast<const unsigned char*>(tensor.base) + offset, 2);
              } else {
                std::memset(target, 0, 2);
              }
            }
          }
  const uint32_t where = shared_address(&barrier);
  for (int block = 0; blocks >> block != 0; ++block) {
    if ((blocks >> block & 1) == 0) continue;
    reinterpret_cast<Barrier*>(cuda_on_cpu::shared_memory_of(block) + where)->arrived(at);
  }
}

inline void load_box(void* to, const CUtensorMap& map, Barrier& barrier, int c0, int c1, int c2,
                     int c3, int c4) {
  const auto own = static_cast<uint16_t>(1 << cuda_on_cpu::rank_in_cluster());
  load_box_for_cluster(to, map, barrier, c0, c1, c2, c3, c4, own);
}

inline void bulk_copy(void* to, const void* from, uint32_t bytes, Barrier& barrier) {
  std::memcpy(to, from, bytes);
  barrier.arrived(bytes);
}

// A matrix that a descriptor names: an element's address.
struct DescribedMatrix {
  uint32_t start, leading, stride;
  int swizzle_bytes;

  explicit DescribedMatrix(uint64_t descriptor)
      : start(static_cast<uint32_t>(descriptor & 0x3fff) << 4),
        leading(static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4),
        swizzle_bytes(descriptor >> 62 == 1   ? 128
                      : descriptor >> 62 == 2 ? 64
                                              : 32) {}

  uint16_t at(uint32_t offset) const {
    return element_at(cuda_on_cpu::shared_memory() + swizzle(start + offset, swizzle_bytes), 0);
  }
  // K along the columns: row of the other dimension, column k of 16.
  uint16_t along_columns(int row, int k) const {
    return at(static_cast<uint32_t>(row / 8 * static_cast<int>(stride) + row % 8 * swizzle_bytes +
                                    2 * k));
  }
  // K along the rows: row k of 16, column of the other dimension.
  uint16_t along_rows(int k, int column) const {
    const int block_columns = swizzle_bytes / 2;
    return at(static_cast<uint32_t>(column / block_columns * static_cast<int>(leading) +
                                    k / 8 * static_cast<int>(stride) + k % 8 * swizzle_bytes +
                                    column % block_columns * 2));
  }
};

template <class T, int kColumns>
struct Warpgroup {
  static void start(float (&sums)[kColumns / 8][4], uint64_t a, uint64_t b) {
    multiply(sums, a, b, false);
  }
  static void multiply(float (&sums)[kColumns / 8][4], uint64_t a, uint64_t b, bool is_sum) {
    const DescribedMatrix left(a), right(b);
    run(
        sums, nullptr, is_sum, [&](int row, int k) { return left.along_columns(row, k); },
        [&](int k, int column) { return right.along_columns(column, k); });
  }
  static void multiply(float (&sums)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b,
                       bool is_sum) {
    const DescribedMatrix right(b);
    run(
        sums, a, is_sum, [](int, int) { return uint16_t{}; },
        [&](int k, int column) { return right.along_rows(k, column); });
  }

 private:
  struct Thread {
    float (*sums)[4];
    const uint32_t* a;
  };

  // The last of the 128 threads to come multiplies for all of them. Where `registers` is given, the
  // left operand lies in it as ptx.cuh says.
  template <class Left, class Right>
  static void run(float (&sums)[kColumns / 8][4], const uint32_t* registers, bool is_sum,
                  const Left& left_at, const Right& right_at) {
    Thread own{sums, registers};
    const int thread = static_cast<int>(threadIdx.x);
    cuda_on_cpu::meet(2000 + thread / 128, thread % 128, 128, &own, [&](void** all) {
      const auto thread_of = [&](int i) { return static_cast<Thread*>(all[i]); };
      std::vector<float> left(64 * 16), right(size_t{kColumns} * 16);
      for (int row = 0; row < 64; ++row) {
        for (int k = 0; k < 16; ++k) {
          uint16_t bits;
          if (registers == nullptr) {
            bits = left_at(row, k);
          } else {
            const Thread* owner = thread_of(row / 16 * 32 + row % 8 * 4 + k % 8 / 2);
            const uint32_t pair = owner->a[row % 16 / 8 + k / 8 * 2];
            bits = static_cast<uint16_t>(pair >> 16 * (k % 2));
          }
          left[static_cast<size_t>(row * 16 + k)] = to_float(T{bits});
        }
      }
      for (int column = 0; column < kColumns; ++column) {
        for (int k = 0; k < 16; ++k) {
          right[static_cast<size_t>(column * 16 + k)] = to_float(T{right_at(k, column)});
        }
      }
      for (int i = 0; i < 128; ++i) {
        for (int j = 0; j < kColumns / 8; ++j) {
          for (int e = 0; e < 4; ++e) {
            const int row = i / 32 * 16 + i % 32 / 4 + e / 2 * 8;
            const int column = 8 * j + 2 * (i % 4) + e % 2;
            float sum = is_sum ? thread_of(i)->sums[j][e] : 0;
            for (int k = 0; k < 16; ++k) {
              sum += left[static_cast<size_t>(row * 16 + k)] *
                     right[static_cast<size_t>(column * 16 + k)];
            }
            thread_of(i)->sums[j][e] = sum;
          }
        }
      }
    });
  }
};

}  // namespace nano_vllm::cuda
