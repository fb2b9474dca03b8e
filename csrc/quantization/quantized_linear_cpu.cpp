// CPU quantized linear: a block of 16 output rows is one vector of 32-bit sums. A vector
// instruction multiplies four columns of all 16 rows with four elements of an input row (VNNI,
// "vpdpbusd").
#include <cmath>
#include <limits>

#include "common/parallel.h"
#include "common/simd_convert.h"
#include "quantization/quantized_linear.h"

#if defined(NANO_VLLM_X86_DISPATCH)
#include <immintrin.h>
// GCC's own header sets it off (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace nano_vllm::cpu {
namespace {

constexpr int kSteps = kGroupSize / 4;
constexpr int kTileRows = 8;  // input rows that pass over a group of weights together

// The input in 8 bits: x is about scale * quant, in each group.
struct QuantizedInput {
  int8_t* quants;  // [num_rows, in_features]
  float* scales;   // [num_rows, num_groups]
  float* sums;     // [num_rows, num_groups]; of scale * quant, which the minima multiply
  int64_t in_features, num_groups;

  // Floats of memory for so many rows.
  static int64_t numel(int64_t num_rows, int64_t in_features) {
    return num_rows * (in_features / 4 + 2 * (in_features / kGroupSize));
  }
  QuantizedInput(float* memory, int64_t num_rows, int64_t in_features)
      : quants(reinterpret_cast<int8_t*>(memory)),
        scales(memory + num_rows * in_features / 4),
        sums(scales + num_rows * (in_features / kGroupSize)),
        in_features(in_features),
        num_groups(in_features / kGroupSize) {}
};

template <class Ints>
NANO_VLLM_INLINE void store_low_bytes(int8_t* to, const Ints& from) {
  constexpr int kLanes = simd::kLanesOf<Ints>;
#if defined(NANO_VLLM_X86_DISPATCH)
  if constexpr (kLanes == 16) {
    typedef int8_t Bytes __attribute__((vector_size(16)));
    Bytes bytes;
    asm("vpmovdb %1, %0" : "=v"(bytes) : "v"(from));
    std::memcpy(to, &bytes, sizeof(bytes));
    return;
  }
#endif
  for (int lane = 0; lane < kLanes; ++lane) to[lane] = static_cast<int8_t>(from[lane]);
}

template <class T>
struct QuantizeRows {
  template <int kLanes>
  static NANO_VLLM_INLINE void run(const T* input, int64_t stride, const QuantizedInput& to,
                                   int64_t begin, int64_t end) {
    using Vector = simd::Float<kLanes>;
    constexpr int kVectors = kGroupSize / kLanes;
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t group = 0; group < to.num_groups; ++group) {
        const T* from = input + row * stride + group * kGroupSize;
        Vector x[kVectors], largest{}, all{};
        for (int i = 0; i < kVectors; ++i) {
          x[i] = simd::load<kLanes>(from + i * kLanes);
          const Vector magnitude = x[i] < 0.0f ? -x[i] : x[i];
          largest = simd::max(largest, magnitude);
          all += magnitude;
        }
        const bool is_finite = std::isfinite(simd::sum(all));
        const float scale =
            is_finite ? simd::max_lane(largest) / 127.0f : std::numeric_limits<float>::quiet_NaN();
        const float inverse = is_finite && scale > 0.0f ? 1.0f / scale : 0.0f;
        int8_t* quants = to.quants + row * to.in_features + group * kGroupSize;
        Vector sum{};
        for (int i = 0; i < kVectors; ++i) {
          constexpr float kRound =
              0x1.8p23f;  // added, it leaves the rounded integer in the low bits
          const Vector shifted = (is_finite ? x[i] * inverse : Vector{}) + kRound;
          sum += shifted - kRound;
          store_low_bytes(quants + i * kLanes, simd::bit_cast<simd::Int<kLanes>>(shifted));
        }
        to.scales[row * to.num_groups + group] = scale;
        to.sums[row * to.num_groups + group] = scale * simd::sum(sum);
      }
    }
  }
};

template <class T>
NANO_VLLM_INLINE void store_block(const QuantizedLinearParams& p, int64_t row, int64_t block,
                                  const float (&sums)[kPackedRows]) {
  const int64_t first = block * kPackedRows;
  const int64_t count = std::min<int64_t>(kPackedRows, p.out_features - first);
  T* out = static_cast<T*>(p.out) + row * p.out_stride_row + first;
  const T* bias = static_cast<const T*>(p.bias);
  for (int64_t i = 0; i < count; i += 4) {
    simd::Float<4> x = simd::load<4>(sums + i);
    if (bias != nullptr) x += simd::load_partial<4>(bias + first + i, count - i);
    simd::store_partial(out + i, x, count - i);
  }
}

// Any machine: the compiler's vectors.
template <class T, int kBits>
struct MultiplyBlocks {
  template <int kLanes>
  static NANO_VLLM_INLINE void run(const QuantizedLinearParams& p, const QuantizedInput& input,
                                   int64_t begin, int64_t end) {
    constexpr int64_t kBytes = packed_group_bytes(kBits);
    for (int64_t block = begin; block < end; ++block) {
      for (int64_t row = 0; row < p.num_rows; ++row) {
        float sums[kPackedRows] = {};
        for (int64_t group = 0; group < input.num_groups; ++group) {
          const uint8_t* weight = p.weight + (block * input.num_groups + group) * kBytes;
          const int8_t* x = input.quants + row * input.in_features + group * kGroupSize;
          int32_t dots[kPackedRows] = {};
          for (int step = 0; step < kSteps; ++step) {
            for (int i = 0; i < kPackedRows * 4; ++i) {
              const int quant = kBits == 8
                                    ? weight[step * kPackedRows * 4 + i]
                                    : weight[step / 2 * kPackedRows * 4 + i] >> (step % 2 * 4) & 15;
              dots[i / 4] += quant * x[step * 4 + i % 4];
            }
          }
          const auto* halves =
              reinterpret_cast<const Float16*>(weight + kPackedRows * kGroupSize * kBits / 8);
          const float scale = input.scales[row * input.num_groups + group];
          const float sum = input.sums[row * input.num_groups + group];
          for (int i = 0; i < kPackedRows; i += 4) {
            const simd::Float<4> dot = {
                static_cast<float>(dots[i]), static_cast<float>(dots[i + 1]),
                static_cast<float>(dots[i + 2]), static_cast<float>(dots[i + 3])};
            const simd::Float<4> scales = simd::load<4>(halves + i);
            const simd::Float<4> minima = simd::load<4>(halves + kPackedRows + i);
            simd::store(sums + i, simd::load<4>(sums + i) + dot * (scales * scale) + minima * sum);
          }
        }
        store_block<T>(p, row, block, sums);
      }
    }
  }
};

#if defined(NANO_VLLM_X86_DISPATCH)

#define NANO_VLLM_VNNI \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"), flatten))

// Four columns of an input row, for all output rows: a load that broadcasts, part of the product.
NANO_VLLM_VNNI inline __m512i broadcast_columns(const int8_t* columns) {
  int32_t four;
  std::memcpy(&four, columns, sizeof(four));
  return _mm512_set1_epi32(four);
}

// kRows input rows, from first_row on, times one block of weights.
template <class T, int kBits, int kRows>
NANO_VLLM_VNNI void multiply_block_vnni(const QuantizedLinearParams& p, const QuantizedInput& input,
                                        int64_t block, int64_t first_row) {
  constexpr int64_t kBytes = packed_group_bytes(kBits);
  __m512 sums[kRows];
  for (int r = 0; r < kRows; ++r) sums[r] = _mm512_setzero_ps();
  const uint8_t* weight = p.weight + block * input.num_groups * kBytes;
  for (int64_t group = 0; group < input.num_groups; ++group, weight += kBytes) {
    __m512i quants[kSteps];
    if constexpr (kBits == 8) {
      for (int step = 0; step < kSteps; ++step) {
        quants[step] = _mm512_loadu_si512(weight + 64 * step);
      }
    } else {
      const __m512i low = _mm512_set1_epi8(15);
      for (int step = 0; step < kSteps; step += 2) {
        const __m512i pair = _mm512_loadu_si512(weight + 32 * step);
        quants[step] = _mm512_and_si512(pair, low);
        quants[step + 1] = _mm512_and_si512(_mm512_srli_epi16(pair, 4), low);
      }
    }
    const uint8_t* halves = weight + kPackedRows * kGroupSize * kBits / 8;
    const __m512 scales =
        _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves)));
    const __m512 minima =
        _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves + 32)));
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first_row + r;
      const int8_t* x = input.quants + row * input.in_features + group * kGroupSize;
      // One chain of sums a row; a lone row has two, as no other hides their latency.
      constexpr int kChains = kRows == 1 ? 2 : 1;
      __m512i chains[kChains];
      for (int i = 0; i < kChains; ++i) chains[i] = _mm512_setzero_si512();
      for (int step = 0; step < kSteps; ++step) {
        __m512i& chain = chains[step % kChains];
        chain = _mm512_dpbusd_epi32(chain, quants[step], broadcast_columns(x + 4 * step));
      }
      if constexpr (kChains == 2) chains[0] = _mm512_add_epi32(chains[0], chains[1]);
      const __m512 dots = _mm512_cvtepi32_ps(chains[0]);
      const __m512 scale = _mm512_set1_ps(input.scales[row * input.num_groups + group]);
      const __m512 sum = _mm512_set1_ps(input.sums[row * input.num_groups + group]);
      sums[r] = _mm512_fmadd_ps(dots, _mm512_mul_ps(scales, scale), sums[r]);
      sums[r] = _mm512_fmadd_ps(minima, sum, sums[r]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    float block_sums[kPackedRows];
    _mm512_storeu_ps(block_sums, sums[r]);
    store_block<T>(p, first_row + r, block, block_sums);
  }
}

template <class T, int kBits>
void multiply_blocks_vnni(const QuantizedLinearParams& p, const QuantizedInput& input,
                          int64_t begin, int64_t end) {
  // So many input rows stay in the second-level cache while all blocks of weights pass over them.
  constexpr int64_t kRowsAtOnce = 16 * kTileRows;
  for (int64_t first_row = 0; first_row < p.num_rows; first_row += kRowsAtOnce) {
    const int64_t last_row = std::min<int64_t>(first_row + kRowsAtOnce, p.num_rows);
    for (int64_t block = begin; block < end; ++block) {
      int64_t row = first_row;
      for (; row + kTileRows <= last_row; row += kTileRows) {
        multiply_block_vnni<T, kBits, kTileRows>(p, input, block, row);
      }
      for (; row + 2 <= last_row; row += 2) {
        multiply_block_vnni<T, kBits, 2>(p, input, block, row);
      }
      if (row < last_row) multiply_block_vnni<T, kBits, 1>(p, input, block, row);
    }
  }
}

bool has_vnni() {
  static const bool has = __builtin_cpu_supports("avx512vnni") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return has;
}

#endif

template <class T, int kBits>
void multiply_blocks(const QuantizedLinearParams& p, const QuantizedInput& input, int64_t begin,
                     int64_t end) {
#if defined(NANO_VLLM_X86_DISPATCH)
  if (has_vnni()) return multiply_blocks_vnni<T, kBits>(p, input, begin, end);
#endif
  simd::run<MultiplyBlocks<T, kBits>>(p, input, begin, end);
}

template <class T>
void quantized_linear(const QuantizedLinearParams& p) {
  thread_local ThreadScratch scratch;
  const QuantizedInput input(scratch.reserve(QuantizedInput::numel(p.num_rows, p.in_features)),
                             p.num_rows, p.in_features);
  parallel_for(p.num_rows, std::max<int64_t>(1, 16384 / p.in_features),
               [&](int64_t begin, int64_t end) {
                 simd::run<QuantizeRows<T>>(static_cast<const T*>(p.input), p.input_stride_row,
                                            input, begin, end);
               });
  const int64_t num_blocks = (p.out_features + kPackedRows - 1) / kPackedRows;
  parallel_for(num_blocks, 1, [&](int64_t begin, int64_t end) {
    if (p.bits == 4) {
      multiply_blocks<T, 4>(p, input, begin, end);
    } else {
      multiply_blocks<T, 8>(p, input, begin, end);
    }
  });
}

}  // namespace

void quantized_linear(const QuantizedLinearParams& params) {
  dispatch_dtype(params.dtype, [&](auto element) { quantized_linear<decltype(element)>(params); });
}

}  // namespace nano_vllm::cpu
