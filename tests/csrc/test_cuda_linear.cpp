// The CUDA products of many rows on a CPU, see cuda_on_cpu/cuda_runtime.h: against plain loops in
// double.
#include <cmath>
#include <numeric>
#include <vector>

#include "attention_case.h"
#include "cuda_runtime.h"
#include "layers/qkv_linear.h"

namespace nano_vllm::test {
namespace {

int between(int low, int high) { return low + static_cast<int>(generator() % (high - low + 1)); }

template <class T>
T choice(const std::vector<T>& from) {
  return from[generator() % from.size()];
}

// Input and weight of a product, in rows with gaps, which are NaN.
struct Product {
  DType dtype;
  int num_rows, in_features, weight_rows;
  int64_t input_stride = in_features + 8 * between(0, 2);
  int64_t weight_stride = in_features + 8 * between(0, 2);
  Buffer input{dtype, num_rows * input_stride}, weight{dtype, weight_rows * weight_stride};

  Product(DType dtype, int num_rows, int in_features, int weight_rows)
      : dtype(dtype), num_rows(num_rows), in_features(in_features), weight_rows(weight_rows) {
    const double bound = 3 / std::sqrt(in_features);
    for (int i = 0; i < in_features; ++i) {
      for (int row = 0; row < num_rows; ++row) input.set(row * input_stride + i, uniform(-1, 1));
      for (int row = 0; row < weight_rows; ++row) {
        weight.set(row * weight_stride + i, uniform(-bound, bound));
      }
    }
  }

  LinearParams params() {
    LinearParams p{};
    p.dtype = dtype, p.input = input.data(), p.weight = weight.data();
    p.input_stride_row = input_stride, p.weight_stride_row = weight_stride;
    p.num_rows = num_rows, p.in_features = in_features, p.out_features = weight_rows;
    return p;
  }

  std::vector<double> sums(int row) const {
    std::vector<double> x(static_cast<size_t>(in_features)), out(static_cast<size_t>(weight_rows));
    for (int i = 0; i < in_features; ++i) x[static_cast<size_t>(i)] = input[row * input_stride + i];
    for (int n = 0; n < weight_rows; ++n) {
      for (int i = 0; i < in_features; ++i) {
        out[static_cast<size_t>(n)] += x[static_cast<size_t>(i)] * weight[n * weight_stride + i];
      }
    }
    return out;
  }
};

bool is_close(double x, double expected, DType dtype) {
  const double unit = dtype == DType::kFloat8E4M3 ? 0.08 : dtype == DType::kFloat16 ? 1e-3 : 8e-3;
  return std::abs(x - expected) <= unit * (0.2 + std::abs(expected));
}

void test_gated(DType dtype, int num_rows, int in_features, int out_features) {
  Product product(dtype, num_rows, in_features, 2 * out_features);
  const int64_t stride = out_features + 8;
  Buffer out(dtype, (num_rows + 1) * stride);
  LinearParams p = product.params();
  p.out = out.data(), p.out_stride_row = stride, p.out_features = out_features, p.is_gated = true;
  cuda::gated_linear(p, nullptr);
  int wrong = 0;
  for (int row = 0; row <= num_rows; ++row) {
    std::vector<double> sums;
    if (row < num_rows) sums = product.sums(row);
    for (int i = 0; i < stride; ++i) {
      const double x = out[row * stride + i];
      if (row == num_rows || i >= out_features) {
        wrong += !std::isnan(x);  // nobody's
      } else {
        const double gate = sums[static_cast<size_t>(i)];
        const double up = sums[static_cast<size_t>(out_features + i)];
        wrong += !is_close(x, gate / (1 + std::exp(-gate)) * up, dtype);
      }
    }
  }
  CHECK(wrong == 0);
}

struct Heads {
  int num_heads, num_kv_heads, head_dim;
};

void test_qkv(DType dtype, DType cache_dtype, int num_rows, int in_features, Heads heads) {
  constexpr int kMaxPosition = 20;
  const auto [num_heads, num_kv_heads, dim] = heads;
  const int num_all = num_heads + 2 * num_kv_heads, half = dim / 2;
  Product product(dtype, num_rows, in_features, num_all * dim);
  Buffer bias(dtype, num_all * dim), norms[2] = {{dtype, dim}, {dtype, dim}};
  for (Buffer* buffer : {&bias, &norms[0], &norms[1]}) buffer->fill(-2, 2);
  const bool has_bias = between(0, 1), has_norm[2] = {between(0, 1) == 1, between(0, 1) == 1};
  std::vector<float> angles(static_cast<size_t>(kMaxPosition * dim));
  for (float& x : angles) x = static_cast<float>(uniform(-1, 1));
  std::vector<int64_t> positions, slots;
  const int block_size = choice<int>({8, 16, 24}), num_blocks = num_rows / block_size + 2;
  for (int i = 0; i < num_blocks * block_size; ++i) slots.push_back(i);
  std::shuffle(slots.begin(), slots.end(), generator);
  slots.resize(static_cast<size_t>(num_rows));
  for (int64_t& slot : slots) {
    positions.push_back(between(0, kMaxPosition - 1));
    if (between(1, 8) == 1) slot = choice<int64_t>({-1, -(int64_t{1} << 40)});
  }
  std::vector<float> scales[2];
  for (auto& scale : scales) {
    for (int i = 0; i < num_kv_heads; ++i) scale.push_back(static_cast<float>(uniform(0.1, 2)));
  }
  const bool is_float8 = cache_dtype == DType::kFloat8E4M3;

  // Heads first: [num_blocks, num_kv_heads, block_size, dim].
  const int64_t cache_numel = int64_t{num_blocks} * num_kv_heads * block_size * dim;
  Buffer caches[2] = {{cache_dtype, cache_numel}, {cache_dtype, cache_numel}};
  const int64_t query_stride = num_heads * dim + 8;
  Buffer query(dtype, (num_rows + 1) * query_stride);

  QkvLinearParams p{};
  p.linear = product.params();
  p.linear.bias = has_bias ? bias.data() : nullptr;
  RotaryReshapeAndCacheParams& rotary = p.rotary;
  rotary.query = query.data(), rotary.query_stride_token = query_stride;
  rotary.query_stride_head = dim, rotary.num_heads = num_heads, rotary.rotary_dim = dim;
  rotary.positions = positions.data(), rotary.cos_sin_cache = angles.data();
  rotary.query_norm_weight = has_norm[0] ? norms[0].data() : nullptr;
  rotary.key_norm_weight = has_norm[1] ? norms[1].data() : nullptr;
  rotary.norm_eps = 1e-5f, rotary.is_neox = true;
  ReshapeAndCacheParams& kv = rotary.kv;
  kv.dtype = dtype, kv.cache_dtype = cache_dtype;
  kv.key_cache = caches[0].data(), kv.value_cache = caches[1].data();
  kv.key_scale = is_float8 ? scales[0].data() : nullptr;
  kv.value_scale = is_float8 ? scales[1].data() : nullptr;
  kv.slot_mapping = slots.data();
  kv.key_cache_stride_block = kv.value_cache_stride_block =
      int64_t{num_kv_heads} * block_size * dim;
  kv.key_cache_stride_token = kv.value_cache_stride_token = dim;
  kv.key_cache_stride_head = kv.value_cache_stride_head = block_size * dim;
  kv.num_tokens = num_rows, kv.num_kv_heads = num_kv_heads, kv.head_dim = dim;
  kv.block_size = block_size;
  cuda::qkv_linear(p, nullptr);

  int wrong = 0;
  int64_t num_cached = 0;
  for (int row = 0; row < num_rows; ++row) {
    std::vector<double> x = product.sums(row);
    for (int head = 0; head < num_all; ++head) {
      double* const own = x.data() + head * dim;
      const int kind = (head >= num_heads) + (head >= num_heads + num_kv_heads);
      if (has_bias) {
        for (int i = 0; i < dim; ++i) own[i] += bias[head * dim + i];
      }
      if (kind < 2 && has_norm[kind]) {
        const double squares = std::inner_product(own, own + dim, own, 0.0);
        for (int i = 0; i < dim; ++i) own[i] *= norms[kind][i] / std::sqrt(squares / dim + 1e-5);
      }
      const float* const cos = angles.data() + positions[static_cast<size_t>(row)] * dim;
      for (int i = 0; i < half && kind < 2; ++i) {
        const double first = own[i], second = own[half + i];
        own[i] = first * cos[i] - second * cos[half + i];
        own[half + i] = second * cos[i] + first * cos[half + i];
      }
      const int64_t slot = slots[static_cast<size_t>(row)];
      if (kind > 0 && slot < 0) continue;
      const int kv_head = head - num_heads - (kind == 2 ? num_kv_heads : 0);
      for (int i = 0; i < dim; ++i) {
        if (kind == 0) {
          wrong += !is_close(query[row * query_stride + head * dim + i], own[i], dtype);
          continue;
        }
        const int64_t at =
            ((slot / block_size * num_kv_heads + kv_head) * block_size + slot % block_size) * dim +
            i;
        const double scale = is_float8 ? scales[kind - 1][static_cast<size_t>(kv_head)] : 1;
        wrong += !is_close(caches[kind - 1][at] * scale, own[i], cache_dtype);
        ++num_cached;
      }
    }
    for (int64_t i = num_heads * dim; i < query_stride; ++i) {
      wrong += !std::isnan(query[row * query_stride + i]);
    }
  }
  for (int64_t i = 0; i < query_stride; ++i)
    wrong += !std::isnan(query[num_rows * query_stride + i]);
  for (Buffer& cache : caches) {
    for (int64_t i = 0; i < cache_numel; ++i) num_cached -= !std::isnan(cache[i]);
  }
  CHECK(wrong == 0);
  CHECK(num_cached == 0);  // nothing is written besides
}

void test_all() {
  for (DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    // One block and clusters of two; few steps of K, as many as stages, more; tiles that end early.
    for (int num_rows : {40, 128, 129, 530}) {
      test_gated(dtype, num_rows, 8 * between(1, 20), 32 * between(1, 5));
      test_gated(dtype, num_rows, 64 * between(4, 6), 32 * between(4, 9));
      for (int dim : {64, 128}) {
        const int num_kv_heads = between(1, 2);
        const Heads heads{num_kv_heads * between(1, 3), num_kv_heads, dim};
        const int in_features = choice<int>({8 * between(1, 20), 64 * between(4, 5)});
        test_qkv(dtype, dtype, num_rows, in_features, heads);
        test_qkv(dtype, DType::kFloat8E4M3, num_rows, in_features, heads);
      }
    }
  }
}

}  // namespace
}  // namespace nano_vllm::test

// test_cuda_linear [seed]
int main(int argc, char** argv) {
  using namespace nano_vllm::test;
  const unsigned seed =
      argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : std::random_device()();
  generator.seed(seed);
  // As a device among others would: now and then a warp stays behind.
  CHECK(cuda_on_cpu::run_devices(1, seed, [](int) { test_all(); }));
  return report_checks();
}
