// CUDA qkv_linear for many rows, on Hopper: a tile has whole heads, and a thread, of two of its
// rows, the elements that are turned with each other. Queries, keys and values are written once,
// where attention reads them, in place of written, read and written.
#include "cache/reshape_and_cache.cuh"
#include "layers/qkv_linear.h"
#include "layers/rms_norm.cuh"
#include "layers/rotary.cuh"
#include "layers/tiled_linear_sm90.cuh"

namespace nano_vllm::cuda {
namespace qkv_linear_sm90 {  // not anonymous: for other architectures most of it is unused

using namespace tiled_linear_sm90;

template <class T_, class Cache, int kHeadDim>
struct RotaryAndCache {
  using T = T_;
  static constexpr int kHeads = 2 * kHalfColumns / kHeadDim;  // of a tile
  static constexpr int kHeadChunks = kHeadDim / kChunkColumns;
  static constexpr int kPairChunks = kHeadChunks / 2;  // which are turned with as many behind them

  RotaryReshapeAndCacheParams p;
  const T* bias;  // or nullptr

  // Of a row, for this lane's elements of a head's first half.
  struct Angles {
    float cos[kPairChunks][8], sin[kPairChunks][8];
  };

  // A thread's elements of a head, of its two rows.
  using Rows = float[2][kHeadChunks][8];

  // Where a row's key and value go; a slot that is nowhere has no block.
  struct Place {
    int block, row;
  };

  // Of a thread's two rows.
  struct Early {
    int position[2];
    int64_t slot[2];
    Place place[2];
    Angles angles[2];
  };

  __device__ Halves halves(int column_tile) const {
    const int first = column_tile * kChunks;
    return {first, first + kChunks / 2};
  }

  __device__ Early start(int row) const {
    Early early;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool is_token = row + 8 * i < p.kv.num_tokens;
      early.position[i] = is_token ? static_cast<int>(p.positions[row + 8 * i]) : 0;
      early.slot[i] = is_token ? p.kv.slot_mapping[row + 8 * i] : -1;
    }
    return early;
  }

  __device__ void prepare(Early& early) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      early.angles[i] = load_angles(early.position[i]);
      // Slots fit 32 bits; a negative one is nowhere.
      const uint32_t size = p.kv.block_size, slot = static_cast<uint32_t>(early.slot[i]);
      early.place[i] = {early.slot[i] < 0 ? -1 : static_cast<int>(slot / size),
                        static_cast<int>(slot % size)};
    }
  }

  __device__ void finish(const Early& early, int row, int column_tile, const Sums& sums) const {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const int head = column_tile * kHeads + h;
      if (head >= p.num_heads + 2 * p.kv.num_kv_heads) break;
      Rows x;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < kHeadChunks; ++j) read_sums(x[i][j], sums, h * kHeadChunks + j, i);
      }
      if (bias != nullptr) add_bias(x, bias + head * kHeadDim + lane_column());
      if (head < p.num_heads + p.kv.num_kv_heads) {
        const void* const weight = head < p.num_heads ? p.query_norm_weight : p.key_norm_weight;
        if (weight != nullptr) normalise(x, static_cast<const T*>(weight) + lane_column());
        turn(x, early.angles);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) write(x[i], row + 8 * i, early.place[i], head);
    }
  }

 private:
  // Past the first-level cache: no other thread of the tile wants them.
  __device__ Angles load_angles(int position) const {
    const float* const cos = p.cos_sin_cache + int64_t{position} * kHeadDim + lane_column();
    Angles angles;
#pragma unroll
    for (int i = 0; i < kPairChunks; ++i) {
#pragma unroll
      for (int e = 0; e < 8; e += 4) {
        const float* const at = cos + kChunkColumns * i + e;
        put(angles.cos[i] + e, load_past_cache(at));
        put(angles.sin[i] + e, load_past_cache(at + kHeadDim / 2));
      }
    }
    return angles;
  }

  __device__ static void put(float* to, const float4& x) {
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
  }

  __device__ static void add_bias(Rows& x, const T* bias) {
#pragma unroll
    for (int j = 0; j < kHeadChunks; ++j) {
      float added[8];
      to_floats(added, load_vec(bias + kChunkColumns * j));
#pragma unroll
      for (int e = 0; e < 8; ++e) x[0][j][e] += added[e], x[1][j][e] += added[e];
    }
  }

  // A head's elements lie in four neighbouring lanes.
  __device__ void normalise(Rows& x, const T* weight) const {
    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sums[4] = {};
#pragma unroll
      for (int j = 0; j < kHeadChunks; ++j) {
#pragma unroll
        for (int e = 0; e < 8; ++e) sums[e % 4] += x[i][j][e] * x[i][j][e];
      }
      float sum = sums[0] + sums[1] + (sums[2] + sums[3]);
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      inverse[i] = inverse_rms(sum, kHeadDim, p.norm_eps);
    }
#pragma unroll
    for (int j = 0; j < kHeadChunks; ++j) {
      float factors[8];
      to_floats(factors, load_vec(weight + kChunkColumns * j));
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        x[0][j][e] *= inverse[0] * factors[e];
        x[1][j][e] *= inverse[1] * factors[e];
      }
    }
  }

  __device__ static void turn(Rows& x, const Angles (&angles)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < kPairChunks; ++j) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const float first = x[i][j][e], second = x[i][j + kPairChunks][e];
          const float cos = angles[i].cos[j][e], sin = angles[i].sin[j][e];
          x[i][j][e] = rotate(first, second, cos, -sin);
          x[i][j + kPairChunks][e] = rotate(second, first, cos, sin);
        }
      }
    }
  }

  __device__ void write(const float (&x)[kHeadChunks][8], int token, Place place, int head) const {
    const int kv_head = head - p.num_heads, value_head = kv_head - p.kv.num_kv_heads;
    const bool is_query = kv_head < 0, is_key = value_head < 0;
    if (is_query ? token >= p.kv.num_tokens : place.block < 0) return;
    T* const query =
        static_cast<T*>(p.query) + token * p.query_stride_token + head * p.query_stride_head;
    Cache* const cached =
        is_key
            ? static_cast<Cache*>(p.kv.key_cache) + place.block * p.kv.key_cache_stride_block +
                  place.row * p.kv.key_cache_stride_token + kv_head * p.kv.key_cache_stride_head
            : static_cast<Cache*>(p.kv.value_cache) + place.block * p.kv.value_cache_stride_block +
                  place.row * p.kv.value_cache_stride_token +
                  value_head * p.kv.value_cache_stride_head;
    float scale = 1.0f;
    if constexpr (!std::is_same_v<T, Cache>) {
      if (!is_query) {
        scale = is_key ? scale_of_head(p.kv.key_scale, kv_head)
                       : scale_of_head(p.kv.value_scale, value_head);
      }
    }
#pragma unroll
    for (int i = 0; i < kHeadChunks; ++i) {
      const Vec<T> vec = from_floats<T>(x[i]);
      const int at = lane_column() + kChunkColumns * i;
      if constexpr (std::is_same_v<T, Cache>) {
        store_vec((is_query ? query : cached) + at, vec);
      } else if (is_query) {
        store_vec(query + at, vec);
      } else {
        store_quantized<true>(cached + at, vec, scale, Vec<T>::kSize);
      }
    }
  }
};

template <class T, class Cache, int kHeadDim>
void run_for(const QkvLinearParams& params, cudaStream_t stream) {
  const LinearParams& linear = params.linear;
  const RotaryAndCache<T, Cache, kHeadDim> epilogue{params.rotary,
                                                    static_cast<const T*>(linear.bias)};
  run("qkv_linear", linear, linear.out_features, ceil_div(linear.out_features, 2 * kHalfColumns),
      epilogue, stream);
}

}  // namespace qkv_linear_sm90

// The kernel that is saved takes some 400 / in_features of the product's time, and what it does is
// done while others multiply.
bool qkv_linear_pays(int num_rows, int in_features, int out_features) {
  using namespace qkv_linear_sm90;
  const double busy = busy_share(num_rows, ceil_div(out_features, 2 * kHalfColumns));
  return busy * (1 + 400.0 / in_features) > 1;
}

void qkv_linear(const QkvLinearParams& params, cudaStream_t stream) {
  using namespace qkv_linear_sm90;
  const auto run_in = [&](auto element, auto cached) {
    using T = decltype(element);
    using Cache = decltype(cached);
    params.rotary.kv.head_dim == 64 ? run_for<T, Cache, 64>(params, stream)
                                    : run_for<T, Cache, 128>(params, stream);
  };
  const auto run_as = [&](auto element) {
    params.rotary.kv.cache_dtype == DType::kFloat8E4M3 ? run_in(element, Float8E4M3{})
                                                       : run_in(element, element);
  };
  params.linear.dtype == DType::kFloat16 ? run_as(__half{}) : run_as(__nv_bfloat16{});
}

}  // namespace nano_vllm::cuda
