// The conversions to float8 of CUDA C++ on a CPU.
#pragma once

#include "common/simd_convert.h"
#include "cuda_runtime.h"

using __nv_fp8_storage_t = uint8_t;
using __nv_fp8x2_storage_t = uint16_t;
constexpr int __NV_SATFINITE = 0, __NV_E4M3 = 0;

inline __nv_fp8_storage_t __nv_cvt_float_to_fp8(float x, int, int) {
  nano_vllm::Float8E4M3 lanes[4];
  nano_vllm::cpu::simd::store(lanes, nano_vllm::cpu::simd::broadcast<4>(x));
  return lanes[0].bits;
}
inline __nv_fp8x2_storage_t __nv_cvt_float2_to_fp8x2(float2 x, int saturation, int kind) {
  return static_cast<__nv_fp8x2_storage_t>(__nv_cvt_float_to_fp8(x.x, saturation, kind) |
                                           __nv_cvt_float_to_fp8(x.y, saturation, kind) << 8);
}
