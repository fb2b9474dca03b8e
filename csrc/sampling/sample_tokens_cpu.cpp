// CPU sampling: threads share the rows. What top-k and top-p keep is looked for among the likeliest
// tokens, some hundreds, and in the whole row where these do not suffice.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "common/parallel.h"
#include "common/simd_convert.h"
#include "common/simd_math.h"
#include "sampling/philox.h"
#include "sampling/sample_tokens.h"

namespace nano_vllm::cpu {
namespace {

constexpr int64_t kPieceTokens = 1024;
constexpr int64_t kMaxPieces = kMaxVocabSize / kPieceTokens;
constexpr int64_t kPartTokens = 64, kNumParts = 256;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Weights of up to kPieceTokens logits, 0 below the threshold, and their sum.
struct Weights {
  template <int kLanes>
  static NANO_VLLM_INLINE void run(const float* logits, int64_t size, float largest,
                                   float inverse_temperature, float threshold, uint64_t* weights,
                                   uint64_t* sum) {
    float exponentials[kPieceTokens];
    for (int64_t i = 0; i < size; i += kLanes) {
      const auto x = simd::load_partial<kLanes>(logits + i, size - i);
      simd::store_partial(exponentials + i, simd::exp((x - largest) * inverse_temperature),
                          size - i);
    }
    uint64_t total = 0;
    for (int64_t i = 0; i < size; ++i) {
      // The low bits of a double of this size are an integer, rounded as llrint would, for which
      // there is no vector instruction but on the newest machines.
      const double shifted = double{exponentials[i]} * kSampleUnits + 0x1p52;
      uint64_t weight;
      std::memcpy(&weight, &shifted, sizeof(weight));
      weights[i] = logits[i] >= threshold ? weight - 0x4330000000000000 : 0;
      total += weights[i];
    }
    *sum = total;
  }
};

template <class T>
struct ToFloats {
  template <int kLanes>
  static NANO_VLLM_INLINE void run(const T* from, int64_t size, float* to) {
    for (int64_t i = 0; i < size; i += kLanes) {
      simd::store_partial(to + i, simd::load_partial<kLanes>(from + i, size - i), size - i);
    }
  }
};

// Weights of tokens.
class Weigher {
 public:
  Weigher(float largest, double temperature)
      : largest_(largest),
        // Finite, as it multiplies zeros.
        inverse_(std::min(static_cast<float>(1 / temperature), std::numeric_limits<float>::max())) {
  }

  // Of up to kPieceTokens logits; below the threshold they are 0. Returns their sum.
  uint64_t weigh(const float* logits, int64_t size, float threshold, uint64_t* weights) const {
    uint64_t sum = 0;
    simd::run<Weights>(logits, size, largest_, inverse_, threshold, weights, &sum);
    return sum;
  }

  // Of any number of logits.
  uint64_t sum(const float* logits, int64_t size, float threshold) const {
    uint64_t weights[kPieceTokens], sum = 0;
    for (int64_t first = 0; first < size; first += kPieceTokens) {
      sum += weigh(logits + first, std::min(kPieceTokens, size - first), threshold, weights);
    }
    return sum;
  }

 private:
  float largest_, inverse_;
};

// The likeliest tokens of a row, in falling order: at least kNumParts, where there are so many with
// a weight. Of -inf, which all but some tokens may have, there are none.
std::vector<float> likeliest(const float* logits, int64_t vocab_size) {
  std::vector<float> largest;  // of each part of the row
  for (int64_t first = 0; first < vocab_size; first += kPartTokens) {
    const int64_t last = std::min(first + kPartTokens, vocab_size);
    largest.push_back(*std::max_element(logits + first, logits + last));
  }
  float lowest = std::numeric_limits<float>::lowest();
  if (static_cast<int64_t>(largest.size()) > kNumParts) {
    std::nth_element(largest.begin(), largest.begin() + kNumParts - 1, largest.end(),
                     std::greater<>());
    lowest = std::max(lowest, largest[kNumParts - 1]);
  }
  std::vector<float> found;
  std::copy_if(logits, logits + vocab_size, std::back_inserter(found),
               [&](float logit) { return logit >= lowest; });
  std::sort(found.begin(), found.end(), std::greater<>());
  return found;
}

// The last of the logits, in falling order, with which the weights reach `enough`; -inf if they do
// not.
float reaches(const std::vector<float>& logits, const Weigher& weigher, uint64_t enough) {
  uint64_t weights[kPieceTokens], sum = 0;
  const int64_t count = static_cast<int64_t>(logits.size());
  for (int64_t first = 0; first < count; first += kPieceTokens) {
    const int64_t size = std::min(kPieceTokens, count - first);
    weigher.weigh(logits.data() + first, size, -kInfinity, weights);
    for (int64_t i = 0; i < size; ++i) {
      sum += weights[i];
      if (sum >= enough) return logits[first + i];
    }
  }
  return -kInfinity;
}

// The least logit that top-k and top-p keep.
float kept_from(const float* logits, int64_t vocab_size, int64_t top_k, double top_p,
                const Weigher& weigher) {
  std::vector<float> found = likeliest(logits, vocab_size);
  const auto all = [&] {
    std::vector<float> sorted(logits, logits + vocab_size);
    std::sort(sorted.begin(), sorted.end(), std::greater<>());
    return sorted;
  };
  float kept = -kInfinity;
  if (top_k > 0 && top_k < vocab_size) {
    if (static_cast<int64_t>(found.size()) < top_k) found = all();
    kept = found[static_cast<size_t>(top_k - 1)];
  }
  if (!(top_p < 1)) return kept;
  const uint64_t total = weigher.sum(logits, vocab_size, kept);
  const uint64_t enough = std::min(
      std::max(static_cast<uint64_t>(std::ceil(top_p * static_cast<double>(total))), uint64_t{1}),
      total);
  float nucleus = reaches(found, weigher, enough);
  if (nucleus == -kInfinity) nucleus = reaches(all(), weigher, enough);
  return std::max(kept, nucleus);
}

int64_t sample_row(const SampleTokensParams& p, int64_t row, const float* logits) {
  float largest = -kInfinity;
  int64_t best = 0;
  for (int64_t i = 0; i < p.vocab_size; ++i) {
    if (std::isnan(logits[i])) return kNotFinite;
    if (logits[i] > largest) {
      largest = logits[i];
      best = i;
    }
  }
  if (std::isinf(largest)) return largest > 0 ? kNotFinite : kNothingAllowed;
  const double temperature = p.temperatures[row], top_p = p.top_p[row];
  if (temperature == 0) return best;

  const Weigher weigher(largest, temperature);
  // The least float that is not below what min-p asks for.
  const double lowest = static_cast<double>(largest) + p.min_p[row];
  float threshold = static_cast<float>(lowest);
  if (static_cast<double>(threshold) < lowest) threshold = std::nextafterf(threshold, kInfinity);
  if (top_p < 1 || (p.top_k[row] > 0 && p.top_k[row] < p.vocab_size)) {
    threshold = std::max(threshold, kept_from(logits, p.vocab_size, p.top_k[row], top_p, weigher));
  }
  uint64_t weights[kPieceTokens], sums[kMaxPieces], total = 0;
  const auto weigh = [&](int64_t first) {
    return weigher.weigh(logits + first, std::min(kPieceTokens, p.vocab_size - first), threshold,
                         weights);
  };
  for (int64_t piece = 0; piece * kPieceTokens < p.vocab_size; ++piece) {
    sums[piece] = weigh(piece * kPieceTokens);
    total += sums[piece];
  }
  const double number =
      uniform_number(static_cast<uint64_t>(p.seeds[row]),
                     static_cast<uint64_t>(int64_t{p.seq_lens[row]} - p.prompt_lens[row]),
                     static_cast<uint64_t>(p.streams[row]));
  // Below the total even where the product is rounded up.
  uint64_t left = std::min(static_cast<uint64_t>(number * static_cast<double>(total)), total - 1);
  int64_t piece = 0, token = 0;
  while (left >= sums[piece]) left -= sums[piece++];
  weigh(piece * kPieceTokens);
  while (left >= weights[token]) left -= weights[token++];
  return piece * kPieceTokens + token;
}

}  // namespace

void sample_tokens(const SampleTokensParams& params) {
  dispatch_dtype(params.dtype, [&](auto element) {
    using T = decltype(element);
    parallel_for(params.num_rows, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> logits(static_cast<size_t>(params.vocab_size));
      for (int64_t row = begin; row < end; ++row) {
        const int64_t adjusted = params.adjusted_rows == nullptr ? -1 : params.adjusted_rows[row];
        if (adjusted < 0) {
          simd::run<ToFloats<T>>(
              static_cast<const T*>(params.logits) + row * params.logits_stride_row,
              int64_t{params.vocab_size}, logits.data());
        }
        params.out[row] = sample_row(
            params, row,
            adjusted < 0 ? logits.data() : params.adjusted + adjusted * params.adjusted_stride_row);
      }
    });
  });
}

}  // namespace nano_vllm::cpu
