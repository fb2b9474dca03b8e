// float16, bfloat16 and float8_e4m3 in memory, float32 in registers: loads that widen and stores
// that round to nearest even. NaN stays NaN; what is too large for float8_e4m3 becomes its largest.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/error.h"
#include "common/simd.h"
#include "common/types.h"

namespace nano_vllm::cpu {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Calls run(T{}) with the element type of dtype.
template <class Run>
void dispatch_dtype(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(float{});
    case DType::kFloat16:
      return run(Float16{});
    case DType::kBFloat16:
      return run(BFloat16{});
    case DType::kFloat8E4M3:
      break;
  }
  fail("nothing is computed in ", name_of(dtype));
}

// Calls run(T{}, Cache{}) with the element types of dtype and of a cache of cache_dtype.
template <class Run>
void dispatch_dtypes(DType dtype, DType cache_dtype, const Run& run) {
  dispatch_dtype(dtype, [&](auto element) {
    if (cache_dtype == DType::kFloat8E4M3) {
      run(element, Float8E4M3{});
    } else {
      run(element, element);
    }
  });
}

namespace simd {

// --- in portable vector code, on narrow values in 32-bit lanes ---

template <class Uint>
NANO_VLLM_INLINE Uint widen(const Uint& half, Float16) {
  const Uint magnitude = (half & 0x7fffu) << 13;
  // The exponents' biases differ by 112; as a product the shift makes subnormals normal.
  const Uint finite = bit_cast<Uint>(bit_cast<Float<kLanesOf<Uint>>>(magnitude) * 0x1p112f);
  const Uint special = magnitude | 0x7f800000u;
  return (magnitude >= 0x0f800000u ? special : finite) | ((half & 0x8000u) << 16);
}

template <class Uint>
NANO_VLLM_INLINE Uint widen(const Uint& bfloat, BFloat16) {
  return bfloat << 16;
}

template <class Uint>
NANO_VLLM_INLINE Uint widen(const Uint& byte, Float8E4M3) {
  const Uint magnitude = (byte & 0x7fu) << 20;
  // As for float16; here the biases differ by 120.
  const Uint finite = bit_cast<Uint>(bit_cast<Float<kLanesOf<Uint>>>(magnitude) * 0x1p120f);
  const Uint nan = Uint{} + 0x7fc00000u;
  return (magnitude == 0x07f00000u ? nan : finite) | ((byte & 0x80u) << 24);
}

template <class Uint>
NANO_VLLM_INLINE Uint narrow(const Uint& bits, Float16) {
  const Uint magnitude = bits & 0x7fffffffu;
  // In [0.5, 1) the last bit of a float is worth that of a subnormal half: the addition rounds.
  const Uint subnormal =
      bit_cast<Uint>(bit_cast<Float<kLanesOf<Uint>>>(magnitude) + 0.5f) - 0x3f000000u;
  const Uint normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Uint special = magnitude > 0x7f800000u ? Uint{} + 0x7e00u : Uint{} + 0x7c00u;
  const Uint finite = magnitude < (113u << 23) ? subnormal : normal;
  return (magnitude >= (143u << 23) ? special : finite) | ((bits >> 16) & 0x8000u);
}

template <class Uint>
NANO_VLLM_INLINE Uint narrow(const Uint& bits, BFloat16) {
  const Uint rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Uint quiet_nan = (bits >> 16) | 0x40u;
  return (bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded;
}

template <class Uint>
NANO_VLLM_INLINE Uint narrow(const Uint& bits, Float8E4M3) {
  const Uint magnitude = bits & 0x7fffffffu;
  // In [2^14, 2^15) the last bit of a float is worth that of a subnormal here.
  const Uint subnormal =
      bit_cast<Uint>(bit_cast<Float<kLanesOf<Uint>>>(magnitude) + 0x1p14f) - (141u << 23);
  const Uint normal = (magnitude - (120u << 23) + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20;
  const Uint special = magnitude > 0x7f800000u ? Uint{} + 0x7fu : Uint{} + 0x7eu;
  const Uint finite = magnitude < (121u << 23) ? subnormal : normal;
  return (magnitude > 0x43e00000u ? special : finite) | ((bits >> 24) & 0x80u);
}

template <int kLanes>
NANO_VLLM_INLINE Float<kLanes> widen_lanes(const typename Vectors<kLanes>::Byte& lanes,
                                           Float8E4M3 type) {
#ifdef NANO_VLLM_X86_DISPATCH
  if constexpr (kLanes >= 8) {
    // By way of float16, where subnormals cost nothing: shifted to its place, a value is a 256th of
    // itself, and NaN becomes 480, one step above the largest.
    typename Vectors<kLanes>::Short half;
    asm("vpmovsxbw %1, %0" : "=v"(half) : "v"(lanes));
    half = (half << 7) & static_cast<uint16_t>(0xbf80);
    Float<kLanes> wide;
    asm("vcvtph2ps %1, %0" : "=v"(wide) : "v"(half));
    wide *= 256.0f;
    const auto is_nan = (wide > kMaxFloat8E4M3) | (wide < -kMaxFloat8E4M3);
    return bit_cast<Float<kLanes>>(bit_cast<Int<kLanes>>(wide) | (is_nan & 0x7fc00000));
  }
#endif
  using Uint = typename Vectors<kLanes>::Uint;
  return bit_cast<Float<kLanes>>(widen(__builtin_convertvector(lanes, Uint), type));
}

template <class Vector>
NANO_VLLM_INLINE auto narrow_lanes(const Vector& lanes, Float8E4M3 type) {
  constexpr int kLanes = kLanesOf<Vector>;
  const auto bits = bit_cast<typename Vectors<kLanes>::Uint>(lanes);
  return __builtin_convertvector(narrow(bits, type), typename Vectors<kLanes>::Byte);
}

template <int kLanes, class T>
NANO_VLLM_INLINE Float<kLanes> widen_lanes(const typename Vectors<kLanes>::Short& lanes, T type) {
  using Uint = typename Vectors<kLanes>::Uint;
#ifdef NANO_VLLM_X86_DISPATCH
  // GCC would split a conversion in two, as it lowers it while it knows the base set alone.
  if constexpr (kLanes >= 8 && std::is_same_v<T, Float16>) {
    Float<kLanes> wide;
    asm("vcvtph2ps %1, %0" : "=v"(wide) : "v"(lanes));
    return wide;
  } else if constexpr (kLanes >= 8) {
    Uint wide;
    asm("vpmovzxwd %1, %0" : "=v"(wide) : "v"(lanes));
    return bit_cast<Float<kLanes>>(widen(wide, type));
  }
#endif
  return bit_cast<Float<kLanes>>(widen(__builtin_convertvector(lanes, Uint), type));
}

template <class T, class Vector>
NANO_VLLM_INLINE auto narrow_lanes(const Vector& lanes, T type) {
  constexpr int kLanes = kLanesOf<Vector>;
  using Short = typename Vectors<kLanes>::Short;
  const auto bits = bit_cast<typename Vectors<kLanes>::Uint>(lanes);
#ifdef NANO_VLLM_X86_DISPATCH
  Short packed;
  if constexpr (kLanes >= 8 && std::is_same_v<T, Float16>) {
    asm("vcvtps2ph $0, %1, %0" : "=v"(packed) : "v"(lanes));
    return packed;
  } else if constexpr (kLanes == 16) {
    asm("vpmovdw %1, %0" : "=v"(packed) : "v"(narrow(bits, type)));
    return packed;
  } else if constexpr (kLanes == 8) {
    asm("vextracti128 $1, %t1, %x0\n\tvpackusdw %x0, %x1, %x0"
        : "=&x"(packed)
        : "x"(narrow(bits, type)));
    return packed;
  }
#endif
  return __builtin_convertvector(narrow(bits, type), Short);
}

// --- loads and stores at any alignment ---

template <int kLanes, class T>
NANO_VLLM_INLINE Float<kLanes> load(const T* address) {
  if constexpr (std::is_same_v<T, float>) {
    Float<kLanes> lanes;
    std::memcpy(&lanes, address, sizeof(lanes));
    return lanes;
  } else {
    std::conditional_t<sizeof(T) == 1, typename Vectors<kLanes>::Byte,
                       typename Vectors<kLanes>::Short>
        lanes;
    std::memcpy(&lanes, address, sizeof(lanes));
    return widen_lanes<kLanes>(lanes, T{});
  }
}

template <class T, class Vector>
NANO_VLLM_INLINE void store(T* address, const Vector& lanes) {
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(address, &lanes, sizeof(lanes));
  } else {
    const auto packed = narrow_lanes(lanes, T{});
    std::memcpy(address, &packed, sizeof(packed));
  }
}

// The first `count` elements, at most kLanes; the other lanes are 0.
template <int kLanes, class T>
NANO_VLLM_INLINE Float<kLanes> load_partial(const T* address, int64_t count) {
  if (count >= kLanes) return load<kLanes>(address);
  T buffer[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = address[i];
  return load<kLanes>(buffer);
}

template <class T, class Vector>
NANO_VLLM_INLINE void store_partial(T* address, const Vector& v, int64_t count) {
  if (count >= kLanesOf<Vector>) return store(address, v);
  T buffer[kLanesOf<Vector>];
  store(buffer, v);
  for (int64_t i = 0; i < count; ++i) address[i] = buffer[i];
}

}  // namespace simd
}  // namespace nano_vllm::cpu
