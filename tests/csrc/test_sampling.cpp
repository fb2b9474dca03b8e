// Sampling on a CPU, and its CUDA kernels on a CPU, see cuda_on_cpu/cuda_runtime.h: against plain
// loops in double.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "attention_case.h"
#include "cuda_runtime.h"
#include "sampling/adjust_logits.h"
#include "sampling/philox.h"
#include "sampling/sample_tokens.h"

namespace nano_vllm::test {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

void test_philox() {  // the known answers of Random123
  constexpr uint64_t kOnes = ~uint64_t{0};
  CHECK(philox4x32(0, 0, 0) == 0xE169C58D6627E8D5);
  CHECK(philox4x32(kOnes, kOnes, kOnes) == 0x41C83B0E408F276D);
  CHECK(philox4x32(0x299F31D0A4093822, 0x85A308D3243F6A88, 0x0370734413198A2E) ==
        0x94FDCCEBD16CFE09);
  CHECK(uniform_number(kOnes, 1, 2) >= 0 && uniform_number(kOnes, 1, 2) < 1);
}

struct Filters {
  double temperature;
  int32_t top_k;
  double top_p, min_p;
};

// Weights of a row's tokens; of those dropped, 0.
std::vector<double> kept_weights(const std::vector<double>& logits, const Filters& f) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  std::vector<double> weights(logits.size()), sorted = logits;
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  const double kth = f.top_k > 0 && f.top_k < static_cast<int32_t>(logits.size())
                         ? sorted[static_cast<size_t>(f.top_k - 1)]
                         : -kInf;
  const auto weight = [&](double logit) { return std::exp((logit - largest) / f.temperature); };
  double total = 0, reached = 0, least = -kInf;
  for (double logit : logits) total += logit >= kth ? weight(logit) : 0;
  if (f.top_p < 1) {
    for (double logit : sorted) {
      if (reached >= f.top_p * total) break;
      least = logit;
      reached += weight(logit);
    }
  }
  for (size_t i = 0; i < logits.size(); ++i) {
    const bool is_kept = logits[i] >= kth && logits[i] >= least && logits[i] - largest >= f.min_p;
    weights[i] = is_kept ? weight(logits[i]) : 0;
  }
  return weights;
}

bool holds(const std::vector<double>& weights, double number, int64_t token) {
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  const double below = std::accumulate(weights.begin(), weights.begin() + token, 0.0) / total;
  const double own = weights[static_cast<size_t>(token)] / total;
  return own > 0 && below - 1e-6 <= number && number <= below + own + 1e-6;
}

const std::vector<Filters> kFilters = {
    {0, 0, 1, -kInf},     {1, 0, 1, -kInf},      {0.3, 0, 1, -2},    {1e-300, 0, 1, -kInf},
    {1, 5, 1, -kInf},     {1, 900, 1, -kInf},    {1, 0, 0.9, -kInf}, {5, 0, 0.999, -kInf},
    {0.1, 0, 0.5, -kInf}, {1, 2000, 0.7, -kInf}, {2, 7, 0.8, -1},    {1, 1, 1, -kInf},
    {1, 0, 1e-9, -kInf},  {100, 0, 0.6, -kInf}};

template <class Sample>
void test_sample_tokens(const std::vector<DType>& dtypes, const std::vector<int>& vocab_sizes,
                        const std::vector<int>& gaps, const std::vector<Filters>& filters,
                        const Sample& sample) {
  const int num_rows = static_cast<int>(filters.size());
  for (DType dtype : dtypes) {
    for (int vocab_size : vocab_sizes) {
      for (int gap : gaps) {
        const int64_t stride = vocab_size + gap;
        Buffer logits(dtype, num_rows * stride);
        logits.fill(-4, 4);
        if (generator() % 2 == 0) {  // with ties
          for (int64_t i = 0; i < logits.numel(); ++i) logits.set(i, std::round(logits[i]));
        }
        if (generator() % 3 == 0) {  // few that are allowed
          for (int64_t i = 0; i < logits.numel(); ++i) {
            if (i % stride > 3) logits.set(i, -kInf);
          }
        }
        std::vector<double> temperatures, top_p, min_p;
        std::vector<int32_t> top_k, prompt_lens, seq_lens;
        std::vector<int64_t> seeds, streams;
        for (const Filters& f : filters) {
          temperatures.push_back(f.temperature);
          top_k.push_back(f.top_k);
          top_p.push_back(f.top_p);
          min_p.push_back(f.min_p);
          seeds.push_back(static_cast<int64_t>(generator()));
          streams.push_back(static_cast<int64_t>(generator() % 9));
          prompt_lens.push_back(3);
          seq_lens.push_back(3 + static_cast<int32_t>(generator() % 99));
        }
        // Every other row stands in a float32 buffer of its own.
        std::vector<float> adjusted;
        std::vector<int32_t> adjusted_rows;
        for (int row = 0; row < num_rows; ++row) {
          adjusted_rows.push_back(row % 2 == 0 ? -1 : row / 2);
          for (int i = 0; row % 2 != 0 && i < vocab_size; ++i) {
            adjusted.push_back(static_cast<float>(logits[row * stride + i]));
            logits.set(row * stride + i, kNan);
          }
        }
        std::vector<int64_t> out(static_cast<size_t>(num_rows), -99);
        sample({dtype, out.data(), logits.data(), adjusted.data(), adjusted_rows.data(),
                temperatures.data(), top_k.data(), top_p.data(), min_p.data(), seeds.data(),
                streams.data(), seq_lens.data(), prompt_lens.data(), stride, vocab_size, num_rows,
                vocab_size});
        for (size_t row = 0; row < filters.size(); ++row) {
          std::vector<double> values(static_cast<size_t>(vocab_size));
          for (size_t i = 0; i < values.size(); ++i) {
            values[i] = row % 2 == 0
                            ? logits[static_cast<int64_t>(row) * stride + static_cast<int64_t>(i)]
                            : adjusted[row / 2 * values.size() + i];
          }
          CHECK(out[row] >= 0 && out[row] < vocab_size);
          const Filters& f = filters[row];
          if (f.temperature == 0) {
            CHECK(out[row] == std::max_element(values.begin(), values.end()) - values.begin());
            continue;
          }
          const double number = uniform_number(static_cast<uint64_t>(seeds[row]),
                                               static_cast<uint64_t>(seq_lens[row] - 3),
                                               static_cast<uint64_t>(streams[row]));
          bool is_right = false;  // weights that reach top_p to the last digit may be taken or not
          for (double slack : {0.0, 1e-6, -1e-6}) {
            Filters g = f;
            if (f.top_p < 1) g.top_p *= 1 + slack;
            is_right |= holds(kept_weights(values, g), number, out[row]);
          }
          CHECK(is_right);
        }
      }
    }
  }
}

// Rows without what top-k drops, as ranks that share the vocabulary send them, give the same
// tokens.
template <class Sample>
void test_rows_of_candidates(const std::vector<int>& vocab_sizes, const Sample& sample) {
  constexpr int kRows = 6;
  for (DType dtype : kDTypes) {
    for (int vocab_size : vocab_sizes) {
      Buffer logits(dtype, kRows * vocab_size);
      logits.fill(-4, 4);
      for (int64_t i = 0; i < logits.numel() / 2; ++i) logits.set(i, std::round(2 * logits[i]) / 2);
      const std::vector<double> temperatures = {1, 0.5, 1, 0, 5, 1}, top_p = {1, 1, 0.7, 1, 0.9, 1};
      const std::vector<double> min_p = {-kInf, -1, -kInf, -kInf, -kInf, -2};
      const std::vector<int32_t> top_k = {20, 3, 50, 1, 128, 128}, lens(kRows, 5);
      const std::vector<int64_t> streams(kRows, 0);
      std::vector<int64_t> seeds(kRows), whole(kRows, -98), out(kRows, -99);
      for (int64_t& seed : seeds) seed = static_cast<int64_t>(generator());
      const auto draw = [&](std::vector<int64_t>& tokens) {
        sample({dtype, tokens.data(), logits.data(), nullptr, nullptr, temperatures.data(),
                top_k.data(), top_p.data(), min_p.data(), seeds.data(), streams.data(), lens.data(),
                lens.data(), vocab_size, 0, kRows, vocab_size});
      };
      draw(whole);
      for (int64_t row = 0; row < kRows; ++row) {
        std::vector<double> sorted;
        for (int64_t i = 0; i < vocab_size; ++i) sorted.push_back(logits[row * vocab_size + i]);
        std::sort(sorted.begin(), sorted.end(), std::greater<>());
        const double kth = sorted[static_cast<size_t>(top_k[static_cast<size_t>(row)] - 1)];
        for (int64_t i = row * vocab_size; i < (row + 1) * vocab_size; ++i) {
          if (logits[i] < kth) logits.set(i, -kInf);
        }
      }
      draw(out);
      CHECK(out == whole);
    }
  }
}

template <class Adjust>
void test_adjust_logits(const Adjust& adjust) {
  constexpr int kRows = 3, kMaxLen = 40;
  for (DType dtype : kDTypes) {
    for (int vocab_size : {4, 33, 1500}) {
      const int64_t stride = vocab_size + 2;
      Buffer logits(dtype, 5 * stride);
      logits.fill(-4, 4);
      const std::vector<int32_t> rows = {4, 0, 2}, slots = {1, -1, 0}, prompt_lens = {2, 1, 3};
      std::vector<int32_t> seq_lens(5, -1);
      std::vector<int64_t> new_token_ids(5, -1);
      std::vector<int32_t> token_ids(2 * kMaxLen, -7);
      std::vector<std::vector<int32_t>> said(kRows);
      for (int r = 0; r < kRows; ++r) {
        const int32_t length = prompt_lens[r] + static_cast<int32_t>(generator() % 20) + 2;
        for (int32_t i = 0; i < length; ++i) {
          said[r].push_back(static_cast<int32_t>(generator() % 4));
          if (slots[r] >= 0 && i + 1 < length) token_ids[slots[r] * kMaxLen + i] = said[r][i];
        }
        seq_lens[rows[r]] = length;
        new_token_ids[rows[r]] = said[r].back();
      }
      const std::vector<float> repetition = {1.5f, 2, 1}, frequency = {0.5f, 3, 0},
                               presence = {0, 3, 0.25f};
      const std::vector<int32_t> bias_starts = {0, 1, 1, 3}, bias_tokens = {2, 0, 3};
      const std::vector<float> bias_values = {1.5f, -2, 0.5f};
      const std::vector<int32_t> allowed_starts = {0, 0, 2, 2}, allowed_tokens = {1, 3};
      const std::vector<int32_t> end_starts = {0, 1, 1, 2}, end_tokens = {3, 1};
      const std::vector<int32_t> min_tokens = {99, 99, 1};
      // The second word of the last row is what it is about to say.
      const std::vector<int32_t> word_starts = {0, 1, 1, 3}, word_token_starts = {0, 1, 2, 5};
      const std::vector<int32_t> word_tokens = {1, 0, said[2][said[2].size() - 2], said[2].back(),
                                                2};
      std::vector<float> out(kRows * static_cast<size_t>(stride), kNan);
      adjust({dtype,
              out.data(),
              logits.data(),
              rows.data(),
              token_ids.data(),
              slots.data(),
              new_token_ids.data(),
              seq_lens.data(),
              prompt_lens.data(),
              repetition.data(),
              frequency.data(),
              presence.data(),
              {bias_starts.data(), bias_tokens.data()},
              bias_values.data(),
              {allowed_starts.data(), allowed_tokens.data()},
              {end_starts.data(), end_tokens.data()},
              min_tokens.data(),
              word_starts.data(),
              {word_token_starts.data(), word_tokens.data()},
              stride,
              stride,
              kMaxLen,
              kRows,
              vocab_size});
      for (int r = 0; r < kRows; ++r) {
        if (slots[r] >= 0) {
          CHECK(token_ids[slots[r] * kMaxLen + static_cast<int>(said[r].size()) - 1] ==
                said[r].back());
        }
        for (int token = 0; token < vocab_size; ++token) {
          double expected = logits[rows[r] * stride + token];
          const auto count = [&](int from) {
            return static_cast<double>(std::count(said[r].begin() + from, said[r].end(), token));
          };
          if (slots[r] >= 0) {
            if (count(0) > 0) {
              expected = expected > 0 ? expected / repetition[r] : expected * repetition[r];
            }
            expected -= frequency[r] * count(prompt_lens[r]);
            expected -= count(prompt_lens[r]) > 0 ? presence[r] : 0;
          }
          if (r == 0) expected = token == 1 || token == 3 ? -kInf : expected + (token == 2) * 1.5;
          if (r == 1) expected = token == 1 || token == 3 ? expected : -kInf;
          if (r == 2) {
            expected = token == 0 || token == 2 ? -kInf : expected + (token == 3) * 0.5;
          }
          const double got = out[static_cast<size_t>(r * stride + token)];
          CHECK(got == expected || std::abs(got - expected) < 1e-5);
        }
      }
    }
  }
}

}  // namespace
}  // namespace nano_vllm::test

int main() {
  using namespace nano_vllm;
  using namespace nano_vllm::test;
  test_philox();
  test_sample_tokens({std::begin(kDTypes), std::end(kDTypes)},
                     {1, 7, 8, 1023, 1024, 1025, 3000, 20'000}, {0, 1}, kFilters,
                     [](const SampleTokensParams& p) { cpu::sample_tokens(p); });
  test_rows_of_candidates({200, 1025, 20'000},
                          [](const SampleTokensParams& p) { cpu::sample_tokens(p); });
  test_adjust_logits([](const AdjustLogitsParams& p) { cpu::adjust_logits(p); });
  // Fibers are slow: what is quick to find, and what the whole row is searched for.
  const auto sample = [](const SampleTokensParams& p) { cuda::sample_tokens(p, nullptr); };
  test_sample_tokens({DType::kBFloat16}, {1000}, {0},
                     {{0, 0, 1, -kInf}, {1, 0, 1, -1}, {1, 5, 0.8, -kInf}}, sample);
  test_sample_tokens({DType::kFloat16}, {5001}, {0},
                     {{1, 900, 1, -kInf}, {0.1, 0, 0.5, -kInf}, {5, 0, 0.999, -kInf}}, sample);
  test_rows_of_candidates({200, 4100}, sample);
  test_adjust_logits([](const AdjustLogitsParams& p) { cuda::adjust_logits(p, nullptr); });
  return report_checks();
}
