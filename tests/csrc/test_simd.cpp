// The SIMD layer of the CPU kernels, on every vector width that this machine runs: all 16-bit
// patterns widened and narrowed, and the accuracy of its functions.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "common/simd_convert.h"
#include "common/simd_math.h"

namespace nano_vllm::test {
namespace {

using cpu::BFloat16;
using cpu::Float16;
namespace simd = cpu::simd;

// Applies a function of vectors to each element, by kernels of each width.
template <class Function>
struct Map {
  template <int kLanes>
  static NANO_VLLM_INLINE void run(const std::vector<float>& in, float* out) {
    const int64_t size = static_cast<int64_t>(in.size());
    for (int64_t i = 0; i < size; i += kLanes) {
      const auto x = simd::load_partial<kLanes>(in.data() + i, size - i);
      simd::store_partial(out + i, Function::apply(x), size - i);
    }
  }
};

struct Base {
  template <class Kernel, class... Args>
  static void run(const Args&... args) {
    Kernel::template run<4>(args...);
  }
};
struct Widest {
  template <class Kernel, class... Args>
  static void run(const Args&... args) {
    simd::run<Kernel>(args...);
  }
};

template <class Width, class Function>
std::vector<float> map(const std::vector<float>& in) {
  std::vector<float> out(in.size());
  Width::template run<Map<Function>>(in, out.data());
  return out;
}

// --- conversions ---

template <class T>
struct Convert {
  template <int kLanes>
  static NANO_VLLM_INLINE void run(const std::vector<T>& in, float* wide, T* back) {
    const int64_t size = static_cast<int64_t>(in.size());
    for (int64_t i = 0; i < size; i += kLanes) {
      const auto x = simd::load_partial<kLanes>(in.data() + i, size - i);
      simd::store_partial(wide + i, x, size - i);
      simd::store_partial(back + i, x, size - i);
    }
  }
};

template <class T>
struct Narrow {
  template <int kLanes>
  static NANO_VLLM_INLINE void run(const std::vector<float>& in, T* out) {
    const int64_t size = static_cast<int64_t>(in.size());
    for (int64_t i = 0; i < size; i += kLanes) {
      simd::store_partial(out + i, simd::load_partial<kLanes>(in.data() + i, size - i), size - i);
    }
  }
};

constexpr int mantissa_bits(Float16) { return 10; }
constexpr int mantissa_bits(BFloat16) { return 7; }

template <class T>
double value_of(T x) {
  constexpr int kBits = mantissa_bits(T{}), kBias = (1 << (14 - kBits)) - 1;
  const int exponent = (x.bits & 0x7fff) >> kBits, mantissa = x.bits & ((1 << kBits) - 1);
  const double magnitude = exponent == 0
                               ? std::ldexp(mantissa, 1 - kBias - kBits)
                               : std::ldexp(mantissa + (1 << kBits), exponent - kBias - kBits);
  return x.bits & 0x8000 ? -magnitude : magnitude;
}

template <class Width, class T>
void test_conversions() {
  constexpr int kBits = mantissa_bits(T{});
  constexpr uint16_t kInfinity = static_cast<uint16_t>(0x7fff >> kBits << kBits);
  std::vector<T> all(65536 - 3);  // an odd count: the last vector is a partial one
  for (size_t i = 0; i < all.size(); ++i) all[i].bits = static_cast<uint16_t>(i);
  std::vector<float> wide(all.size());
  std::vector<T> back(all.size());
  Width::template run<Convert<T>>(all, wide.data(), back.data());
  bool widened = true, kept = true;
  for (size_t i = 0; i < all.size(); ++i) {
    const int magnitude = all[i].bits & 0x7fff;
    if (magnitude > kInfinity) {
      widened = widened && std::isnan(wide[i]);
      kept = kept && (back[i].bits & 0x7fff) > kInfinity;
    } else if (magnitude == kInfinity) {
      widened = widened && std::isinf(wide[i]) && std::signbit(wide[i]) == (all[i].bits >> 15 != 0);
      kept = kept && back[i].bits == all[i].bits;
    } else {
      widened = widened && static_cast<double>(wide[i]) == value_of(all[i]);
      kept = kept && back[i].bits == all[i].bits;
    }
  }
  CHECK(widened);
  CHECK(kept);

  // Between each two neighbours: a quarter of the way, the middle, three quarters.
  std::vector<float> between;
  std::vector<uint16_t> expected;
  for (int bits = 0; bits < kInfinity; ++bits) {
    const double low = value_of(T{static_cast<uint16_t>(bits)});
    const double step = bits + 1 == kInfinity ? low - value_of(T{static_cast<uint16_t>(bits - 1)})
                                              : value_of(T{static_cast<uint16_t>(bits + 1)}) - low;
    for (int quarter = 1; quarter <= 3; ++quarter) {
      const double middle = low + step * quarter / 4;
      if (middle > FLT_MAX) continue;
      const bool up = quarter == 3 || (quarter == 2 && bits % 2 == 1);
      for (int sign : {0, 1}) {
        between.push_back(static_cast<float>(sign ? -middle : middle));
        expected.push_back(static_cast<uint16_t>((bits + up) | sign << 15));
      }
    }
  }
  for (float x : {1e30f, INFINITY, FLT_MAX}) {
    if (kBits == 7 && x == 1e30f) continue;
    between.push_back(x);
    expected.push_back(kInfinity);
  }
  std::vector<T> rounded(between.size());
  Width::template run<Narrow<T>>(between, rounded.data());
  bool right = true;
  for (size_t i = 0; i < between.size(); ++i) right = right && rounded[i].bits == expected[i];
  CHECK(right);
}

double value_of(Float8E4M3 x) {
  const int exponent = x.bits >> 3 & 15, mantissa = x.bits & 7;
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return x.bits & 0x80 ? -magnitude : magnitude;
}

template <class Width>
void test_float8_conversions() {
  constexpr int kNan = 0x7f;
  std::vector<Float8E4M3> all(256), back(all.size());
  for (size_t i = 0; i < all.size(); ++i) all[i].bits = static_cast<uint8_t>(i);
  std::vector<float> wide(all.size());
  Width::template run<Convert<Float8E4M3>>(all, wide.data(), back.data());
  bool widened = true, kept = true;
  for (size_t i = 0; i < all.size(); ++i) {
    const bool is_nan = (i & kNan) == kNan;
    widened = widened && (is_nan ? std::isnan(wide[i])
                                 : static_cast<double>(wide[i]) == value_of(all[i]) &&
                                       std::signbit(wide[i]) == (i > kNan));
    kept = kept && (is_nan ? (back[i].bits & kNan) == kNan : back[i].bits == i);
  }
  CHECK(widened);
  CHECK(kept);

  // Between each two neighbours, as above; the last step leads to what would be 480.
  std::vector<float> in;
  std::vector<int> expected;
  for (int bits = 0; bits < kNan; ++bits) {
    const double low = value_of(Float8E4M3{static_cast<uint8_t>(bits)});
    const double step = value_of(Float8E4M3{static_cast<uint8_t>(bits + 1)}) - low;
    for (int quarter = 1; quarter <= 3; ++quarter) {
      const bool up = quarter == 3 || (quarter == 2 && bits % 2 == 1);
      in.push_back(static_cast<float>(low + step * quarter / 4));
      expected.push_back(std::min(bits + up, kNan - 1));
    }
  }
  for (float x : {480.0f, 1e30f, FLT_MAX, INFINITY}) in.push_back(x), expected.push_back(kNan - 1);
  in.push_back(std::numeric_limits<float>::quiet_NaN()), expected.push_back(kNan);
  for (int sign : {0, 0x80}) {
    std::vector<Float8E4M3> rounded(in.size());
    Width::template run<Narrow<Float8E4M3>>(in, rounded.data());
    bool right = true;
    for (size_t i = 0; i < in.size(); ++i) right = right && rounded[i].bits == (expected[i] | sign);
    CHECK(right);
    for (float& x : in) x = -x;
  }
}

// --- functions ---

struct Exp {
  template <class Vector>
  static NANO_VLLM_INLINE Vector apply(const Vector& x) {
    return simd::exp(x);
  }
};
struct Tanh {
  template <class Vector>
  static NANO_VLLM_INLINE Vector apply(const Vector& x) {
    return simd::tanh(x);
  }
};
struct NormalTail {
  template <class Vector>
  static NANO_VLLM_INLINE Vector apply(const Vector& x) {
    return simd::normal_tail(x);
  }
};

template <class Width, class Function>
double largest_error(double low, double high, double (*reference)(double)) {
  std::vector<float> in;
  for (int i = 0; i <= 200001; ++i)
    in.push_back(static_cast<float>(low + (high - low) * i / 200001));
  const std::vector<float> out = map<Width, Function>(in);
  double largest = 0;
  for (size_t i = 0; i < in.size(); ++i) {
    const double expected = reference(in[i]);
    const double error = std::abs(out[i] - expected) / std::max(std::abs(expected), 1e-300);
    if (!(error <= largest)) largest = error;
  }
  return largest;
}

template <class Width>
void test_functions() {
  const auto exp = [](double x) { return std::exp(x); };
  const auto tanh = [](double x) { return x == 0 ? 0 : std::tanh(x); };
  const auto normal_tail = [](double x) { return 0.5 * std::erfc(x / std::sqrt(2.0)); };
  CHECK((largest_error<Width, Exp>(-87.3, 88.7, exp)) < 2e-7);
  CHECK((largest_error<Width, Exp>(-1, 1, exp)) < 1.5e-7);
  CHECK((largest_error<Width, Tanh>(-12, 12, tanh)) < 3e-7);
  CHECK((largest_error<Width, Tanh>(-0.01, 0.01, tanh)) < 1.5e-7);
  CHECK((largest_error<Width, NormalTail>(0, 12.9, normal_tail)) < 5e-7);

  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> edges = {-INFINITY, -1000, -88, 0, -0.0f, 89, 1000, INFINITY, nan};
  const std::vector<float> e = map<Width, Exp>(edges);
  CHECK(e[0] == 0 && e[1] == 0 && e[2] == 0);
  CHECK(e[3] == 1 && e[4] == 1);
  CHECK(std::isinf(e[5]) && std::isinf(e[6]) && std::isinf(e[7]));
  CHECK(std::isnan(e[8]));
  const std::vector<float> t = map<Width, Tanh>(edges);
  CHECK(t[0] == -1 && t[1] == -1 && t[3] == 0 && t[7] == 1 && std::isnan(t[8]));
}

struct Sums {
  template <int kLanes>
  static NANO_VLLM_INLINE void run(const std::vector<float>& in, bool* same) {
    simd::Float<kLanes> v[4];
    for (int i = 0; i < 4; ++i) v[i] = simd::load<kLanes>(in.data() + i * kLanes);
    const simd::Float<4> sums = simd::sum_4(v[0], v[1], v[2], v[3]);
    for (int i = 0; i < 4; ++i) {
      double exact = 0;
      for (int lane = 0; lane < kLanes; ++lane) exact += in[i * kLanes + lane];
      *same = *same && sums[i] == simd::sum(v[i]) && std::abs(sums[i] - exact) < 1e-5;
    }
  }
};

template <class Width>
void test_width() {
  test_conversions<Width, Float16>();
  test_conversions<Width, BFloat16>();
  test_float8_conversions<Width>();
  test_functions<Width>();
  std::vector<float> in;
  for (int i = 0; i < 64; ++i) in.push_back(std::sin(static_cast<float>(i)));
  bool same = true;
  Width::template run<Sums>(in, &same);
  CHECK(same);
}

}  // namespace
}  // namespace nano_vllm::test

int main() {
  using namespace nano_vllm::test;
  test_width<Base>();
  test_width<Widest>();
  return report_checks();
}
