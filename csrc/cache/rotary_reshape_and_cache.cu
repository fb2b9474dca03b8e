// CUDA rotary_reshape_and_cache: a thread has the same vector of a few heads of one token, which
// share its angles. All of a thread's loads are under way before it needs one: what depends on
// another load is the angles alone, on the position.
#include <algorithm>
#include <cstdint>

#include "cache/reshape_and_cache.cuh"
#include "cache/rotary_reshape_and_cache.h"
#include "common/error.h"
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "layers/rms_norm.cuh"
#include "layers/rotary.cuh"

namespace nano_vllm::cuda {
namespace {

constexpr int kNumThreads = 256;
constexpr int kVecsPerThread = 2;  // 32 bytes on their way for each thread

// A token's heads are numbered: first those of the query, then of the key, then of the value.
enum Kind { kQuery, kKey, kValue, kNumKinds };

// Where the heads of a kind come from and go. The kernel has the kinds in a table: to look one up
// is a single instruction, to choose among three is several. So is a product of 64-bit strides.
struct Heads {
  const void* source;
  void* destination;        // a row of a block of the cache; of a query, token and block are one
  const void* norm_weight;  // or nullptr
  const float* scale;       // [heads], what is divided by for a cache of float8; or nullptr
  uint32_t source_stride_token, source_stride_head;
  uint32_t stride_block, stride_row, stride_head;
  int32_t first;  // the number of the first head
};

struct Params : RotaryReshapeAndCacheParams {
  Heads kinds[kNumKinds];
};

__device__ inline int num_heads_of(const Params& p) { return p.num_heads + 2 * p.kv.num_kv_heads; }

__device__ inline int kind_of(const Params& p, int head) {
  return (head >= p.num_heads) + (head >= p.num_heads + p.kv.num_kv_heads);
}

// Elements up to the one at an index.
__device__ inline uint64_t offset_of(uint32_t stride, int index) {
  return uint64_t{stride} * static_cast<uint32_t>(index);
}

template <class T>
__device__ const T* source_of(const Heads& heads, int token, int head) {
  return static_cast<const T*>(heads.source) + offset_of(heads.source_stride_token, token) +
         offset_of(heads.source_stride_head, head - heads.first);
}

// T is the dtype of the query for a query, that of the cache for a key or value.
template <class T>
__device__ T* destination_of(const Heads& heads, int block, int row, int head) {
  return static_cast<T*>(heads.destination) + offset_of(heads.stride_block, block) +
         offset_of(heads.stride_row, row) + offset_of(heads.stride_head, head - heads.first);
}

// The vector from element `at` of a head. kIsAligned: past the end the last one, so that the load
// hangs on no condition and the next one need not wait.
template <bool kIsAligned, class T>
__device__ Vec<T> load_own(const T* head, int at, int head_dim) {
  return load_elements<kIsAligned>(head + (kIsAligned ? min(at, head_dim - Vec<T>::kSize) : at),
                                   head_dim - at);
}

// neox: what its elements are paired with, as far as they have partners.
template <bool kIsAligned, class T>
__device__ Vec<T> load_partners(const T* head, int at, int head_dim, int half) {
  if constexpr (kIsAligned) {
    return load_own<true>(head, at < half ? at + half : at < 2 * half ? at - half : at, head_dim);
  } else {
    Vec<T> partners{};
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize; ++i) {
      const int element = at + i;
      if (element < 2 * half) {
        partners.value[i] = head[element < half ? element + half : element - half];
      }
    }
    return partners;
  }
}

// The same where each vector of a head is a thread's own, of the threads along x: whole vectors.
template <class T>
__device__ Vec<T> shuffle_partners(const Vec<T>& own, int at, int half) {
  static_assert(sizeof(Vec<T>) == sizeof(uint4));
  const int distance = half / Vec<T>::kSize;
  const int lane = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x) % kWarpSize;
  const int partner = lane + (at < half ? distance : at < 2 * half ? -distance : 0);
  const uint4& words = reinterpret_cast<const uint4&>(own);
  const uint4 theirs = {__shfl_sync(~0u, words.x, partner), __shfl_sync(~0u, words.y, partner),
                        __shfl_sync(~0u, words.z, partner), __shfl_sync(~0u, words.w, partner)};
  return reinterpret_cast<const Vec<T>&>(theirs);
}

template <int kCount>
__device__ void load_floats(float (&floats)[kCount], const float* address) {
  if constexpr (kCount % Vec<float>::kSize == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += Vec<float>::kSize) {
      const Vec<float> vec = load_vec(address + i);
#pragma unroll
      for (int j = 0; j < Vec<float>::kSize; ++j) floats[i + j] = vec.value[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) floats[i] = address[i];
  }
}

// Of the elements from `at`, which is less than 2 * half.
template <bool kIsNeox, bool kIsAligned, int kSize>
__device__ void load_angles(float (&cos)[kSize], float (&sin)[kSize], const float* angles, int at,
                            int half) {
  if constexpr (kIsAligned && kIsNeox) {
    const float* pair = angles + (at < half ? at : at - half);
    load_floats(cos, pair);
    load_floats(sin, pair + half);
  } else if constexpr (kIsAligned) {
    float pair_cos[kSize / 2], pair_sin[kSize / 2];
    load_floats(pair_cos, angles + at / 2);
    load_floats(pair_sin, angles + half + at / 2);
#pragma unroll
    for (int i = 0; i < kSize; ++i) cos[i] = pair_cos[i / 2], sin[i] = pair_sin[i / 2];
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const int element = at + i;
      const int pair = !kIsNeox ? element / 2 : element < half ? element : element - half;
      cos[i] = element < 2 * half ? angles[pair] : 1.0f;
      sin[i] = element < 2 * half ? angles[half + pair] : 0.0f;
    }
  }
}

// Turns the elements that have partners.
template <bool kIsNeox, bool kIsAligned, class T>
__device__ Vec<T> rotate_vec(const Vec<T>& own, const Vec<T>& partners,
                             const float (&cos)[Vec<T>::kSize], const float (&sin)[Vec<T>::kSize],
                             int at, int half) {
  constexpr int kSize = Vec<T>::kSize;
  float x[kSize], theirs[kSize], turned[kSize];
  to_floats(x, own);
  if constexpr (kIsNeox) to_floats(theirs, partners);
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    // Vectors begin at even elements and, if aligned, lie in one half.
    const bool is_first = !kIsNeox ? i % 2 == 0 : (kIsAligned ? at : at + i) < half;
    const bool has_partner = kIsAligned || at + i < 2 * half;
    const float partner = kIsNeox ? theirs[i] : x[i ^ 1];
    turned[i] = has_partner ? rotate(x[i], partner, cos[i], is_first ? -sin[i] : sin[i]) : x[i];
  }
  return from_floats<T>(turned);
}

// The sum over the threads along x, in the order that rms_norm has: lanes without elements count
// as zeros there.
__device__ inline float head_sum(float x) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    if (offset < blockDim.x) x += __shfl_xor_sync(~0u, x, offset);
  }
  return x;
}

// Resident on an SM at least: the registers are for half of the threads it can have. Heads of two
// vectors a thread take more, and without alignment nothing is quick.
template <int kHeadVecs, bool kIsAligned>
constexpr int kMinBlocks = kIsAligned && kHeadVecs == 1 ? 4 : 1;

// Grid: blocks that run at the same time, each for every gridDim.x-th blockDim.z tokens, x shares
// of a token's heads. The threads along x, a power of two of one warp's, have one vector each of a
// head, or kHeadVecs where a head has more than 32; those along y have the heads, several each.
template <class T, class Cache, int kHeadVecs, bool kIsNeox, bool kHasNorm, bool kIsAligned>
__global__ void __launch_bounds__(kNumThreads, kMinBlocks<kHeadVecs, kIsAligned>)
    rotary_reshape_and_cache_kernel(Params p) {
  constexpr int kSize = Vec<T>::kSize, kHeads = kVecsPerThread / kHeadVecs;
  constexpr bool kShuffles = kIsNeox && kIsAligned && kHeadVecs == 1;
  allow_next_kernel();
  wait_for_last_kernel();
  const int token_step = gridDim.x * blockDim.z;
  int token = blockIdx.x * blockDim.z + threadIdx.z;
  if (token >= p.kv.num_tokens) return;  // a warp has but one token: all of its threads leave
  const int first_head = blockIdx.y * blockDim.y + threadIdx.y;
  const int head_step = gridDim.y * blockDim.y;
  const int num_heads = num_heads_of(p), head_dim = p.kv.head_dim, half = p.rotary_dim / 2;
  int at[kHeadVecs];
#pragma unroll
  for (int v = 0; v < kHeadVecs; ++v) at[v] = (v * blockDim.x + threadIdx.x) * kSize;

  int64_t slot = p.kv.slot_mapping[token];
  int position = static_cast<int>(p.positions[token]);
#pragma unroll 1
  while (true) {
    // Loads that wait for nothing. Threads without a head read the last one, a value.
    const T* source[kHeads];
#pragma unroll
    for (int j = 0; j < kHeads; ++j) {
      const int head = min(first_head + j * head_step, num_heads - 1);
      source[j] = source_of<T>(p.kinds[kind_of(p, head)], token, head);
    }
    Vec<T> own[kHeads][kHeadVecs], partners[kHeads][kHeadVecs];
#pragma unroll
    for (int j = 0; j < kHeads; ++j) {
#pragma unroll
      for (int v = 0; v < kHeadVecs; ++v) {
        own[j][v] = load_own<kIsAligned>(source[j], at[v], head_dim);
        if (kIsNeox && !kShuffles) {
          partners[j][v] = load_partners<kIsAligned>(source[j], at[v], head_dim, half);
        }
      }
    }
    // So do those of a token's position, for its angles, one token ahead.
    const int next = token + token_step;
    int64_t next_slot = 0;
    int next_position = 0;
    if (next < p.kv.num_tokens) {
      next_slot = p.kv.slot_mapping[next];
      next_position = static_cast<int>(p.positions[next]);
    }
    __syncwarp();  // the query changes in place: a head's threads have all read before one writes

    const float* angles = p.cos_sin_cache + int64_t{position} * p.rotary_dim;
    float cos[kHeadVecs][kSize], sin[kHeadVecs][kSize];
#pragma unroll
    for (int v = 0; v < kHeadVecs; ++v) {
      if (at[v] < 2 * half) load_angles<kIsNeox, kIsAligned>(cos[v], sin[v], angles, at[v], half);
    }

    // Slots fit 32 bits; a negative one is nowhere.
    const uint32_t block_size = p.kv.block_size,
                   cache_block = static_cast<uint32_t>(slot) / block_size;
    const int row = static_cast<int>(static_cast<uint32_t>(slot) - cache_block * block_size);
#pragma unroll
    for (int j = 0; j < kHeads; ++j) {
      const int head = first_head + j * head_step, kind = kind_of(p, head);
      const Heads& heads = p.kinds[kind];
      if constexpr (kHasNorm) {
        float sum = 0.0f;
#pragma unroll
        for (int v = 0; v < kHeadVecs; ++v) {
          sum += head_sum(at[v] < head_dim ? add_squares(0.0f, own[j][v]) : 0.0f);
        }
        const T* weight = static_cast<const T*>(heads.norm_weight);
        if (weight != nullptr) {
          const float inverse = inverse_rms(sum, head_dim, p.norm_eps);
#pragma unroll
          for (int v = 0; v < kHeadVecs; ++v) {
            own[j][v] =
                normalise(own[j][v], inverse, load_own<kIsAligned>(weight, at[v], head_dim));
            if (kIsNeox && !kShuffles) {
              partners[j][v] = normalise(partners[j][v], inverse,
                                         load_partners<kIsAligned>(weight, at[v], head_dim, half));
            }
          }
        }
      }
      if constexpr (kShuffles) partners[j][0] = shuffle_partners(own[j][0], at[0], half);
      if (head >= num_heads || (kind != kQuery && slot < 0)) continue;
      const int block = kind == kQuery ? token : static_cast<int>(cache_block);
      // Where a cache of float8 is written, the query alone goes to destination.
      constexpr bool kIsFloat8 = !std::is_same_v<T, Cache>;
      const bool is_quantized = kIsFloat8 && kind != kQuery;
      T* destination = is_quantized ? nullptr : destination_of<T>(heads, block, row, head);
      Cache* cached = is_quantized ? destination_of<Cache>(heads, block, row, head) : nullptr;
      const float scale = is_quantized ? scale_of_head(heads.scale, head - heads.first) : 1;
#pragma unroll
      for (int v = 0; v < kHeadVecs; ++v) {
        if (at[v] >= head_dim) continue;
        Vec<T> out = own[j][v];
        if (kind != kValue && at[v] < 2 * half) {
          out = rotate_vec<kIsNeox, kIsAligned>(out, partners[j][v], cos[v], sin[v], at[v], half);
        }
        if constexpr (kIsFloat8) {
          if (is_quantized) {
            store_quantized<kIsAligned>(cached + at[v], out, scale, head_dim - at[v]);
            continue;
          }
        }
        store_elements<kIsAligned>(destination + at[v], out, head_dim - at[v]);
      }
    }
    if (next >= p.kv.num_tokens) return;
    token = next, slot = next_slot, position = next_position;
  }
}

// Whether all may be moved in vectors, and a vector is turned whole or not at all.
template <class T>
bool is_aligned(const RotaryReshapeAndCacheParams& p) {
  const int half = p.rotary_dim / 2;
  return fits_vectors<T>(p.kv) &&
         is_vec_aligned<T>(p.query, p.query_stride_token, p.query_stride_head) &&
         is_vec_aligned<T>(p.query_norm_weight) && is_vec_aligned<T>(p.key_norm_weight) &&
         is_vec_aligned<float>(p.cos_sin_cache, half) &&
         (p.is_neox ? half : p.rotary_dim) % Vec<T>::kSize == 0;
}

uint32_t to_uint32(int64_t stride) {
  check(stride >= 0 && stride <= UINT32_MAX,
        "rotary_reshape_and_cache: strides must be in [0, 2^32), got ", stride);
  return static_cast<uint32_t>(stride);
}

Params with_tables(const RotaryReshapeAndCacheParams& params) {
  Params p{params, {}};
  const ReshapeAndCacheParams& kv = params.kv;
  p.kinds[kQuery] = {p.query,
                     p.query,
                     p.query_norm_weight,
                     nullptr,
                     to_uint32(p.query_stride_token),
                     to_uint32(p.query_stride_head),
                     to_uint32(p.query_stride_token),
                     0,
                     to_uint32(p.query_stride_head),
                     0};
  p.kinds[kKey] = {kv.key,
                   kv.key_cache,
                   p.key_norm_weight,
                   kv.key_scale,
                   to_uint32(kv.key_stride_token),
                   to_uint32(kv.key_stride_head),
                   to_uint32(kv.key_cache_stride_block),
                   to_uint32(kv.key_cache_stride_token),
                   to_uint32(kv.key_cache_stride_head),
                   p.num_heads};
  p.kinds[kValue] = {kv.value,
                     kv.value_cache,
                     nullptr,
                     kv.value_scale,
                     to_uint32(kv.value_stride_token),
                     to_uint32(kv.value_stride_head),
                     to_uint32(kv.value_cache_stride_block),
                     to_uint32(kv.value_cache_stride_token),
                     to_uint32(kv.value_cache_stride_head),
                     p.num_heads + kv.num_kv_heads};
  return p;
}

template <class T, class Cache, int kHeadVecs, bool kIsNeox, bool kHasNorm, bool kIsAligned>
void launch(const Params& p, cudaStream_t stream) {
  // blockDim.x * blockDim.y is a multiple of a warp.
  const unsigned vecs = ceil_div(static_cast<unsigned>(p.kv.head_dim), unsigned{Vec<T>::kSize});
  unsigned x = 1;
  while (x * kHeadVecs < vecs) x *= 2;
  const unsigned heads = static_cast<unsigned>(p.num_heads) + 2 * p.kv.num_kv_heads;
  const unsigned heads_in_warp = kWarpSize / x;
  // Warps of a token, and the blocks that share them.
  const unsigned warps =
      ceil_div(ceil_div(heads, unsigned{kVecsPerThread / kHeadVecs}), heads_in_warp);
  const unsigned blocks = ceil_div(warps, unsigned{kNumThreads / kWarpSize});
  const unsigned block_warps = ceil_div(warps, blocks);
  const unsigned tokens = kNumThreads / kWarpSize / block_warps;
  const auto kernel =
      rotary_reshape_and_cache_kernel<T, Cache, kHeadVecs, kIsNeox, kHasNorm, kIsAligned>;
  static const unsigned resident = [&] {
    int of_sm = 1;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_sm, kernel, kNumThreads, 0);
    return static_cast<unsigned>(of_sm * num_multiprocessors());
  }();
  const unsigned rounds = ceil_div(static_cast<unsigned>(p.kv.num_tokens), tokens);
  const dim3 grid(std::min(rounds, std::max(resident / blocks, 1u)), blocks);
  launch_in_chain("rotary_reshape_and_cache", kernel, grid,
                  dim3(x, block_warps * heads_in_warp, tokens), stream, p);
}

// Calls run(std::true_type or std::false_type) for each of the conditions, in their order.
template <class Run>
void dispatch_bools(const Run& run) {
  run();
}
template <class Run, class... Bools>
void dispatch_bools(const Run& run, bool first, Bools... rest) {
  const auto with = [&](auto value) {
    dispatch_bools([&](auto... values) { run(value, values...); }, rest...);
  };
  first ? with(std::true_type{}) : with(std::false_type{});
}

}  // namespace

void rotary_reshape_and_cache(const RotaryReshapeAndCacheParams& params, cudaStream_t stream) {
  if (params.kv.num_tokens == 0 || params.kv.head_dim == 0) return;
  const Params with_kinds = with_tables(params);
  dispatch_dtype(params.kv.dtype, [&](auto element) {
    using T = decltype(element);
    const bool has_norm = params.query_norm_weight != nullptr || params.key_norm_weight != nullptr;
    const bool is_long = params.kv.head_dim > kWarpSize * Vec<T>::kSize;  // in float32 alone
    const bool is_float8 = params.kv.cache_dtype == DType::kFloat8E4M3;
    dispatch_bools(
        [&](auto is_float8, auto is_neox, auto has_norm, auto is_aligned) {
          using Cache = std::conditional_t<is_float8, Float8E4M3, T>;
          if constexpr (sizeof(T) == sizeof(float)) {
            if (is_long)
              return launch<T, Cache, 2, is_neox, has_norm, is_aligned>(with_kinds, stream);
          }
          launch<T, Cache, 1, is_neox, has_norm, is_aligned>(with_kinds, stream);
        },
        is_float8, params.is_neox, has_norm, is_aligned<T>(params));
  });
}

}  // namespace nano_vllm::cuda
