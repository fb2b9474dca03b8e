// The CUDA all_reduce on a CPU, see cuda_on_cpu/cuda_runtime.h: ranks that make many calls one
// behind the other, some of them much slower than others, what they send arriving in any order.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "common/cuda_common.cuh"
#include "distributed/all_reduce.h"

namespace nano_vllm::test {
namespace {

std::mt19937 generator;
constexpr size_t kGuardBytes = 4096;
constexpr float kEps = 1e-5f;

int between(int low, int high) { return low + static_cast<int>(generator() % (high - low + 1)); }

template <class T>
std::vector<T> random_values(size_t count) {
  std::normal_distribution<float> normal;
  std::vector<T> values(count);
  for (T& value : values) value = cuda::from_float<T>(normal(generator));
  return values;
}

template <class T>
bool same_bits(const T* a, const std::vector<T>& b) {
  return b.empty() || std::memcmp(a, b.data(), b.size() * sizeof(T)) == 0;
}

// One call on all ranks; what it gives lies in common memory, by rank.
template <class T>
struct Call {
  int num_rows, hidden_size;
  bool is_two_shot, is_in_place, has_norm;
  std::vector<std::vector<T>> inputs;
  std::vector<T> residual, weight;
  T *outs, *residuals;

  size_t numel() const { return static_cast<size_t>(num_rows) * hidden_size; }
  int64_t bytes() const { return static_cast<int64_t>(numel() * sizeof(T)); }
  size_t common_bytes() const { return inputs.size() * numel() * sizeof(T) + 1; }

  Call(int num_ranks, int rows, int size)
      : num_rows(rows),
        hidden_size(size),
        is_two_shot(generator() % 2),
        is_in_place(generator() % 2),
        has_norm(generator() % 2),
        residual(random_values<T>(numel())),
        weight(random_values<T>(static_cast<size_t>(size))) {
    for (int rank = 0; rank < num_ranks; ++rank) inputs.push_back(random_values<T>(numel()));
    outs = reinterpret_cast<T*>(cuda_on_cpu::allocate_common(common_bytes()));
    residuals = reinterpret_cast<T*>(cuda_on_cpu::allocate_common(common_bytes()));
    std::memset(static_cast<void*>(outs), 0xff, common_bytes());  // NaN
  }

  void free() {
    cuda_on_cpu::free_common(reinterpret_cast<unsigned char*>(outs), common_bytes());
    cuda_on_cpu::free_common(reinterpret_cast<unsigned char*>(residuals), common_bytes());
  }

  void run(AllReduceParams params) {
    const size_t at = static_cast<size_t>(params.rank) * numel();
    const std::vector<T>& input = inputs[static_cast<size_t>(params.rank)];
    params.num_rows = num_rows, params.hidden_size = hidden_size;
    params.is_two_shot = is_two_shot;
    params.out = outs + at;
    params.input = input.data();
    if (is_in_place) {
      std::copy(input.begin(), input.end(), outs + at);
      params.input = outs + at;
    }
    if (has_norm) {
      std::copy(residual.begin(), residual.end(), residuals + at);
      params.residual = residuals + at;
      params.weight = weight.data();
      params.eps = kEps;
    }
    cuda::all_reduce(params, nullptr);
  }

  // Sums to the bit, and near those in double; the norm near that in double, and the same bits for
  // all ranks.
  void check(double error) const {
    std::vector<T> expected(numel());
    for (size_t i = 0; i < numel(); ++i) {
      float sum = 0;
      double exact = 0, size = 0;
      for (const std::vector<T>& input : inputs) {
        sum += cuda::to_float(input[i]);
        exact += cuda::to_float(input[i]), size += std::abs(cuda::to_float(input[i]));
      }
      expected[i] = cuda::from_float<T>(sum);
      if (std::abs(cuda::to_float(expected[i]) - exact) > error * size)
        CHECK(!"near the exact sum");
      if (!has_norm) continue;
      sum = cuda::to_float(expected[i]) + cuda::to_float(residual[i]);
      expected[i] = cuda::from_float<T>(sum);
    }
    for (size_t rank = 0; rank < inputs.size(); ++rank) {
      CHECK(same_bits((has_norm ? residuals : outs) + rank * numel(), expected));
      CHECK(same_bits(outs + rank * numel(), std::vector<T>(outs, outs + numel())));
    }
    if (has_norm) check_norm(expected, error);
  }

  void check_norm(const std::vector<T>& sums, double error) const {
    // Numbers below it, subnormal ones, are all as far from each other.
    constexpr double kSmallest = std::is_same_v<T, __half> ? 0x1p-14 : 0x1p-126;
    for (size_t i = 0; i < numel(); i += static_cast<size_t>(hidden_size)) {
      double squares = 0, largest = 0;
      for (int j = 0; j < hidden_size; ++j) squares += std::pow(cuda::to_float(sums[i + j]), 2);
      const double inverse = 1 / std::sqrt(squares / hidden_size + kEps);
      for (int j = 0; j < hidden_size; ++j) {
        const double exact =
            cuda::to_float(sums[i + j]) * inverse * cuda::to_float(weight[static_cast<size_t>(j)]);
        const double off = std::abs(cuda::to_float(outs[i + j]) - exact);
        largest = std::max(largest, off / std::max(std::abs(exact), kSmallest));
        if (std::isnan(off)) largest = 1;
      }
      CHECK(largest < 2 * error);
    }
  }
};

template <class T>
void test_calls(DType dtype, double error, int num_ranks, std::vector<Call<T>> calls) {
  int64_t max_bytes = 16 * between(1, 200);
  for (const Call<T>& call : calls) max_bytes = std::max(max_bytes, call.bytes());
  const int64_t size = size_of_peer_buffer(max_bytes, num_ranks);
  AllReduceParams params{};
  params.dtype = dtype, params.num_ranks = num_ranks, params.max_bytes = max_bytes;
  for (int rank = 0; rank < num_ranks; ++rank) {
    params.buffers[rank] = cuda_on_cpu::allocate_common(static_cast<size_t>(size) + kGuardBytes);
    // Calls are counted beyond the largest number.
    *static_cast<uint32_t*>(params.buffers[rank]) = ~0u - 4;
  }
  for (Call<T>& call : calls) {
    if (call.bytes() > max_one_shot_bytes(max_bytes, num_ranks)) call.is_two_shot = true;
  }
  CHECK(cuda_on_cpu::run_devices(num_ranks, static_cast<unsigned>(generator()), [&](int rank) {
    AllReduceParams own = params;
    own.rank = rank;
    for (Call<T>& call : calls) call.run(own);
  }));
  for (Call<T>& call : calls) {
    call.check(error);
    call.free();
  }
  for (int rank = 0; rank < num_ranks; ++rank) {
    auto* buffer = static_cast<unsigned char*>(params.buffers[rank]);
    CHECK(std::count(buffer + size, buffer + size + kGuardBytes, 0) == kGuardBytes);
    cuda_on_cpu::free_common(buffer, static_cast<size_t>(size) + kGuardBytes);
  }
}

template <class T>
void test_random(DType dtype, double error, int num_ranks) {
  constexpr int kSize = cuda::Vec<T>::kSize;
  std::vector<Call<T>> calls;
  for (int i = between(5, 12); i > 0; --i) {
    const int vecs = generator() % 3 == 0 ? between(1, 3) : between(1, 70);
    const int rows = generator() % 3 == 0 ? between(0, 20) : between(1, 4);
    calls.emplace_back(num_ranks, rows, vecs * kSize);
  }
  test_calls(dtype, error, num_ranks, std::move(calls));
}

// Rows of more vectors than a block has threads.
void test_long_rows() {
  std::vector<Call<float>> calls;
  for (int i = 0; i < 3; ++i) calls.emplace_back(2, 1, 4 * 1100);
  for (int i = 0; i < 3; ++i) calls[static_cast<size_t>(i)].is_two_shot = i > 0;
  test_calls(DType::kFloat32, 2e-6, 2, std::move(calls));
}

void test_sizes_of_buffers() {
  for (int num_ranks = 2; num_ranks <= kMaxPeers; ++num_ranks) {
    for (int64_t max_bytes : {16, 160, 1 << 20, 12345680}) {
      const int64_t share = 16 * share_of_rank(max_bytes, num_ranks);
      CHECK(share * num_ranks >= max_bytes);
      CHECK((share - 16 * kChunkVecs) * num_ranks < max_bytes);
      CHECK(max_one_shot_bytes(max_bytes, num_ranks) <= 2 * share);
    }
    CHECK(max_one_shot_bytes(1 << 20, 2) == 1 << 20);
  }
}

}  // namespace
}  // namespace nano_vllm::test

// test_cuda_all_reduce [rounds [seed]]
int main(int argc, char** argv) {
  using namespace nano_vllm;
  using namespace nano_vllm::test;
  const unsigned seed = argc > 2 ? std::strtoul(argv[2], nullptr, 10) : std::random_device()();
  generator.seed(seed);
  std::printf("seed %u\n", seed);
  test_sizes_of_buffers();
  test_long_rows();
  for (int round = argc > 1 ? std::atoi(argv[1]) : 1; round > 0; --round) {
    for (int num_ranks = 2; num_ranks <= kMaxPeers; ++num_ranks) {
      test_random<float>(DType::kFloat32, 1e-6, num_ranks);
      test_random<__half>(DType::kFloat16, 1e-3, num_ranks);
      test_random<__nv_bfloat16>(DType::kBFloat16, 8e-3, num_ranks);
    }
  }
  return report_checks();
}
