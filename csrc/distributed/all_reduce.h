// Sums over the GPUs of one host, through memory that they map from each other, for tensors that
// are too small for the library's rings to pay; and the norm that follows in a decoder.
#pragma once

#include <cstdint>

#include "common/stream.h"
#include "common/types.h"

namespace nano_vllm {

constexpr int kMaxPeers = 8;

// The buffer of each rank: the counters of its calls, then what others have sent, by call (the last
// two take turns), sender and place.
constexpr int64_t kPeerHeaderBytes = 256;

// Bytes of a rank's buffer through which messages of so many bytes can go.
constexpr int64_t size_of_peer_buffer(int64_t max_bytes, int num_ranks) {
  return kPeerHeaderBytes + 2 * num_ranks * 2 * max_bytes;  // half of what travels are flags
}

// With residual == nullptr: out = sum of all ranks' input, in float32 in their order, rounded to
// dtype once. Otherwise residual += that, rounded, and out = rms_norm(residual) * weight, with the
// bits that RmsNorm gives. All ranks make the same calls in the same order, and get the same bits.
struct AllReduceParams {
  DType dtype;
  void* out;           // [num_rows, hidden_size]; may be input
  const void* input;   // [num_rows, hidden_size], rows one behind the other, as are all
  void* residual;      // [num_rows, hidden_size] or nullptr
  const void* weight;  // [hidden_size], with a residual
  float eps;

  int32_t num_rows, hidden_size;  // rows of 16 bytes times up to 4096
  void* buffers[kMaxPeers];       // by rank, as this one has them mapped
  int32_t rank, num_ranks;
  int64_t max_bytes;  // of a message, as the buffers were made for
};

namespace cuda {
void all_reduce(const AllReduceParams& params, cudaStream_t stream);

// Memory of the current device that other processes of the host may map: zeros.
void* allocate_peer_buffer(int64_t num_bytes);
void free_peer_buffer(void* buffer);
constexpr int kPeerHandleBytes = 64;
void export_peer_buffer(void* buffer, uint8_t* handle);
void* import_peer_buffer(const uint8_t* handle);
void close_peer_buffer(void* buffer);
}  // namespace cuda

}  // namespace nano_vllm
