// Instructions of Hopper (sm_90a) that CUDA C++ has no name for, and tensor maps: what a kernel
// needs to feed the asynchronous tensor cores (PTX ISA, "cp.async.bulk.tensor", "Asynchronous
// Warpgroup Level Matrix Instructions", "setmaxnreg", "barrier.cluster").
//
// A warpgroup is four warps, the first a multiple of four. It multiplies matrices in shared memory
// that lie in blocks of 8 rows x 128, 64 or 32 bytes (see SwizzledTile).
#pragma once

#include <cuda.h>

#include "common/barrier.cuh"
#include "common/launch.cuh"
#include "common/swizzled_tile.cuh"

namespace nano_vllm::cuda {

// What this thread wrote to shared memory becomes visible to the tensor cores and copy engine.
__device__ inline void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Copies the box of a tensor that starts at the coordinates; places outside the tensor become 0.
__device__ inline void load_box(void* to, const CUtensorMap& map, Barrier& barrier, int c0, int c1,
                                int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(&barrier.state)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// The same into the blocks of a cluster that the mask names, each at the place and with the barrier
// that this block has.
__device__ inline void load_box_for_cluster(void* to, const CUtensorMap& map, Barrier& barrier,
                                            int c0, int c1, int c2, int c3, int c4,
                                            uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(&barrier.state)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4),
      "h"(blocks)
      : "memory");
}

// Copies bytes that lie together; their number and both addresses are multiples of 16.
__device__ inline void bulk_copy(void* to, const void* from, uint32_t bytes, Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(&barrier.state))
      : "memory");
}

// Brings the map itself to the copy engine, ahead of its first use.
__device__ inline void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Called by all four warps of a warpgroup, to share out the registers of the block.
template <int kCount>
__device__ inline void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Blocks of a cluster meet: what their threads wrote before they arrived is seen by those that
// wait.
__device__ inline void arrive_at_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
// The same where nothing that they wrote is read: no memory is waited for.
__device__ inline void arrive_at_cluster_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ inline void wait_for_cluster() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Four floats at this address of another block's shared memory.
__device__ inline float4 load_of_block(const float* address, int rank) {
  float4 x;
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n"
      "}"
      : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
      : "r"(shared_address(address)), "r"(rank)
      : "memory");
  return x;
}

// Before the first product that reads or adds to registers which other instructions touched.
__device__ inline void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes a group of this warpgroup's products.
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending groups, the latest ones, are under way.
template <int kPending>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of accumulators and operands across the fences and waits
// around them.
template <int kCount>
__device__ inline void pin(float (&sums)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    asm volatile("" : "+f"(sums[i][0]), "+f"(sums[i][1]), "+f"(sums[i][2]), "+f"(sums[i][3]));
  }
}
template <int kCount>
__device__ inline void pin(uint32_t (&operand)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    asm volatile(""
                 : "+r"(operand[i][0]), "+r"(operand[i][1]), "+r"(operand[i][2]),
                   "+r"(operand[i][3]));
  }
}

// Starts sums (+)= a b for sums [64, kColumns], of which a thread holds what it would of the
// [16, 8] fragments of ptx.cuh, warp w of the warpgroup rows 16 w and up. With is_sum false the old
// sums don't count. One step multiplies 16 of K.
template <class T, int kColumns>
struct Warpgroup {
  // a [64, K] and b [kColumns, K], both with K along the columns of their tile.
  __device__ static void multiply(float (&sums)[kColumns / 8][4], uint64_t a, uint64_t b,
                                  bool is_sum);
  // The same of sums that begin here: until then their registers are free for something else, where
  // multiply reads them even with is_sum false.
  __device__ static void start(float (&sums)[kColumns / 8][4], uint64_t a, uint64_t b);
  // a [64, 16] in registers, b [K, kColumns] with K along the rows of its tile.
  __device__ static void multiply(float (&sums)[kColumns / 8][4], const uint32_t (&a)[4],
                                  uint64_t b, bool is_sum);
};

// clang-format off
#define SUMS_4(c, i) c(sums[i][0]), c(sums[i][1]), c(sums[i][2]), c(sums[i][3])
#define SUMS_8(c, i) SUMS_4(c, i), SUMS_4(c, i + 1)
#define SUMS_16(c, i) SUMS_8(c, i), SUMS_8(c, i + 2)
#define SUMS_32(c, i) SUMS_16(c, i), SUMS_16(c, i + 4)
#define SUMS_64(c, i) SUMS_32(c, i), SUMS_32(c, i + 8)
#define NAMES_4 "%0, %1, %2, %3"
#define NAMES_8 NAMES_4 ", %4, %5, %6, %7"
#define NAMES_16 NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_40 NAMES_32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39"
#define NAMES_48 NAMES_40 ", " \
  "%40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_64 NAMES_48 ", " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_96 NAMES_64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NAMES_128 NAMES_96 ", " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// The operands after the sums are numbered a, b, ... f.
#define DEFINE_PRODUCTS(T, type, columns, count, a, b, c, d, e, f)                       \
  template <>                                                                                      \
  __device__ inline void Warpgroup<T, columns>::multiply(                                          \
      float (&sums)[columns / 8][4], uint64_t left, uint64_t right, bool is_sum) {                    \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" c ", 0;\n"                                   \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" NAMES_##count \
                 "}, %" a ", %" b ", p, 1, 1, 0, 0;\n}\n"                                          \
                 : ALL_SUMS_##count("+f")                                                                     \
                 : "l"(left), "l"(right), "r"(int{is_sum}));                                       \
  }                                                                                                \
  template <>                                                                                      \
  __device__ inline void Warpgroup<T, columns>::start(                                             \
      float (&sums)[columns / 8][4], uint64_t left, uint64_t right) {                              \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n"                                        \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" NAMES_##count \
                 "}, %" a ", %" b ", p, 1, 1, 0, 0;\n}\n"                                          \
                 : ALL_SUMS_##count("=f")                                                          \
                 : "l"(left), "l"(right));                                                         \
  }                                                                                                \
  template <>                                                                                      \
  __device__ inline void Warpgroup<T, columns>::multiply(                                          \
      float (&sums)[columns / 8][4], const uint32_t (&left)[4], uint64_t right, bool is_sum) {        \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" f ", 0;\n"                                   \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" NAMES_##count \
                 "}, {%" a ", %" b ", %" c ", %" d "}, %" e ", p, 1, 1, 1;\n}\n"                   \
                 : ALL_SUMS_##count("+f")                                                                     \
                 : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right),             \
                   "r"(int{is_sum}));                                                              \
  }
#define DEFINE_BOTH_TYPES(columns, count, ...)                                           \
  DEFINE_PRODUCTS(__half, "f16", columns, count, __VA_ARGS__)                            \
  DEFINE_PRODUCTS(__nv_bfloat16, "bf16", columns, count, __VA_ARGS__)
#define ALL_SUMS_4(c) SUMS_4(c, 0)
#define ALL_SUMS_8(c) SUMS_8(c, 0)
#define ALL_SUMS_16(c) SUMS_16(c, 0)
#define ALL_SUMS_32(c) SUMS_32(c, 0)
#define ALL_SUMS_40(c) SUMS_32(c, 0), SUMS_8(c, 8)
#define ALL_SUMS_48(c) SUMS_32(c, 0), SUMS_16(c, 8)
#define ALL_SUMS_64(c) SUMS_64(c, 0)
#define ALL_SUMS_96(c) SUMS_64(c, 0), SUMS_32(c, 16)
#define ALL_SUMS_128(c) SUMS_64(c, 0), SUMS_64(c, 16)
DEFINE_BOTH_TYPES(8, 4, "4", "5", "6", "7", "8", "9")
DEFINE_BOTH_TYPES(16, 8, "8", "9", "10", "11", "12", "13")
DEFINE_BOTH_TYPES(32, 16, "16", "17", "18", "19", "20", "21")
DEFINE_BOTH_TYPES(64, 32, "32", "33", "34", "35", "36", "37")
DEFINE_BOTH_TYPES(80, 40, "40", "41", "42", "43", "44", "45")
DEFINE_BOTH_TYPES(96, 48, "48", "49", "50", "51", "52", "53")
DEFINE_BOTH_TYPES(128, 64, "64", "65", "66", "67", "68", "69")
DEFINE_BOTH_TYPES(192, 96, "96", "97", "98", "99", "100", "101")
DEFINE_BOTH_TYPES(256, 128, "128", "129", "130", "131", "132", "133")
#undef DEFINE_BOTH_TYPES
#undef DEFINE_PRODUCTS
#undef ALL_SUMS_128
#undef NAMES_128
#undef ALL_SUMS_96
#undef NAMES_96
#undef ALL_SUMS_64
#undef NAMES_64
#undef ALL_SUMS_48
#undef NAMES_48
#undef ALL_SUMS_40
#undef NAMES_40
#undef ALL_SUMS_32
#undef NAMES_32
#undef ALL_SUMS_16
#undef NAMES_16
#undef ALL_SUMS_8
#undef NAMES_8
#undef ALL_SUMS_4
#undef NAMES_4
#undef SUMS_64
#undef SUMS_32
#undef SUMS_16
#undef SUMS_8
#undef SUMS_4
// clang-format on

// Of 16-bit elements, whatever they are. The driver's encoder, found at run time: the library does
// not link the driver. Rows of a box have 128 bytes: that the second-level cache reads lines of 256
// for them costs an H200 1 to 7 % where the memory binds; products of 32 rows gain up to 3 % by it.
inline CUtensorMap make_tensor_map(const BoxedTensor& tensor, int swizzle_bytes) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &found);
    check(error == cudaSuccess && found == cudaDriverEntryPointSuccess,
          "the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  const cuuint32_t element_strides[5] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 5, const_cast<void*>(tensor.base), tensor.size,
             tensor.stride, tensor.box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzle_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
             : swizzle_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
             : swizzle_bytes == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                   : CU_TENSOR_MAP_SWIZZLE_NONE,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled refused a tensor map: error ",
        static_cast<int>(result));
  return map;
}

template <class Tile>
CUtensorMap make_matrix_map(const void* base, int64_t stride, int64_t rows, int64_t columns,
                            int box_rows) {
  return make_tensor_map(matrix_boxes<Tile>(base, stride, rows, columns, box_rows), Tile::kSwizzle);
}

}  // namespace nano_vllm::cuda
