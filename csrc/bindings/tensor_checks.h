// Checks of the tensors an op receives, in one order (device, dtype, layout, shape, value); each
// message quotes the value found.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <limits>
#include <optional>
#include <string>

#include "common/error.h"
#include "common/types.h"

namespace nano_vllm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string to_string(const int64_t* sizes, int64_t dim) {
  std::string text = "[";
  for (int64_t i = 0; i < dim; ++i) {
    if (i > 0) text += ", ";
    text += sizes[i] < 0 ? "any" : std::to_string(sizes[i]);
  }
  return text + "]";
}

inline std::string shape_of(const Tensor& tensor) {
  return to_string(tensor.sizes().data(), tensor.dim());
}

inline std::string device_of(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device_index());
  return "an unsupported device";
}

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

inline void check_device(const char* name, const Tensor& tensor, const Tensor& like) {
  check(device_of(tensor) == device_of(like), name, " must be on ", device_of(like), ", got ",
        device_of(tensor));
}

inline DType float_dtype(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      fail(name, " must be float32, float16 or bfloat16, got ", name_of(tensor.scalar_type()));
  }
}

inline ScalarType scalar_type_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return ScalarType::Float;
    case DType::kFloat16:
      return ScalarType::Half;
    case DType::kBFloat16:
      return ScalarType::BFloat16;
    case DType::kFloat8E4M3:
      break;
  }
  return ScalarType::Float8_e4m3fn;
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType expected) {
  check(tensor.scalar_type() == expected, name, " must be ", name_of(expected), ", got ",
        name_of(tensor.scalar_type()));
}

// Of a cache for what is computed in `dtype`.
inline DType cache_dtype(const char* name, const Tensor& cache, DType dtype) {
  if (cache.scalar_type() == ScalarType::Float8_e4m3fn) return DType::kFloat8E4M3;
  check(cache.scalar_type() == scalar_type_of(dtype), name, " must be ", name_of(dtype), " or ",
        name_of(DType::kFloat8E4M3), ", got ", name_of(cache.scalar_type()));
  return dtype;
}

// The last dimension is contiguous; one of size 1 is so whatever its stride says.
inline void check_last_contiguous(const char* name, const Tensor& tensor) {
  check(tensor.dim() > 0, name, " must have at least one dimension, got a scalar");
  const int64_t last = tensor.dim() - 1;
  check(tensor.size(last) <= 1 || tensor.stride(last) == 1, name,
        " must be contiguous in its last dimension, got stride ", tensor.stride(last));
}

// -1 stands for any size.
inline void check_shape(const char* name, const Tensor& tensor,
                        std::initializer_list<int64_t> expected) {
  bool ok = tensor.dim() == static_cast<int64_t>(expected.size());
  for (int64_t i = 0; ok && i < tensor.dim(); ++i) {
    const int64_t size = expected.begin()[i];
    ok = size < 0 || tensor.size(i) == size;
  }
  check(ok, name, " must have shape ",
        to_string(expected.begin(), static_cast<int64_t>(expected.size())), ", got ",
        shape_of(tensor));
}

// Device, dtype, layout and shape of one tensor in one line.
inline void check_tensor(const char* name, const Tensor& tensor, const Tensor& like,
                         ScalarType dtype, std::initializer_list<int64_t> shape) {
  check_device(name, tensor, like);
  check_dtype(name, tensor, dtype);
  check_shape(name, tensor, shape);
  check_last_contiguous(name, tensor);
}

// The scales of a cache's heads, which one of float8_e4m3fn alone has; nullptr where there are
// none.
inline const float* cache_scale(const char* name, const std::optional<Tensor>& scale,
                                const Tensor& cache) {
  if (!scale.has_value()) return nullptr;
  check(cache.scalar_type() == ScalarType::Float8_e4m3fn, name,
        " is for caches of float8_e4m3fn, got one of ", name_of(cache.scalar_type()));
  check_tensor(name, *scale, cache, ScalarType::Float, {cache.size(2)});
  return static_cast<const float*>(scale->const_data_ptr());
}

inline int32_t to_int32(const char* name, int64_t value) {
  check(value >= 0 && value <= std::numeric_limits<int32_t>::max(), name,
        " must be in [0, 2^31), got ", value);
  return static_cast<int32_t>(value);
}

}  // namespace nano_vllm
