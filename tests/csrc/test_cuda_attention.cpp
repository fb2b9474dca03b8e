// The CUDA attention kernels on a CPU, see cuda_on_cpu/cuda_runtime.h: every kernel there is, on
// small batches that cut the work up in many ways.
#include "attention_case.h"
#include "cuda_runtime.h"

namespace nano_vllm::test {
namespace {

// Weights are rounded to 16 bits before they multiply values, and queries meet keys in float32.
double error_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4e-6 : dtype == DType::kFloat16 ? 1e-3 : 8e-3;
}

void attend(PagedAttentionParams params) {
  std::vector<float> workspace(static_cast<size_t>(paged_attention_workspace_numel(
                                   params.num_seqs, params.num_heads, params.head_dim)),
                               kNan);
  params.workspace = workspace.data();
  params.workspace_numel = static_cast<int64_t>(workspace.size());
  params.num_tokens = 0;
  for (int s = 0; s < params.num_seqs; ++s) params.num_tokens = params.query_start_loc[s + 1];
  params.num_tokens += 2;  // the padding of AttentionInputs
  params.is_planned = generator() % 2 == 0;
  if (params.is_planned) cuda::plan_attention(params, nullptr);
  if (params.is_planned && generator() % 4 == 0) {  // a layer before, of the same plan
    std::vector<char> out(4 * (params.num_tokens * params.out_stride_token +
                               params.num_heads * params.out_stride_head));
    PagedAttentionParams before = params;
    before.out = out.data();
    cuda::paged_attention(before, nullptr);
  }
  cuda::paged_attention(params, nullptr);
}

int between(int low, int high) { return low + static_cast<int>(generator() % (high - low + 1)); }

template <class T>
T choice(const std::vector<T>& from) {
  return from[generator() % from.size()];
}

AttentionCase random_case(DType dtype) {
  AttentionCase c{};
  c.dtype = dtype;
  c.num_kv_heads = between(1, 3);
  c.num_heads = c.num_kv_heads * choice<int>({1, 3, 4, 7, 16});
  c.head_dim = choice<int>({64, 80, 96, 128, 192, 256});
  c.block_size = choice<int>({8, 16, 24, 64, 128, 256});
  c.sliding_window = choice<int>({0, 0, 0, between(1, 300)});
  c.softcap = choice<float>({0, 0, 2.5f});
  c.strided = choice<int>({0, 1});
  c.float8 = choice<int>({0, 1});
  // Weights beyond what float32 holds, were they not rescaled; whose scores it has not exactly.
  if (dtype != DType::kFloat32) c.loudest = choice<double>({1, 1, 20, 200});
  const int longest = choice<int>({70, 70, 400});
  for (int i = between(1, 5); i > 0; --i) {
    const int seq_len = between(1, longest);
    const int query_len = choice<int>({1, 1, between(0, 8), between(1, seq_len)});
    c.sequences.push_back({std::min(query_len, seq_len), seq_len});
  }
  return c;
}

// Groups of decodes that begin alike, their members in any order, among others that do not.
AttentionCase random_shared_prefix(DType dtype) {
  AttentionCase c = random_case(dtype);
  c.sliding_window = choice<int>({0, 0, 0, 50});
  c.sequences.clear();
  const int count = between(2, choice<int>({8, 60}));
  std::vector<int> last_leader;
  for (int s = 0; s < count; ++s) {
    int leader = s, tokens = 0;
    if (!last_leader.empty() && generator() % 4 != 0) {
      leader = choice(last_leader), tokens = c.prefix_lens[leader];
    } else if (generator() % 2 == 0) {
      tokens = c.block_size * between(1, 600 / c.block_size);
      last_leader.push_back(s);
    }
    c.prefix_leaders.push_back(leader);
    c.prefix_lens.push_back(tokens);
    const int seq_len = tokens + between(1, 90);
    // Without a prefix in common any number of queries will do.
    const int query_len = tokens > 0 ? 1 : std::min(seq_len, choice<int>({0, 1, 3, 20}));
    c.sequences.push_back({query_len, seq_len});
  }
  return c;
}

void test_random_cases(int count) {
  for (int i = 0; i < count; ++i) {
    for (DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
      test_attention_case(random_case(dtype), error_of(dtype), attend);
      test_attention_case(random_shared_prefix(dtype), error_of(dtype), attend);
    }
  }
}

// Long enough to be split, in one sequence and in many; prefills of several tiles beside decodes.
void test_large_cases() {
  const DType bf16 = DType::kBFloat16;
  const double error = error_of(bf16);
  for (bool float8 : {false, true}) {
    test_attention_case({bf16, 4, 1, 64, 16, {{1, 3000}}, 0, 0, false, float8}, error, attend);
    const std::vector<Sequence> mixed = {{1, 1500}, {1, 30}, {8, 700}, {1, 1}};
    test_attention_case({bf16, 4, 2, 128, 16, mixed, 1000, 0, false, float8}, error, attend);
  }
  std::vector<Sequence> many;
  for (int i = 0; i < 40; ++i) many.push_back({between(0, 2), between(2, 90)});
  test_attention_case({bf16, 2, 1, 64, 16, many}, error, attend);
  for (bool float8 : {false, true}) {
    test_attention_case({bf16, 4, 1, 64, 16, {{200, 333}, {1, 40}, {9, 9}}, 0, 0, false, float8},
                        error, attend);
    test_attention_case({bf16, 4, 2, 128, 32, {{150, 300}, {70, 70}}, 90, 3.0f, true, float8},
                        error, attend);
  }
}

}  // namespace
}  // namespace nano_vllm::test

// test_cuda_attention [capability, 0 for both [rounds [seed]]]: so many rounds of random batches, 0
// for the large ones, by default 4 and the large ones.
int main(int argc, char** argv) {
  using namespace nano_vllm::test;
  const auto argument = [&](int i, int otherwise) {
    return argc > i ? std::atoi(argv[i]) : otherwise;
  };
  const int only = argument(1, 0), count = argument(2, 4);
  const unsigned seed = argc > 3 ? static_cast<unsigned>(argument(3, 0)) : std::random_device()();
  generator.seed(seed);
  // As a device among others would: now and then a warp stays behind.
  CHECK(cuda_on_cpu::run_devices(1, seed, [&](int) {
    for (int capability : {90, 80}) {
      if (only != 0 && only != capability) continue;
      cuda_on_cpu::capability = capability;
      test_random_cases(count);
      if (argc <= 2 || count == 0) test_large_cases();
    }
  }));
  return report_checks();
}
