// The rotary embedding of one head, for the CPU kernels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/simd_convert.h"

namespace nano_vllm::cpu {

// The vector (x, y) turned by each lane's angle. Bits are the same wherever this is inlined.
template <class Vector>
NANO_VLLM_INLINE void rotate(Vector& x, Vector& y, const Vector& cos, const Vector& sin) {
  const Vector turned = simd::rounded(x * cos) - simd::rounded(y * sin);
  y = simd::rounded(y * cos) + simd::rounded(x * sin);
  x = turned;
}

// (x0, y0, x1, y1, ...) in two vectors to all x in one and all y in the other.
template <class Vector>
NANO_VLLM_INLINE void deinterleave(Vector& a, Vector& b) {
  constexpr int kLanes = simd::kLanesOf<Vector>;
  Vector x{}, y{};
  for (int i = 0; i < kLanes / 2; ++i) {
    x[i] = a[2 * i], x[i + kLanes / 2] = b[2 * i];
    y[i] = a[2 * i + 1], y[i + kLanes / 2] = b[2 * i + 1];
  }
  a = x, b = y;
}

template <class Vector>
NANO_VLLM_INLINE void interleave(Vector& x, Vector& y) {
  constexpr int kLanes = simd::kLanesOf<Vector>;
  Vector a{}, b{};
  for (int i = 0; i < kLanes / 2; ++i) {
    a[2 * i] = x[i], a[2 * i + 1] = y[i];
    b[2 * i] = x[i + kLanes / 2], b[2 * i + 1] = y[i + kLanes / 2];
  }
  x = a, y = b;
}

// Turns the first 2 * half elements of a head into those of out, which may be the head.
template <int kLanes, bool kIsNeox, class T>
NANO_VLLM_INLINE void rotate_head(T* out, const T* head, const float* cos, const float* sin,
                                  int64_t half) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t pairs = std::min<int64_t>(kLanes, half - i);
    const simd::Float<kLanes> c = simd::load_partial<kLanes>(cos + i, pairs);
    const simd::Float<kLanes> s = simd::load_partial<kLanes>(sin + i, pairs);
    // Where the first and the second vector lie, and how many of their lanes.
    const int64_t first = kIsNeox ? i : 2 * i;
    const int64_t first_count = kIsNeox ? pairs : std::min<int64_t>(kLanes, 2 * pairs);
    const int64_t second = first + (kIsNeox ? half : first_count);
    const int64_t second_count = kIsNeox ? pairs : 2 * pairs - first_count;
    simd::Float<kLanes> x = simd::load_partial<kLanes>(head + first, first_count);
    simd::Float<kLanes> y = simd::load_partial<kLanes>(head + second, second_count);
    if (!kIsNeox) deinterleave(x, y);
    rotate(x, y, c, s);
    if (!kIsNeox) interleave(x, y);
    simd::store_partial(out + first, x, first_count);
    simd::store_partial(out + second, y, second_count);
  }
}

}  // namespace nano_vllm::cpu
