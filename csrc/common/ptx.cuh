// Instructions that CUDA C++ has no name for: matrix fragments, their product, asynchronous copies
// to shared memory, memory that other GPUs write, waiting for the kernel before (PTX ISA,
// "Warp-level Matrix Instructions", "cp.async", "ld.volatile", "Memory Consistency Model",
// "griddepcontrol").
//
// An 8 x 8 fragment of 16-bit elements lies one register a lane: lane l holds columns 2 (l % 4) and
// 2 (l % 4) + 1 of row l / 4, the lower column in the lower half.
#pragma once

#include "common/cuda_common.cuh"

namespace nano_vllm::cuda {

// The block's dynamic shared memory, of the size that the launch gave.
__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  return shared_bytes;
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four 8 x 8 matrices; lane l names row l % 8 of matrix l / 8, 16 bytes in shared memory.
__device__ inline void load_matrices(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row)));
}

// The same, each matrix transposed.
__device__ inline void load_matrices_transposed(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row)));
}

// The transpose of an 8 x 8 fragment.
__device__ inline uint32_t transpose_matrix(uint32_t matrix) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(matrix));
  return transposed;
}

// sums += a b, with a [16, 16], b [16, 8], sums [16, 8]. With g = lane / 4 and t = lane % 4:
//   a[0], a[1]: rows g, g + 8 of columns 2t, 2t + 1; a[2], a[3]: the same of columns 2t + 8, 2t + 9
//   b0, b1: column g of rows 2t, 2t + 1 and of rows 2t + 8, 2t + 9
//   sums[0], sums[1]: row g, columns 2t, 2t + 1; sums[2], sums[3]: row g + 8
template <class T>
__device__ inline void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Copies 16 bytes to shared memory in the background, or zeros if not valid: then nothing is read.
__device__ inline void copy_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Closes a group of this thread's copies.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's groups, the latest ones, are under way.
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four floats past the first-level cache, and not ahead of what was written before.
__device__ inline float4 load_past_cache(const float* address) {
  float4 x;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(address)
               : "memory");
  return x;
}

// 16 bytes of memory that several GPUs write and read: past the caches that are not common to all.
// Each 8 bytes that are written together are seen together.
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

// A word that tells other GPUs what was written before it: by this thread, and by those of its
// block that it has met at a barrier since. Who acquires the word can read all that, and so can
// those whom it meets at a barrier.
__device__ inline void release_to_system(uint32_t* at, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}
__device__ inline uint32_t acquire_from_system(const uint32_t* at) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}

// Programmatic dependent launch (sm_90 and up): lets the next kernel of the stream start; waits
// until the one before has ended and its writes are visible. A kernel that is launched as a
// dependent one waits before it reads what others write, and before it writes (decodes beside a
// prefill, at their end: the prefill has waited); and none ends without, as the next one waits for
// it alone.
__device__ inline void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ inline void wait_for_last_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// 2^x to 2 units in the last place; exactly 1 at 0 and 0 at -infinity.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace nano_vllm::cuda
