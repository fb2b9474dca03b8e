// Element types the kernels know, by the names torch gives them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nano_vllm {

// kFloat8E4M3 is a dtype of KV caches alone: nothing is computed in it.
enum class DType { kFloat32, kFloat16, kBFloat16, kFloat8E4M3 };

// 4 bits of exponent, 3 of mantissa, no infinity (arXiv 2209.05433).
struct Float8E4M3 {
  uint8_t bits;
};
constexpr float kMaxFloat8E4M3 = 448;

constexpr size_t size_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kFloat8E4M3 ? 1 : 2;
}

constexpr const char* name_of(DType dtype) {
  return dtype == DType::kFloat32    ? "float32"
         : dtype == DType::kFloat16  ? "float16"
         : dtype == DType::kBFloat16 ? "bfloat16"
                                     : "float8_e4m3fn";
}

}  // namespace nano_vllm
