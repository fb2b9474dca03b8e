// Attention on small tensors against plain loops in double: shapes, strides, NaN in every slot that
// must not be read.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "attention/paged_attention.h"
#include "check.h"
#include "common/simd_convert.h"

namespace nano_vllm::test {

using cpu::BFloat16;
using cpu::Float16;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

inline std::mt19937 generator(1);

inline double uniform(double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(generator);
}

// Conversions one at a time and by arithmetic, not by the bit tricks under test.
inline double to_double(DType dtype, const void* element) {
  if (dtype == DType::kFloat32) return *static_cast<const float*>(element);
  if (dtype == DType::kFloat8E4M3) {
    const int bits = *static_cast<const uint8_t*>(element), exponent = bits >> 3 & 15;
    const int mantissa = exponent == 0 ? bits & 7 : 8 + (bits & 7);
    if ((bits & 0x7f) == 0x7f) return NAN;
    return std::ldexp(bits & 0x80 ? -mantissa : mantissa, std::max(exponent, 1) - 10);
  }
  const uint16_t bits = *static_cast<const uint16_t*>(element);
  const int mantissa_bits = dtype == DType::kFloat16 ? 10 : 7;
  const int bias = dtype == DType::kFloat16 ? 15 : 127;
  const int exponent = (bits & 0x7fff) >> mantissa_bits;
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  double value;
  if (exponent == 2 * bias + 1) {
    value = mantissa == 0 ? INFINITY : NAN;
  } else if (exponent == 0) {
    value = std::ldexp(mantissa, 1 - bias - mantissa_bits);
  } else {
    value = std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
  }
  return bits & 0x8000 ? -value : value;
}

// A run of elements of any dtype. Those never set are NaN.
class Buffer {
 public:
  Buffer(DType dtype, int64_t numel)
      : dtype_(dtype), bytes_(static_cast<size_t>(numel) * size_of(dtype), 0xff) {}

  void* data() { return bytes_.data(); }
  int64_t numel() const { return static_cast<int64_t>(bytes_.size() / size_of(dtype_)); }
  double operator[](int64_t i) const { return to_double(dtype_, bytes_.data() + offset(i)); }

  void set(int64_t i, double value) {
    const auto store = [&](auto element) {
      using T = decltype(element);
      T out[4];
      cpu::simd::store(out, cpu::simd::broadcast<4>(static_cast<float>(value)));
      std::memcpy(bytes_.data() + offset(i), out, sizeof(T));
    };
    if (dtype_ == DType::kFloat8E4M3) {
      store(Float8E4M3{});
    } else {
      cpu::dispatch_dtype(dtype_, store);
    }
  }
  void fill(double low, double high) {
    for (int64_t i = 0; i < numel(); ++i) set(i, uniform(low, high));
  }
  bool operator==(const Buffer& other) const { return bytes_ == other.bytes_; }
  bool same_bits(int64_t i, const Buffer& other, int64_t j, int64_t count) const {
    return std::memcmp(bytes_.data() + offset(i), other.bytes_.data() + offset(j),
                       static_cast<size_t>(count) * size_of(dtype_)) == 0;
  }

 private:
  size_t offset(int64_t i) const { return static_cast<size_t>(i) * size_of(dtype_); }

  DType dtype_;
  std::vector<unsigned char> bytes_;
};

// `error` is for float32, relative to the larger of the value and `scale`; rounding to 16 bits
// comes on top.
inline bool is_close(DType dtype, double got, double expected, double error, double scale) {
  const double rounding = dtype == DType::kFloat32   ? 0
                          : dtype == DType::kFloat16 ? 0x1p-11
                                                     : 0x1p-8;
  const double smallest = dtype == DType::kFloat16 ? 0x1p-25 : 0;
  return std::abs(got - expected) <= error * std::max(std::abs(expected), scale) +
                                         rounding * 1.01 * std::abs(expected) + smallest;
}

struct Sequence {
  int query_len, seq_len;
};

struct AttentionCase {
  DType dtype;
  int num_heads, num_kv_heads, head_dim, block_size;
  std::vector<Sequence> sequences;
  int sliding_window = 0;
  float softcap = 0;
  bool strided = false;  // a fused QKV tensor and a cache with keys and values in turns
  bool float8 = false;   // caches, with different scales of the heads
  // Of each sequence, as PagedAttentionParams has them; none if empty.
  std::vector<int32_t> prefix_leaders = {}, prefix_lens = {};
  double loudest = 1;  // some tokens' keys are up to so many times as large

  DType cache_dtype() const { return float8 ? DType::kFloat8E4M3 : dtype; }
};

constexpr int32_t kNowhere = 1 << 30;

// The tensors of a case; block tables in random order, slots that hold no token NaN. The entries of
// blocks that nobody may read lead far out of the cache.
struct AttentionInputs {
  explicit AttentionInputs(const AttentionCase& c)
      : query(c.dtype, 0), keys(c.cache_dtype(), 0), values(c.cache_dtype(), 0) {
    PagedAttentionParams& p = params;
    p.dtype = c.dtype, p.cache_dtype = c.cache_dtype();
    p.num_seqs = static_cast<int32_t>(c.sequences.size());
    p.num_heads = c.num_heads, p.num_kv_heads = c.num_kv_heads;
    p.head_dim = c.head_dim, p.block_size = c.block_size;
    p.sliding_window = c.sliding_window, p.softcap = c.softcap;
    p.scale = 1 / std::sqrt(static_cast<float>(c.head_dim));

    leaders = c.prefix_leaders, prefix_lens = c.prefix_lens;

    int max_blocks = 1, num_blocks = 1;
    start.push_back(0);
    for (const Sequence& s : c.sequences) {
      const int blocks = (s.seq_len + c.block_size - 1) / c.block_size;
      max_blocks = std::max(max_blocks, blocks);
      num_blocks += blocks;
      start.push_back(start.back() + s.query_len);
      lens.push_back(s.seq_len);
      p.max_query_len = std::max(p.max_query_len, s.query_len);
      p.max_seq_len = std::max(p.max_seq_len, s.seq_len);
    }
    std::vector<int32_t> order(num_blocks);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), generator);
    tables.assign(c.sequences.size() * (max_blocks + 1), kNowhere);
    p.block_tables_stride = max_blocks + 1;

    num_tokens = start.back() + 2;  // two rows of padding
    const int64_t heads = c.strided ? c.num_heads + 2 * c.num_kv_heads : c.num_heads;
    p.query_stride_head = c.head_dim, p.query_stride_token = heads * c.head_dim;
    p.out_stride_head = c.head_dim + (c.strided ? 3 : 0),
    p.out_stride_token = p.out_stride_head * c.num_heads;
    query = Buffer(c.dtype, num_tokens * p.query_stride_token);
    for (int64_t i = 0; i < start.back() * p.query_stride_token; ++i) query.set(i, uniform(-2, 2));

    const int64_t plane = int64_t{c.block_size} * c.num_kv_heads * c.head_dim;
    // Blocks of [block_size, heads, dim], or, strided, of [heads, block_size, dim].
    p.key_stride_token = c.strided ? c.head_dim : c.num_kv_heads * c.head_dim;
    p.key_stride_head = c.strided ? c.block_size * c.head_dim : c.head_dim;
    p.key_stride_block = c.strided ? 2 * plane : plane;
    p.value_stride_token = p.key_stride_token, p.value_stride_head = p.key_stride_head;
    p.value_stride_block = p.key_stride_block;
    keys = Buffer(c.cache_dtype(), num_blocks * p.key_stride_block);
    values = Buffer(c.cache_dtype(), num_blocks * p.value_stride_block);
    for (int head = 0; c.float8 && head < c.num_kv_heads; ++head) {
      key_scales.push_back(static_cast<float>(uniform(0.01, 0.1)));
      value_scales.push_back(static_cast<float>(uniform(0.1, 2)));
    }
    int used = 0;
    for (size_t s = 0; s < c.sequences.size(); ++s) {
      int32_t* table = tables.data() + s * p.block_tables_stride;
      int shared = 0;
      if (!c.prefix_lens.empty() && c.prefix_leaders[s] != static_cast<int>(s)) {
        shared = c.prefix_lens[s];
        std::copy_n(tables.data() + c.prefix_leaders[s] * p.block_tables_stride,
                    shared / c.block_size, table);
      }
      for (int t = shared; t < c.sequences[s].seq_len; ++t) {
        if (t % c.block_size == 0) table[t / c.block_size] = order[used++];
        const bool is_loud = c.loudest > 1 && generator() % 8 == 0;
        const double loudness = is_loud ? uniform(1, c.loudest) : 1;
        for (int64_t i = 0; i < int64_t{c.num_kv_heads} * c.head_dim; ++i) {
          const int head = static_cast<int>(i / c.head_dim);
          const int64_t at = key_offset(s, t, head) + i % c.head_dim;
          keys.set(at, loudness * uniform(-2, 2) / scale_of(key_scales, head));
          values.set(at, uniform(-1, 1) / scale_of(value_scales, head));
        }
      }
    }
    for (size_t s = 0; s < c.sequences.size(); ++s) {
      const auto [query_len, seq_len] = c.sequences[s];
      const int first = seq_len - query_len - c.sliding_window + 1 - kReadBehindWindow;
      if (c.sliding_window > 0 && first > 0) {
        std::fill_n(tables.data() + s * p.block_tables_stride, first / c.block_size, kNowhere);
      }
    }
  }

  int64_t key_offset(size_t seq, int64_t t, int kv_head) const {
    const int64_t block = tables[seq * params.block_tables_stride + t / params.block_size];
    return block * params.key_stride_block + t % params.block_size * params.key_stride_token +
           kv_head * params.key_stride_head;
  }

  static float scale_of(const std::vector<float>& scales, int head) {
    return scales.empty() ? 1.0f : scales[head];
  }

  // By cpu:: or cuda::paged_attention.
  template <class Run>
  Buffer run(const Run& run) {
    Buffer out(params.dtype, num_tokens * params.out_stride_token);
    params.out = out.data(), params.query = query.data();
    params.key_cache = keys.data(), params.value_cache = values.data();
    params.key_scale = key_scales.empty() ? nullptr : key_scales.data();
    params.value_scale = value_scales.empty() ? nullptr : value_scales.data();
    params.block_tables = tables.data();
    params.query_start_loc = start.data(), params.seq_lens = lens.data();
    params.prefix_leaders = leaders.empty() ? nullptr : leaders.data();
    params.prefix_lens = prefix_lens.data();
    run(params);
    return out;
  }

  PagedAttentionParams params{};
  int64_t num_tokens;
  Buffer query, keys, values;
  std::vector<float> key_scales, value_scales;
  std::vector<int32_t> start, lens, tables, leaders, prefix_lens;
};

inline std::vector<double> attention_row(const AttentionInputs& in, size_t seq, int64_t token,
                                         int head) {
  const PagedAttentionParams& p = in.params;
  const int64_t position = in.lens[seq] - (in.start[seq + 1] - token);
  const int64_t first =
      p.sliding_window > 0 ? std::max<int64_t>(0, position - p.sliding_window + 1) : 0;
  const int kv_head = head / (p.num_heads / p.num_kv_heads);
  std::vector<double> scores;
  for (int64_t t = first; t <= position; ++t) {
    double score = 0;
    for (int d = 0; d < p.head_dim; ++d) {
      score += in.query[token * p.query_stride_token + head * p.query_stride_head + d] *
               in.keys[in.key_offset(seq, t, kv_head) + d];
    }
    score *= p.scale * in.scale_of(in.key_scales, kv_head);
    scores.push_back(p.softcap > 0 ? p.softcap * std::tanh(score / p.softcap) : score);
  }
  const double max = *std::max_element(scores.begin(), scores.end());
  double sum = 0;
  std::vector<double> out(p.head_dim, 0.0);
  for (int64_t t = first; t <= position; ++t) {
    const double weight = std::exp(scores[t - first] - max);
    sum += weight;
    for (int d = 0; d < p.head_dim; ++d)
      out[d] += weight * in.values[in.key_offset(seq, t, kv_head) + d];
  }
  for (double& x : out) x *= in.scale_of(in.value_scales, kv_head) / sum;
  return out;
}

// `error` as is_close has it.
template <class Run>
void test_attention_case(const AttentionCase& c, double error, const Run& run) {
  AttentionInputs in(c);
  const PagedAttentionParams& p = in.params;
  const Buffer out = in.run(run);
  bool close = true, untouched = true;
  for (size_t s = 0; s < c.sequences.size(); ++s) {
    for (int64_t token = in.start[s]; token < in.start[s + 1]; ++token) {
      for (int head = 0; head < c.num_heads; ++head) {
        const std::vector<double> expected = attention_row(in, s, token, head);
        for (int d = 0; d < c.head_dim; ++d) {
          const int64_t at = token * p.out_stride_token + head * p.out_stride_head + d;
          close = close && is_close(c.dtype, out[at], expected[d], error, 0.5);
        }
      }
    }
  }
  for (int64_t i = in.start.back() * p.out_stride_token; i < out.numel(); ++i) {
    untouched = untouched && std::isnan(out[i]);
  }
  CHECK(close);
  CHECK(untouched);
}

}  // namespace nano_vllm::test
