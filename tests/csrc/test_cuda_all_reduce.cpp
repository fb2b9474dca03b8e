// The CUDA all_reduce on a CPU, see cuda_on_cpu/cuda_runtime.h: ranks that make many calls one
// behind the other, some of them much slower than others, what they send arriving in any order that
// the kernels do not forbid.
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

constexpr AllReduceWay kWays[] = {AllReduceWay::kOneShot, AllReduceWay::kTwoShot,
                                  AllReduceWay::kPlain};

// The number of a call behind so many others, of which the first has a number.
uint32_t number_of_call(uint32_t first, int others) {
  for (; others > 0; --others) first = first == ~0u ? 2 : first + 1;
  return first;
}

template <class T>
bool same_bits(const T* a, const std::vector<T>& b) {
  return b.empty() || std::memcmp(a, b.data(), b.size() * sizeof(T)) == 0;
}

// One call on all ranks; what it gives lies in common memory, by rank.
template <class T>
struct Call {
  int num_rows, hidden_size;
  AllReduceWay way;
  bool is_in_place, has_norm;
  std::vector<std::vector<T>> inputs;
  std::vector<T> residual, weight;
  T *outs, *residuals;

  size_t numel() const { return static_cast<size_t>(num_rows) * hidden_size; }
  int64_t bytes() const { return static_cast<int64_t>(numel() * sizeof(T)); }
  size_t common_bytes() const { return inputs.size() * numel() * sizeof(T) + 1; }

  Call(int num_ranks, int rows, int size)
      : num_rows(rows),
        hidden_size(size),
        way(kWays[generator() % 3]),
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

  // What is sent plainly looks like flags of another call.
  void look_like(uint32_t call) {
    for (std::vector<T>& input : inputs) {
      for (size_t i = 0; i < input.size(); i += sizeof(call) / sizeof(T)) {
        std::memcpy(static_cast<void*>(&input[i]), &call, sizeof(call));
      }
    }
  }

  void run(AllReduceParams params) {
    const size_t at = static_cast<size_t>(params.rank) * numel();
    const std::vector<T>& input = inputs[static_cast<size_t>(params.rank)];
    params.num_rows = num_rows, params.hidden_size = hidden_size;
    params.way = way;
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
  const PeerBufferParts parts(max_bytes, num_ranks);
  const auto size = static_cast<size_t>(parts.end);
  const uint32_t last_call = ~0u - static_cast<uint32_t>(between(0, 4));  // they are counted beyond
  AllReduceParams params{};
  params.dtype = dtype, params.num_ranks = num_ranks, params.max_bytes = max_bytes;
  for (int rank = 0; rank < num_ranks; ++rank) {
    params.buffers[rank] = cuda_on_cpu::allocate_common(size + kGuardBytes);
    *static_cast<uint32_t*>(params.buffers[rank]) = last_call;
  }
  int num_calls = 0;
  bool is_any_plain = false, is_any_flagged = false;
  for (Call<T>& call : calls) {
    if (call.numel() == 0) continue;  // it is not counted
    ++num_calls;
    if (call.bytes() > max_one_shot_bytes(max_bytes, num_ranks)) call.way = AllReduceWay::kTwoShot;
    const bool is_plain = call.way == AllReduceWay::kPlain;
    (is_plain ? is_any_plain : is_any_flagged) = true;
    const uint32_t later = number_of_call(last_call, num_calls + 2);
    if (is_plain && later < 100 && generator() % 2) call.look_like(later);
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
    const auto is_unused = [&](int64_t begin, int64_t end) {
      return std::count(buffer + begin, buffer + end, 0) == end - begin;
    };
    CHECK(is_unused(parts.end, parts.end + kGuardBytes));
    CHECK(is_any_plain || is_unused(parts.flags, parts.flagged_vecs));
    CHECK(is_any_plain || is_unused(parts.plain_vecs, parts.end));
    CHECK(is_any_flagged || is_unused(parts.flagged_vecs, parts.plain_vecs));
    cuda_on_cpu::free_common(buffer, size + kGuardBytes);
  }
}

template <class T>
void test_random(DType dtype, double error, int num_ranks) {
  constexpr int kSize = cuda::Vec<T>::kSize;
  std::vector<Call<T>> calls;
  // All ways, or now and then one alone.
  const auto only = generator() % 12;
  for (int i = between(5, 12); i > 0; --i) {
    const int vecs = generator() % 3 == 0 ? between(1, 3) : between(1, 70);
    const int rows = generator() % 3 == 0 ? between(0, 20) : between(1, 4);
    calls.emplace_back(num_ranks, rows, vecs * kSize);
    if (only < 3) calls.back().way = kWays[only];
  }
  test_calls(dtype, error, num_ranks, std::move(calls));
}

// Rows of more vectors than a block has threads.
void test_long_rows() {
  std::vector<Call<float>> calls;
  for (const AllReduceWay way : {kWays[0], kWays[1], kWays[1], kWays[2], kWays[2]}) {
    calls.emplace_back(2, 1, 4 * 1100);
    calls.back().way = way;
  }
  test_calls(DType::kFloat32, 2e-6, 2, std::move(calls));
}

void test_sizes_of_buffers() {
  for (int num_ranks = 2; num_ranks <= kMaxPeers; ++num_ranks) {
    for (int64_t max_bytes : {16, 160, 1 << 20, 12345680}) {
      const int64_t share = 16 * share_of_rank(max_bytes, num_ranks);
      CHECK(share * num_ranks >= max_bytes);
      CHECK((share - 16 * kChunkVecs) * num_ranks < max_bytes);
      CHECK(max_one_shot_bytes(max_bytes, num_ranks) <= 2 * share);
      const PeerBufferParts parts(max_bytes, num_ranks);
      CHECK(parts.flagged_vecs - parts.flags == 2 * num_ranks * 4 * kMaxAllReduceBlocks);
      CHECK(parts.plain_vecs - parts.flagged_vecs == 2 * num_ranks * 2 * 2 * share);
      CHECK(parts.end == size_of_peer_buffer(max_bytes, num_ranks));
      CHECK(parts.flags % 16 == 0 && parts.flagged_vecs % 16 == 0 && parts.plain_vecs % 16 == 0);
      CHECK(max_one_shot_bytes(max_bytes, num_ranks) % 16 == 0);
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
