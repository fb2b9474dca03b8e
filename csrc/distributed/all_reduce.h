// Sums over the GPUs of one host, through memory that they map from each other, for tensors that
// are too small for the library's rings to pay; and the norm that follows in a decoder.
//
// One-shot: each rank sends its rows to all others and sums what it gets; it waits for one way over
// the links, and sends num_ranks - 1 times its rows. Two-shot: each rank sums a share of the rows,
// which all others send to it, and sends the sums to all; it waits for two ways, and sends
// 2 (num_ranks - 1) / num_ranks times its rows. In both, half of what travels are flags. Plain: as
// one-shot, without flags beside the data; one flag behind all rows of a block tells that they are
// there. It sends half as many bytes, and waits until they have come before it sums any.
#pragma once

#include <cstdint>

#include "common/stream.h"
#include "common/types.h"

namespace nano_vllm {

enum class AllReduceWay { kOneShot, kTwoShot, kPlain };

constexpr int kMaxPeers = 8;

// Vectors of 16 bytes that one rank sums of each kChunkVecs * num_ranks: a warp's.
constexpr int64_t kChunkVecs = 32;

// The buffer of each rank: the counters of its calls, then what others have sent, by call (the last
// two take turns) and sender: the flags of plain sums, by block; vectors with flags beside them, by
// place; the vectors of plain sums, by place. With flags a sender has room for a rank's share of
// the largest message twice: in a two-shot sum first what is to be summed, then the sums. In a
// one-shot sum it has all of a message there. A plain sum's vectors have room of their own: any of
// them could look like a flag.
constexpr int64_t kPeerHeaderBytes = 256;

// Blocks of a grid, of any size of GPU: a flag for each.
constexpr int kMaxAllReduceBlocks = 512;

// Vectors of 16 bytes, of the largest message that buffers are made for.
constexpr int64_t share_of_rank(int64_t max_bytes, int num_ranks) {
  const int64_t chunks = (max_bytes / 16 + kChunkVecs - 1) / kChunkVecs;
  return (chunks + num_ranks - 1) / num_ranks * kChunkVecs;
}

// Bytes of the largest message that is summed in one shot or plainly; all of it with two ranks.
constexpr int64_t max_one_shot_bytes(int64_t max_bytes, int num_ranks) {
  const int64_t room = 2 * share_of_rank(max_bytes, num_ranks) * 16;
  return room < max_bytes ? room : max_bytes;
}

// Where the parts of a rank's buffer begin, in bytes, and where it ends.
struct PeerBufferParts {
  int64_t flags, flagged_vecs, plain_vecs, end;

  constexpr PeerBufferParts(int64_t max_bytes, int num_ranks)
      : flags(kPeerHeaderBytes),
        flagged_vecs(flags + int64_t{2} * num_ranks * kMaxAllReduceBlocks * 4),
        // half of them are flags
        plain_vecs(flagged_vecs + 2 * num_ranks * 2 * 2 * share_of_rank(max_bytes, num_ranks) * 16),
        end(plain_vecs + 2 * num_ranks * max_one_shot_bytes(max_bytes, num_ranks)) {}
};

constexpr int64_t size_of_peer_buffer(int64_t max_bytes, int num_ranks) {
  return PeerBufferParts(max_bytes, num_ranks).end;
}

// With residual == nullptr: out = sum of all ranks' input, in float32 in their order, rounded to
// dtype once. Otherwise residual += that, rounded, and out = rms_norm(residual) * weight, with the
// bits that RmsNorm gives. All ranks make the same calls in the same order, and get the same bits,
// which do not depend on the way. Their GPUs have the same number of multiprocessors.
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
  int64_t max_bytes;  // of a message, as the buffers were made for; a multiple of 16
  AllReduceWay way;   // if not in two shots, at most max_one_shot_bytes()
};

namespace cuda {
void all_reduce(const AllReduceParams& params, cudaStream_t stream);
}  // namespace cuda

}  // namespace nano_vllm
