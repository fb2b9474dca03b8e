// CPU sampling: threads share the rows.
#include <algorithm>
#include <cmath>
#include <limits>

#include "common/parallel.h"
#include "common/simd_convert.h"
#include "common/simd_math.h"
#include "sampling/sample_tokens.h"

namespace nano_vllm::cpu {
namespace {

constexpr int64_t kPieceTokens = 1024;
constexpr int64_t kMaxPieces = kMaxVocabSize / kPieceTokens;

// Weights of the tokens of one row, a piece at a time.
template <class T>
class Weigher {
 public:
  Weigher(const T* row, int64_t vocab_size, float largest, double temperature, double floor)
      : row_(row),
        vocab_size_(vocab_size),
        largest_(largest),
        // Finite, as it multiplies zeros.
        inverse_(std::min(static_cast<float>(1 / temperature), std::numeric_limits<float>::max())),
        temperature_(temperature),
        floor_(floor) {}

  // Those of the piece from this token on; returns their sum.
  template <int kLanes>
  NANO_VLLM_INLINE uint64_t weigh(int64_t first, uint64_t (&weights)[kPieceTokens]) const {
    const int64_t size = std::min(kPieceTokens, vocab_size_ - first);
    float logits[kPieceTokens], exponentials[kPieceTokens];
    for (int64_t i = 0; i < size; i += kLanes) {
      const auto x = simd::load_partial<kLanes>(row_ + first + i, size - i);
      simd::store_partial(logits + i, x, size - i);
      simd::store_partial(exponentials + i, simd::exp((x - largest_) * inverse_), size - i);
    }
    const bool has_floor = floor_ > -std::numeric_limits<double>::infinity();
    uint64_t sum = 0;
    for (int64_t i = 0; i < size; ++i) {
      // As exactly as the floor was found: a token that equals it must stay.
      const bool is_out =
          has_floor &&
          (static_cast<double>(logits[i]) - static_cast<double>(largest_)) / temperature_ < floor_;
      // Signed: there is an instruction for it, and a weight has 44 bits.
      weights[i] = is_out ? 0 : static_cast<uint64_t>(std::llrint(exponentials[i] * kSampleUnits));
      sum += weights[i];
    }
    return sum;
  }

 private:
  const T* row_;
  int64_t vocab_size_;
  float largest_, inverse_;
  double temperature_, floor_;
};

template <class T>
struct SampleRows {
  template <int kLanes>
  static NANO_VLLM_INLINE void run(const SampleTokensParams& p, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) p.out[row] = sample<kLanes>(p, row);
  }

  template <int kLanes>
  static NANO_VLLM_INLINE int64_t sample(const SampleTokensParams& p, int64_t row) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const T* const logits = static_cast<const T*>(p.logits) + row * p.logits_stride_row;
    float largest = -kInfinity;
    int64_t likeliest = 0;
    for (int64_t first = 0; first < p.vocab_size; first += kLanes) {
      const int64_t size = std::min<int64_t>(kLanes, p.vocab_size - first);
      float values[kLanes];
      simd::store_partial(values, simd::load_partial<kLanes>(logits + first, size), kLanes);
      for (int64_t i = 0; i < size; ++i) {
        if (std::isnan(values[i])) return -1;
        if (values[i] > largest) {
          largest = values[i];
          likeliest = first + i;
        }
      }
    }
    if (std::isinf(largest)) return -1;
    if (p.temperatures[row] == 0) return likeliest;

    const Weigher<T> weigher(logits, p.vocab_size, largest, p.temperatures[row], p.floors[row]);
    uint64_t weights[kPieceTokens];
    uint64_t sums[kMaxPieces], total = 0;
    for (int64_t piece = 0; piece * kPieceTokens < p.vocab_size; ++piece) {
      sums[piece] = weigher.template weigh<kLanes>(piece * kPieceTokens, weights);
      total += sums[piece];
    }
    // Below the total even where the product is rounded up.
    uint64_t left =
        std::min(static_cast<uint64_t>(p.uniforms[row] * static_cast<double>(total)), total - 1);
    int64_t piece = 0, token = 0;
    while (left >= sums[piece]) left -= sums[piece++];
    weigher.template weigh<kLanes>(piece * kPieceTokens, weights);
    while (left >= weights[token]) left -= weights[token++];
    return piece * kPieceTokens + token;
  }
};

}  // namespace

void sample_tokens(const SampleTokensParams& params) {
  dispatch_dtype(params.dtype, [&](auto element) {
    parallel_for(params.num_rows, 1, [&](int64_t begin, int64_t end) {
      simd::run<SampleRows<decltype(element)>>(params, begin, end);
    });
  });
}

}  // namespace nano_vllm::cpu
