// The 16-bit types of CUDA C++ on a CPU.
#pragma once

#include "common/simd_convert.h"

namespace cuda_on_cpu {
template <class Bits>
float widen(uint16_t bits) {
  const Bits lanes[4] = {{bits}, {bits}, {bits}, {bits}};
  return nano_vllm::cpu::simd::load<4>(lanes)[0];
}
template <class Bits>
uint16_t narrow(float x) {
  Bits lanes[4];
  nano_vllm::cpu::simd::store(lanes, nano_vllm::cpu::simd::broadcast<4>(x));
  return lanes[0].bits;
}
}  // namespace cuda_on_cpu

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float __half2float(__half x) { return cuda_on_cpu::widen<nano_vllm::cpu::Float16>(x.bits); }
inline float __bfloat162float(__nv_bfloat16 x) {
  return cuda_on_cpu::widen<nano_vllm::cpu::BFloat16>(x.bits);
}
inline __half __float2half_rn(float x) { return {cuda_on_cpu::narrow<nano_vllm::cpu::Float16>(x)}; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  return {cuda_on_cpu::narrow<nano_vllm::cpu::BFloat16>(x)};
}
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
