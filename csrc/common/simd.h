// SIMD of the CPU kernels in the compiler's vector types, with the instruction set chosen at run
// time.
//
// A kernel is a struct with a static function template run<kLanes>(args...), marked
// NANO_VLLM_INLINE like all it calls. simd::run<Kernel>(args...) runs it compiled for the widest
// vectors of this machine: 16 lanes with AVX-512, 8 with AVX2, else 4. So no file needs -march, and
// one binary serves every machine.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__GNUC__) && !defined(__clang__)
// Vectors wider than the base instruction set pass through always-inlined functions alone, so their
// calling convention does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"
// Clang refuses to inline functions of the base instruction set, with vectors as arguments, into
// wider ones: there, and on other architectures, the vectors are what the compiler flags allow.
#if defined(__x86_64__) && !defined(NANO_VLLM_NO_SIMD_DISPATCH)
#define NANO_VLLM_X86_DISPATCH
#endif
#endif

#define NANO_VLLM_INLINE __attribute__((always_inline)) inline

namespace nano_vllm::cpu::simd {

template <int kLanes>
struct Vectors {
  typedef float Float __attribute__((vector_size(kLanes * 4)));
  typedef int32_t Int __attribute__((vector_size(kLanes * 4)));
  typedef uint32_t Uint __attribute__((vector_size(kLanes * 4)));
  typedef uint16_t Short __attribute__((vector_size(kLanes * 2)));
  typedef uint8_t Byte __attribute__((vector_size(kLanes)));
};

template <int kLanes>
using Float = typename Vectors<kLanes>::Float;
template <int kLanes>
using Int = typename Vectors<kLanes>::Int;

template <class Vector>
constexpr int kLanesOf = sizeof(Vector) / 4;

// The same bits as a type of the same size.
template <class To, class From>
NANO_VLLM_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <int kLanes>
NANO_VLLM_INLINE Float<kLanes> broadcast(float x) {
  return x - Float<kLanes>{};  // x - 0 is x, -0 too
}

// A product as it is rounded to float. Without this the compiler may fuse it into a sum that it
// goes into, in one place but not in the other.
template <class Vector>
NANO_VLLM_INLINE Vector rounded(const Vector& product) {
  Vector x = product;
#if defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

// (0, 1, 2, ...)
template <int kLanes>
NANO_VLLM_INLINE Int<kLanes> iota() {
  Int<kLanes> v{};
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

template <class Vector>
NANO_VLLM_INLINE Vector max(const Vector& a, const Vector& b) {
  return a > b ? a : b;
}

template <class Vector>
NANO_VLLM_INLINE Vector min(const Vector& a, const Vector& b) {
  return a < b ? a : b;
}

// GCC and Clang name it differently; the arguments after the two vectors are lanes of the pair.
#ifdef __clang__
#define NANO_VLLM_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define NANO_VLLM_SHUFFLE(a, b, ...) \
  __builtin_shuffle(a, b, Int<kLanesOf<decltype(a)>>{__VA_ARGS__})
#endif

// Each lane holds the sums of lanes i, i + 4, i + 8 and so on, halves first.
template <class Vector>
NANO_VLLM_INLINE Float<4> fold_to_4(const Vector& v) {
  if constexpr (kLanesOf<Vector> == 4) {
    return v;
  } else {
    struct Halves {
      Float<kLanesOf<Vector> / 2> low, high;
    };
    const Halves halves = bit_cast<Halves>(v);
    return fold_to_4(halves.low + halves.high);
  }
}

// (sum of a, sum of b, sum of c, sum of d), each in the order that sum(v) has.
template <class Vector>
NANO_VLLM_INLINE Float<4> sum_4(const Vector& a, const Vector& b, const Vector& c,
                                const Vector& d) {
  const Float<4> a4 = fold_to_4(a), b4 = fold_to_4(b), c4 = fold_to_4(c), d4 = fold_to_4(d);
  const Float<4> ab = NANO_VLLM_SHUFFLE(a4, b4, 0, 1, 4, 5) + NANO_VLLM_SHUFFLE(a4, b4, 2, 3, 6, 7);
  const Float<4> cd = NANO_VLLM_SHUFFLE(c4, d4, 0, 1, 4, 5) + NANO_VLLM_SHUFFLE(c4, d4, 2, 3, 6, 7);
  return NANO_VLLM_SHUFFLE(ab, cd, 0, 2, 4, 6) + NANO_VLLM_SHUFFLE(ab, cd, 1, 3, 5, 7);
}

template <class Vector>
NANO_VLLM_INLINE float sum(const Vector& v) {
  const Float<4> v4 = fold_to_4(v);
  return (v4[0] + v4[2]) + (v4[1] + v4[3]);
}

template <class Vector>
NANO_VLLM_INLINE float max_lane(const Vector& v) {
  float result = v[0];
  for (int i = 1; i < kLanesOf<Vector>; ++i) result = v[i] > result ? v[i] : result;
  return result;
}

#ifdef NANO_VLLM_X86_DISPATCH

template <class Kernel, class... Args>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"),
               flatten)) void run_avx512(const Args&... args) {
  Kernel::template run<16>(args...);
}

template <class Kernel, class... Args>
__attribute__((target("avx2,fma,f16c"), flatten)) void run_avx2(const Args&... args) {
  Kernel::template run<8>(args...);
}

template <class Kernel, class... Args>
__attribute__((flatten)) void run_base(const Args&... args) {
  Kernel::template run<4>(args...);
}

inline int widest_lanes() {
  // Every CPU with AVX2 and FMA converts float16 (F16C) too.
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 4;
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
             ? 16
             : 8;
}

template <class Kernel, class... Args>
void run(const Args&... args) {
  static const int lanes = widest_lanes();
  if (lanes == 16) return run_avx512<Kernel>(args...);
  if (lanes == 8) return run_avx2<Kernel>(args...);
  run_base<Kernel>(args...);
}

#else

#if defined(__AVX512F__)
constexpr int kNativeLanes = 16;
#elif defined(__AVX__)
constexpr int kNativeLanes = 8;
#else
constexpr int kNativeLanes = 4;
#endif

template <class Kernel, class... Args>
void run(const Args&... args) {
  Kernel::template run<kNativeLanes>(args...);
}

#endif

}  // namespace nano_vllm::cpu::simd
