// CUDA product of many rows with gate and up, and the activation, on Hopper: a tile's halves are
// 128 rows of the gate and as many of up. To write what the activation takes, and to read it again,
// is four times what is written here.
#include "layers/linear.h"
#include "layers/tiled_linear_sm90.cuh"

namespace nano_vllm::cuda {
namespace gated_linear_sm90 {  // not anonymous: for other architectures most of it is unused

using namespace tiled_linear_sm90;

__device__ inline float silu_and_mul(float gate, float up) {
  return __fdividef(gate, 1.0f + exp2_approx(-1.4426950408889634f * gate)) * up;
}

template <class T_>
struct SiluAndMul {
  using T = T_;
  struct Early {};

  T* out;
  int64_t out_stride_row;
  int32_t num_rows, out_features;

  __device__ Halves halves(int column_tile) const {
    const int gate = column_tile * (kHalfColumns / kChunkColumns);
    return {gate, gate + out_features / kChunkColumns};
  }
  __device__ Early start(int) const { return {}; }
  __device__ void prepare(Early&) const {}

  __device__ void finish(Early, int row, int column_tile, const Sums& sums) const {
    const int column = column_tile * kHalfColumns + lane_column();
#pragma unroll
    for (int is_second = 0; is_second < 2; ++is_second, row += 8) {
      T* const to = out + row * out_stride_row + column;
#pragma unroll
      for (int chunk = 0; chunk < kChunks / 2; ++chunk) {
        float gate[8], up[8];
        read_sums(gate, sums, chunk, is_second);
        read_sums(up, sums, chunk + kChunks / 2, is_second);
#pragma unroll
        for (int e = 0; e < 8; ++e) gate[e] = silu_and_mul(gate[e], up[e]);
        if (row < num_rows && column + kChunkColumns * chunk < out_features) {
          store_vec(to + kChunkColumns * chunk, from_floats<T>(gate));
        }
      }
    }
  }
};

}  // namespace gated_linear_sm90

bool can_gated_linear(int out_features) {
  return out_features % tiled_linear_sm90::kChunkColumns == 0;
}

// Torch's product is as fast where its tiles fill the GPU as well as ours, and has them in many
// sizes; the activation behind it takes 256 / in_features of the product's time. Of up to 256 rows
// its tiles are as ours, if there are many columns.
bool gated_linear_pays(int num_rows, int in_features, int out_features) {
  using namespace gated_linear_sm90;
  if (!can_gated_linear(out_features)) return false;
  const double busy = busy_share(num_rows, ceil_div(out_features, kHalfColumns));
  if (num_rows <= 256 && out_features >= 96 * kHalfColumns) return busy > 0.75;
  return busy * (1 + 256.0 / in_features) > 1;
}

void gated_linear(const LinearParams& p, cudaStream_t stream) {
  using namespace gated_linear_sm90;
  const auto run_as = [&](auto element) {
    using T = decltype(element);
    const SiluAndMul<T> epilogue{static_cast<T*>(p.out), p.out_stride_row, p.num_rows,
                                 p.out_features};
    run("linear_silu_and_mul", p, 2 * int64_t{p.out_features},
        ceil_div(p.out_features, kHalfColumns), epilogue, stream);
  };
  p.dtype == DType::kFloat16 ? run_as(__half{}) : run_as(__nv_bfloat16{});
}

}  // namespace nano_vllm::cuda
