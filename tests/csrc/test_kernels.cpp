// The CPU kernels against plain loops in double: small shapes, edge lengths, strided tensors, NaN
// in every slot that must not be read.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "attention_case.h"
#include "cache/copy_blocks.h"
#include "cache/reshape_and_cache.h"
#include "cache/rotary_reshape_and_cache.h"
#include "layers/activation.h"
#include "layers/linear.h"
#include "layers/rms_norm.h"
#include "quantization/quantized_linear.h"

namespace nano_vllm::test {
namespace {

void set_threads([[maybe_unused]] int threads) {
#ifdef _OPENMP
  omp_set_num_threads(threads);
#endif
}

void attend(const PagedAttentionParams& params) { cpu::paged_attention(params); }

void test_attention() {
  constexpr double kError = 2e-6;
  const std::vector<Sequence> mixed = {{1, 1},   {1, 7}, {1, 8},  {1, 9}, {5, 5},
                                       {17, 40}, {0, 0}, {1, 64}, {1, 65}};
  for (DType dtype : kDTypes) {
    test_attention_case({dtype, 9, 3, 64, 8, mixed}, kError, attend);
    test_attention_case({dtype, 4, 4, 80, 16, mixed, 0, 0, true}, kError, attend);
    test_attention_case({dtype, 8, 1, 96, 16, mixed, 5}, kError, attend);
    test_attention_case({dtype, 4, 2, 128, 32, mixed, 0, 3.0f}, kError, attend);
    test_attention_case({dtype, 2, 1, 256, 16, {{3, 20}, {1, 300}}, 33, 20.0f, true}, kError,
                        attend);
    test_attention_case({dtype, 2, 2, 192, 256, {{1, 255}, {1, 256}, {2, 257}}}, kError, attend);
    test_attention_case({dtype, 64, 1, 64, 16, {{2, 70}}}, kError,
                        attend);  // more heads than rows of a task
    for (int head_dim : {64, 80, 96, 128, 192, 256}) {
      test_attention_case({dtype, 6, 3, head_dim, 16, mixed, 20, 0, head_dim % 64 != 0, true},
                          kError, attend);
    }
  }
  test_attention_case({DType::kFloat32, 2, 1, 64, 16, {{1, 1500}}}, kError, attend);
  test_attention_case({DType::kFloat32, 3, 1, 64, 16, {{130, 700}}, 100}, kError, attend);
}

// A row has the same bits alone as a decode, in a batch, and on any number of threads.
void test_attention_bits() {
  for (DType dtype : kDTypes) {
    for (int window : {0, 90}) {
      const AttentionCase c{dtype, 6, 2, 80, 16, {{40, 600}, {1, 333}, {70, 70}}, window};
      AttentionInputs in(c);
      set_threads(1);
      const Buffer whole = in.run(attend);
      const int64_t row_numel = in.params.out_stride_token;
      set_threads(3);
      CHECK(in.run(attend).same_bits(0, whole, 0, in.start.back() * row_numel));
      const std::vector<int32_t> start = in.start, lens = in.lens;
      bool same = true;
      for (size_t s = 0; s < c.sequences.size(); ++s) {
        for (int64_t token = start[s]; token < start[s + 1]; token += 3) {
          AttentionInputs one = in;
          one.start = {0, 1};
          one.lens = {static_cast<int32_t>(lens[s] - (start[s + 1] - token) + 1)};
          one.tables.erase(one.tables.begin(),
                           one.tables.begin() + s * in.params.block_tables_stride);
          one.query = Buffer(dtype, in.params.query_stride_token * 3);
          std::memcpy(one.query.data(),
                      static_cast<char*>(in.query.data()) + token * row_numel * size_of(dtype),
                      row_numel * size_of(dtype));
          one.params.num_seqs = 1, one.params.max_query_len = 1,
          one.params.max_seq_len = one.lens[0];
          one.num_tokens = 3;
          same = same && one.run(attend).same_bits(0, whole, token * row_numel, row_numel);
        }
      }
      CHECK(same);
    }
  }
  set_threads(2);
}

// --- linear ---

void test_linear() {
  for (DType dtype : kDTypes) {
    for (int k : {0, 1, 3, 8, 15, 64, 131, 576}) {
      for (int n : {1, 4, 7, 66}) {
        Buffer weight(dtype, n * (k + 5)), bias(dtype, n), input(dtype, 9 * (k + 2));
        for (int i = 0; i < n * k; ++i)
          weight.set(i / std::max(k, 1) * (k + 5) + i % std::max(k, 1), uniform(-1, 1));
        for (int i = 0; i < 9 * k; ++i)
          input.set(i / std::max(k, 1) * (k + 2) + i % std::max(k, 1), uniform(-1, 1));
        bias.fill(-1, 1);
        Buffer whole(dtype, 9 * (n + 3));
        for (int rows : {9, 1, 2, 3, 4, 5}) {
          Buffer out(dtype, 9 * (n + 3));
          const bool with_bias = rows != 5;
          cpu::linear({dtype, out.data(), input.data(), weight.data(),
                       with_bias ? bias.data() : nullptr, n + 3, k + 2, k + 5, rows, k, n});
          bool close = true, same = true;
          for (int row = 0; row < 9; ++row) {
            for (int column = 0; column < n + 3; ++column) {
              const double got = out[row * (n + 3) + column];
              if (row >= rows || column >= n) {
                close = close && std::isnan(got);
                continue;
              }
              double expected = with_bias ? bias[column] : 0;
              for (int i = 0; i < k; ++i)
                expected += input[row * (k + 2) + i] * weight[column * (k + 5) + i];
              close = close && is_close(dtype, got, expected, 1e-6, std::sqrt(k + 1.0));
            }
            same = same && (!with_bias || row >= rows || rows == 9 ||
                            out.same_bits(row * (n + 3), whole, row * (n + 3), n));
          }
          CHECK(close);
          CHECK(same);
          if (rows == 9) whole = out;
        }
      }
    }
  }
}

// Weights of random bits; inputs of 127 and multiples of it by a power of two, which are exact in
// 8 bits.
void test_quantized_linear() {
  for (DType dtype : kDTypes) {
    for (int bits : {4, 8}) {
      for (int n : {1, 16, 37}) {
        const int k = 96, groups = k / kGroupSize, blocks = (n + kPackedRows - 1) / kPackedRows;
        const int64_t bytes = packed_group_bytes(bits);
        std::vector<uint8_t> weight(static_cast<size_t>(blocks * groups * bytes));
        for (uint8_t& byte : weight) byte = static_cast<uint8_t>(generator());
        Buffer numbers(DType::kFloat16, 2 * kPackedRows);
        std::vector<double> scales, minima;  // [blocks, groups, 16]
        for (int group = 0; group < blocks * groups; ++group) {
          numbers.fill(-0.5, 0.5);
          std::memcpy(weight.data() + (group + 1) * bytes - 4 * kPackedRows, numbers.data(),
                      4 * kPackedRows);
          for (int i = 0; i < kPackedRows; ++i) {
            scales.push_back(numbers[i]), minima.push_back(numbers[kPackedRows + i]);
          }
        }
        const auto weight_at = [&](int row, int column) {
          const int group = row / kPackedRows * groups + column / kGroupSize;
          const int step = column % kGroupSize / 4, lane = row % kPackedRows * 4 + column % 4;
          const uint8_t* quants = weight.data() + group * bytes;
          const int quant = bits == 8 ? quants[step * 64 + lane]
                                      : quants[step / 2 * 64 + lane] >> step % 2 * 4 & 15;
          const auto at = static_cast<size_t>(group * kPackedRows + row % kPackedRows);
          return scales[at] * quant + minima[at];
        };
        for (int rows : {1, 2, 11}) {
          Buffer input(dtype, rows * (k + 1)), out(dtype, rows * (n + 2)), bias(dtype, n);
          for (int i = 0; i < rows * k; ++i) {
            const double exact = i % kGroupSize == 0 ? 127 : std::floor(uniform(-127, 128));
            input.set(i / k * (k + 1) + i % k, exact / 64);
          }
          bias.fill(-1, 1);
          cpu::quantized_linear({dtype, out.data(), input.data(), weight.data(), bias.data(), n + 2,
                                 k + 1, rows, k, n, bits});
          bool close = true;
          for (int row = 0; row < rows; ++row) {
            for (int column = 0; column < n + 2; ++column) {
              const double got = out[row * (n + 2) + column];
              if (column >= n) {
                close = close && std::isnan(got);
                continue;
              }
              double expected = bias[column];
              for (int i = 0; i < k; ++i) {
                expected += input[row * (k + 1) + i] * weight_at(column, i);
              }
              close = close && is_close(dtype, got, expected, 1e-5, 10 * bits * bits);
            }
          }
          CHECK(close);
        }
      }
    }
  }
}

// --- norm, activations ---

void test_rms_norm() {
  for (DType dtype : kDTypes) {
    for (int size : {1, 7, 8, 64, 100, 576}) {
      for (bool fused : {false, true}) {
        constexpr int kRows = 3, kHeads = 2;
        const int64_t stride_head = size + 1, stride_row = kHeads * stride_head + 2;
        Buffer input(dtype, kRows * stride_row), residual(dtype, kRows * stride_row),
            weight(dtype, size);
        input.fill(-3, 3), residual.fill(-3, 3), weight.fill(0, 2);
        const Buffer before = residual;
        Buffer out(dtype, kRows * stride_row);
        cpu::rms_norm({dtype, out.data(), input.data(), fused ? residual.data() : nullptr,
                       weight.data(), stride_row, stride_head, stride_row, stride_head, stride_row,
                       stride_head, kRows, kHeads, size, 1e-5f});
        bool close = true;
        for (int64_t i = 0; i < out.numel(); ++i) {
          const int64_t head = i % stride_row / stride_head, column = i % stride_row % stride_head;
          if (head >= kHeads || column >= size) {
            close = close && std::isnan(out[i]) && residual[i] == before[i];
            continue;
          }
          const int64_t start = i - column;
          double square = 0;
          for (int j = 0; j < size; ++j)
            square += std::pow(fused ? residual[start + j] : input[start + j], 2);
          const double x = fused ? residual[i] : input[i];
          const double expected = x / std::sqrt(square / size + 1e-5) * weight[column];
          close = close && is_close(dtype, out[i], expected, 1e-6, 1e-3);
          if (fused)
            close = close && is_close(dtype, residual[i], before[i] + input[i], 1e-7, 1e-3);
        }
        CHECK(close);
        Buffer in_place = input;
        if (!fused) {
          cpu::rms_norm({dtype, in_place.data(), in_place.data(), nullptr, weight.data(),
                         stride_row, stride_head, stride_row, stride_head, 0, 0, kRows, kHeads,
                         size, 1e-5f});
          CHECK(in_place.same_bits(0, out, 0, size));
        }
      }
    }
  }
}

double activation_of(Activation activation, double x) {
  switch (activation) {
    case Activation::kSilu:
      return x / (1 + std::exp(-x));
    case Activation::kGelu:
      return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case Activation::kGeluTanh:
      return x / (1 + std::exp(-2 * std::sqrt(2 / 3.14159265358979323846) *
                               (x + 0.044715 * x * x * x)));
  }
  return kNan;
}

void test_activation() {
  for (DType dtype : kDTypes) {
    for (Activation activation : {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh}) {
      for (int size : {1, 5, 16, 1030, 5000}) {
        Buffer input(dtype, 2 * (2 * size + 1)), out(dtype, 2 * (size + 2));
        input.fill(-10, 10);
        cpu::activation_and_mul(
            {dtype, activation, out.data(), input.data(), size + 2, 2 * size + 1, 2, size});
        bool close = true;
        for (int64_t i = 0; i < out.numel(); ++i) {
          const int64_t row = i / (size + 2), column = i % (size + 2);
          const int64_t gate = row * (2 * size + 1) + column;
          if (column >= size) {
            close = close && std::isnan(out[i]);
          } else {
            const double expected = activation_of(activation, input[gate]) * input[gate + size];
            // The tanh form rounds the exponent, a cubic of x.
            const double error = activation == Activation::kGeluTanh ? 4e-6 : 1e-6;
            close = close && is_close(dtype, out[i], expected, error, 1e-6);
          }
        }
        CHECK(close);
      }
    }
  }
}

// --- cache ---

void test_reshape_and_cache() {
  constexpr float kScales[] = {0.5f, 0.037f};
  for (DType dtype : kDTypes) {
    for (int variant = 0; variant < 6; ++variant) {
      const bool strided = variant % 2;
      const DType cache_dtype = variant < 2 ? dtype : DType::kFloat8E4M3;
      const float* scales = variant < 4 ? nullptr : kScales;
      constexpr int kTokens = 6, kHeads = 2, kHeadDim = 20, kBlockSize = 8, kBlocks = 3;
      const std::vector<int64_t> slots = {23, -1, 0, 7, 8, -5};
      const int64_t head = strided ? kHeadDim + 2 : kHeadDim,
                    token = kHeads * head + (strided ? 1 : 0);
      Buffer key(dtype, kTokens * token), value(dtype, kTokens * token);
      key.fill(-1, 1), value.fill(-1, 1);
      // Strided: [num_blocks, num_kv_heads, block_size, head_dim]
      const int64_t block = kBlockSize * kHeads * kHeadDim;
      const int64_t cache_token = strided ? kHeadDim : kHeads * kHeadDim;
      const int64_t cache_head = strided ? kBlockSize * kHeadDim : kHeadDim;
      Buffer keys(cache_dtype, kBlocks * block), values(cache_dtype, kBlocks * block);
      cpu::reshape_and_cache({dtype,         cache_dtype, key.data(),  value.data(), keys.data(),
                              values.data(), scales,      scales,      slots.data(), token,
                              head,          token,       head,        block,        cache_token,
                              cache_head,    block,       cache_token, cache_head,   kTokens,
                              kHeads,        kHeadDim,    kBlockSize});
      Buffer expected_keys(cache_dtype, kBlocks * block),
          expected_values(cache_dtype, kBlocks * block);
      for (int64_t i = 0; i < kTokens; ++i) {
        for (int64_t j = 0; slots[i] >= 0 && j < kHeads * kHeadDim; ++j) {
          const int64_t from = i * token + j / kHeadDim * head + j % kHeadDim;
          const int64_t to = slots[i] / kBlockSize * block + slots[i] % kBlockSize * cache_token +
                             j / kHeadDim * cache_head + j % kHeadDim;
          const double scale = scales == nullptr ? 1 : scales[j / kHeadDim];
          expected_keys.set(to, key[from] / scale);
          expected_values.set(to, value[from] / scale);
        }
      }
      CHECK(keys == expected_keys);
      CHECK(values == expected_values);
    }
  }
}

// Heads of rotary_dim + 4 elements, of which one more lies between two tokens.
struct RotaryInputs {
  static constexpr int kTokens = 5, kHeads = 3, kKvHeads = 2, kMaxPosition = 50, kBlockSize = 8;
  static constexpr int kBlocks = 2;
  DType dtype;
  int rotary_dim, head_dim = rotary_dim + 4;
  bool is_neox;
  std::vector<int64_t> positions = {0, 49, 7, 7, 21}, slots = {15, 0, -1, 8, 3};
  std::vector<float> angles = std::vector<float>(kMaxPosition * rotary_dim);
  Buffer query{dtype, kTokens * stride(kHeads)}, key{dtype, kTokens * stride(kKvHeads)},
      value{dtype, kTokens * stride(kKvHeads)};
  Buffer query_weight{dtype, head_dim}, key_weight{dtype, head_dim};

  RotaryInputs(DType dtype, int rotary_dim, bool is_neox)
      : dtype(dtype), rotary_dim(rotary_dim), is_neox(is_neox) {
    for (float& x : angles) x = static_cast<float>(uniform(-1, 1));
    for (Buffer* buffer : {&query, &key, &value, &query_weight, &key_weight}) buffer->fill(-2, 2);
  }

  int64_t stride(int heads) const { return int64_t{heads} * head_dim + 1; }
  // Heads first: [num_blocks, num_kv_heads, block_size, head_dim].
  Buffer cache() const {
    return Buffer(dtype, int64_t{kBlocks} * kKvHeads * kBlockSize * head_dim);
  }
  int64_t cached(int64_t slot, int64_t head, int64_t i) const {
    return ((slot / kBlockSize * kKvHeads + head) * kBlockSize + slot % kBlockSize) * head_dim + i;
  }

  void run(Buffer& keys, Buffer& values, bool with_norm) {
    const int64_t block = int64_t{kKvHeads} * kBlockSize * head_dim,
                  head = int64_t{kBlockSize} * head_dim;
    RotaryReshapeAndCacheParams p{};
    p.kv = {dtype,        dtype,
            key.data(),   value.data(),
            keys.data(),  values.data(),
            nullptr,      nullptr,
            slots.data(), stride(kKvHeads),
            head_dim,     stride(kKvHeads),
            head_dim,     block,
            head_dim,     head,
            block,        head_dim,
            head,         kTokens,
            kKvHeads,     head_dim,
            kBlockSize};
    p.query = query.data(), p.positions = positions.data(), p.cos_sin_cache = angles.data();
    p.query_norm_weight = with_norm ? query_weight.data() : nullptr;
    p.key_norm_weight = with_norm ? key_weight.data() : nullptr;
    p.query_stride_token = stride(kHeads), p.query_stride_head = head_dim;
    p.num_heads = kHeads, p.rotary_dim = rotary_dim, p.norm_eps = 1e-5f, p.is_neox = is_neox;
    cpu::rotary_reshape_and_cache(p);
  }

  // Element i of a head that begins at `start`, turned.
  double turned(const Buffer& heads, int64_t token, int64_t start, int64_t i) const {
    if (i >= rotary_dim) return heads[start + i];
    const int64_t half = rotary_dim / 2, pair = is_neox ? i % half : i / 2;
    const bool is_first = is_neox ? i < half : i % 2 == 0;
    const int64_t partner = i + (is_neox ? half : 1) * (is_first ? 1 : -1);
    const float* cos = angles.data() + positions[token] * rotary_dim;
    const double sin = cos[half + pair];
    return heads[start + i] * cos[pair] + heads[start + partner] * (is_first ? -sin : sin);
  }
};

void test_rotary_reshape_and_cache() {
  for (DType dtype : kDTypes) {
    for (int rotary_dim : {2, 6, 16, 22, 64, 80}) {
      for (bool is_neox : {false, true}) {
        RotaryInputs in(dtype, rotary_dim, is_neox);
        const RotaryInputs old = in;
        Buffer keys = in.cache(), values = in.cache();
        in.run(keys, values, false);
        bool right = in.key == old.key && in.value == old.value, untouched = true;
        for (int64_t token = 0; token < in.kTokens; ++token) {
          const int64_t end = (token + 1) * in.stride(in.kHeads) - 1;
          untouched = untouched && in.query[end] == old.query[end];
          for (int64_t i = 0; i < in.kHeads * in.head_dim; ++i) {
            const int64_t start = token * in.stride(in.kHeads) + i / in.head_dim * in.head_dim;
            right =
                right && is_close(dtype, in.query[start + i % in.head_dim],
                                  in.turned(old.query, token, start, i % in.head_dim), 1e-6, 0.5);
          }
        }
        CHECK(right);
        Buffer turned_keys = in.cache(), copied_values = in.cache();
        bool close = true;
        for (int64_t token = 0; token < in.kTokens; ++token) {
          for (int64_t i = 0; in.slots[token] >= 0 && i < in.kKvHeads * in.head_dim; ++i) {
            const int64_t start = token * in.stride(in.kKvHeads) + i / in.head_dim * in.head_dim;
            const int64_t at = in.cached(in.slots[token], i / in.head_dim, i % in.head_dim);
            close = close && is_close(dtype, keys[at],
                                      in.turned(in.key, token, start, i % in.head_dim), 1e-6, 0.5);
            turned_keys.set(at, keys[at]);
            copied_values.set(at, in.value[start + i % in.head_dim]);
          }
        }
        CHECK(close);
        CHECK(untouched);
        CHECK(keys == turned_keys);  // NaN in the other slots
        CHECK(values == copied_values);

        // With norms: the bits of rms_norm and of the op without.
        RotaryInputs in_one = old, in_two = old;
        Buffer keys_one = in.cache(), keys_two = in.cache();
        in_one.run(keys_one, values, true);
        const auto norm = [&](Buffer& heads, Buffer& weight, int count) {
          const int64_t row = in.stride(count), head = in.head_dim;
          cpu::rms_norm({dtype, heads.data(), heads.data(), nullptr, weight.data(), row, head, row,
                         head, 0, 0, in.kTokens, count, in.head_dim, 1e-5f});
        };
        norm(in_two.query, in_two.query_weight, in.kHeads);
        norm(in_two.key, in_two.key_weight, in.kKvHeads);
        in_two.run(keys_two, values, false);
        CHECK(in_one.query == in_two.query);
        CHECK(keys_one == keys_two);
      }
    }
  }
}

void test_copy_blocks() {
  constexpr int64_t kPlanes = 4, kBlocks = 6, kBlockBytes = 48;
  constexpr int64_t kPlaneStride = kBlocks * 64;
  std::vector<unsigned char> pool(kPlanes * kPlaneStride);
  for (unsigned char& byte : pool) byte = static_cast<unsigned char>(generator());
  std::vector<unsigned char> expected = pool;
  const std::vector<int64_t> mapping = {0, 5, 0, 2, 3, 1};
  for (int64_t plane = 0; plane < kPlanes; ++plane) {
    for (size_t pair = 0; pair < 3; ++pair) {
      std::copy_n(pool.begin() + plane * kPlaneStride + mapping[2 * pair] * 64, kBlockBytes,
                  expected.begin() + plane * kPlaneStride + mapping[2 * pair + 1] * 64);
    }
  }
  cpu::copy_blocks({pool.data(), pool.data(), mapping.data(), kPlaneStride, 64, kPlaneStride, 64,
                    kBlockBytes, kPlanes, 3});
  CHECK(pool == expected);
}

}  // namespace
}  // namespace nano_vllm::test

int main() {
  using namespace nano_vllm::test;
  set_threads(2);
  test_attention();
  test_attention_bits();
  test_linear();
  test_quantized_linear();
  test_rms_norm();
  test_activation();
  test_reshape_and_cache();
  test_rotary_reshape_and_cache();
  test_copy_blocks();
  return report_checks();
}
