// exp, tanh and the normal distribution's tail of float vectors, within a few units of the last
// place. The polynomials are minimax fits of relative error below 5e-8.
#pragma once

#include "common/simd.h"

namespace nano_vllm::cpu::simd {

// exp(x + rest) for |rest| < 0.1, more exact than a sum rounded first. NaN stays NaN, overflow is
// inf, and what lies below the smallest normal float is 0.
template <class Vector>
NANO_VLLM_INLINE Vector exp(const Vector& x, const Vector& rest = Vector{}) {
  using Int = decltype(x < x);
  constexpr float kLowest = -87.33654f;  // log of the smallest normal float
  constexpr float kHighest = 89.0f;      // past the log of the largest float
  constexpr float kLog2e = 1.44269504f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // kLn2High has 9 bits
  constexpr float kRound = 0x1.8p23f;  // added and taken away, it rounds to an integer

  const Vector clamped = x > kHighest ? Vector{} + kHighest : x < kLowest ? Vector{} + kLowest : x;
  const Vector shifted = clamped * kLog2e + kRound;
  const Vector n = shifted - kRound;
  const Vector r = clamped - n * kLn2High - n * kLn2Low + rest;
  Vector p = r * 1.395060162e-03f + 8.368953578e-03f;
  p = p * r + 4.166620415e-02f;
  p = p * r + 1.666651831e-01f;
  p = p * r + 5.000000096e-01f;
  p = p * (r * r) + r + 1.0f;
  // 2^n in two factors: n = 128 has no float of its own. kRound leaves n in the low bits.
  const Int exponent = bit_cast<Int>(shifted) - bit_cast<int32_t>(kRound);
  const Int half = exponent >> 1;
  const Vector scale_1 = bit_cast<Vector>((half + 127) << 23);
  const Vector scale_2 = bit_cast<Vector>((exponent - half + 127) << 23);
  const Vector result = p * scale_1 * scale_2;
  return x < kLowest ? Vector{} : result;
}

template <class Vector>
NANO_VLLM_INLINE Vector tanh(const Vector& x) {
  const Vector magnitude = x < 0.0f ? -x : x;
  // Near 0 the quotient below would lose its digits.
  const Vector square = x * x;
  Vector p = square * -5.717042149e-03f + 2.065058447e-02f;
  p = p * square - 5.374349713e-02f;
  p = p * square + 1.333149127e-01f;
  p = p * square - 3.333328392e-01f;
  const Vector small = p * square * x + x;
  const Vector large = 1.0f - 2.0f / (exp(magnitude * 2.0f) + 1.0f);
  return magnitude < 0.625f ? small : x < 0.0f ? -large : large;
}

// P(X > x) of a standard normal X, for x >= 0: erfc(x / sqrt(2)) / 2. With z = x / sqrt(2) and
// t = 1 / (1 + z / 2), erfc(z) = t P(t) exp(-z^2).
template <class Vector>
NANO_VLLM_INLINE Vector normal_tail(const Vector& x) {
  using Int = decltype(x < x);
  const Vector t = 1.0f / (x * 0.353553391f + 1.0f);
  Vector p = t * -5.906904005e-02f + 2.845753389e-01f;
  p = p * t - 4.872006443e-01f;
  p = p * t + 2.780679740e-01f;
  p = p * t - 2.662619762e-02f;
  p = p * t + 2.026870812e-01f;
  p = p * t + 2.431037126e-01f;
  p = p * t + 2.823753149e-01f;
  p = p * t + 2.820864175e-01f;
  // x^2 in two parts, the first without rounding: an error in an exponent is one in every digit.
  const Vector high = bit_cast<Vector>(bit_cast<Int>(x) & ~0xfff);
  const Vector rest = (x - high) * (x + high);
  return p * t * 0.5f * exp(high * high * -0.5f, rest * -0.5f);
}

}  // namespace nano_vllm::cpu::simd
