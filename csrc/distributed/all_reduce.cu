// CUDA all_reduce in one shot or two or plainly, see all_reduce.h.
//
// In one shot or two, what travels has a flag beside every 4 bytes, the number of the call, as in
// NCCL's protocol for low latency: data has come where its flag has, as 8 bytes are written at
// once. There is no other synchronisation: a way over the link, or two, is all that a call waits
// for. Lines of 128 bytes with one flag would send half as much; that they arrive whole, no
// specification promises.
//
// A plain sum's flag, the number of the call too, comes behind all rows that a block sends to a
// rank: it is released to the system by a thread that has met all others of the block, so that
// where it is seen the rows are there, for whoever meets the thread that has seen it. A block waits
// for the flags of the same block of all others: all ranks have the same grid, which follows from
// the shape and from the number of multiprocessors, and so the same rows for a block. That the GPUs
// have as many is up to who connects them.
//
// The memory of call n is used again by call n + 2 at the earliest, whatever the ways of these
// calls and of those between. No call ends on a rank before it has begun on all: each sum needs
// everybody's rows. So a rank that writes there has ended call n + 1, they have begun it, and ended
// call n: kernels of a stream come one after the other. They read it no more, and nothing of it is
// still to arrive: what is sent to a rank in a call, it has waited for in that call, with flags
// vector by vector, and plainly by flags that no row comes behind. A plain sum's flag is not
// overwritten before it was seen, by the same rule; until it comes, there is an earlier call's or
// 0. What a rank gets in a call has one writer for each place, in every way. A plain sum's vectors
// lie where no way looks for flags, and its flags where nothing else is written.
//
// All blocks of a grid are on the GPU at a time: none waits for what another rank's blocks send
// that cannot begin. The next kernel of the stream only begins once they all have.
#include <algorithm>
#include <type_traits>

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "distributed/all_reduce.h"
#include "layers/rms_norm.cuh"

namespace nano_vllm::cuda {
namespace {

constexpr int kMaxThreads = 1024;  // of a block, and that an SM has room for at least
constexpr int kMaxVecsPerThread = 4;

struct Counters {
  uint32_t last_call;
  uint32_t num_ended_blocks;  // of the call under way
};

__device__ inline uint32_t next_call(uint32_t call) {
  return call == ~0u ? 2 : call + 1;  // never 0, as fresh memory is, and never twice even or odd
}

// What is in the ranks' buffers, the same in all of them.
struct Rooms {
  PeerBufferParts parts;
  int64_t share;       // vectors of a message that a rank sums in two shots
  int64_t plain_vecs;  // of a sender in a plain sum

  Rooms(int64_t max_bytes, int num_ranks)
      : parts(max_bytes, num_ranks),
        share(share_of_rank(max_bytes, num_ranks)),
        plain_vecs(max_one_shot_bytes(max_bytes, num_ranks) / 16) {}
};

// Where a sender's part of one call lies in some rank's buffer.
template <class Word>
__device__ inline Word* find_room(const AllReduceParams& p, int64_t part, int owner, int sender,
                                  uint32_t call, int64_t words) {
  auto* start = reinterpret_cast<Word*>(static_cast<char*>(p.buffers[owner]) + part);
  return start + ((call & 1) * p.num_ranks + sender) * words;
}

// A rank's vectors of one call in some rank's buffer, with flags beside them: first all of their
// first halves.
struct FlaggedInbox {
  // Two halves of a vector on their way.
  struct Message {
    uint4 low, high;

    __device__ bool is_of(uint32_t call) const {
      return low.y == call && low.w == call && high.y == call && high.w == call;
    }
  };

  uint4* vecs;
  int64_t capacity;

  __device__ FlaggedInbox(const AllReduceParams& p, const Rooms& rooms, int owner, int sender,
                          uint32_t call)
      : capacity(2 * rooms.share) {
    vecs = find_room<uint4>(p, rooms.parts.flagged_vecs, owner, sender, call, 2 * capacity);
  }

  template <class T>
  __device__ void send(int64_t place, const Vec<T>& vec, uint32_t call) const {
    const uint4 words = reinterpret_cast<const uint4&>(vec);
    write_through(vecs + place, {words.x, call, words.y, call});
    write_through(vecs + capacity + place, {words.z, call, words.w, call});
  }

  __device__ Message look(int64_t place) const {
    return {read_through(vecs + place), read_through(vecs + capacity + place)};
  }

  // The vector of a place at which was looked already.
  template <class T>
  __device__ Vec<T> receive(int64_t place, uint32_t call, Message message) const {
    while (!message.is_of(call)) message = look(place);
    const uint4 words{message.low.x, message.low.z, message.high.x, message.high.z};
    return reinterpret_cast<const Vec<T>&>(words);
  }
};

// The same without flags: to be looked at once exchange_flags() has returned.
struct PlainInbox {
  using Message = uint4;

  uint4* vecs;

  __device__ PlainInbox(const AllReduceParams& p, const Rooms& rooms, int owner, int sender,
                        uint32_t call)
      : vecs(find_room<uint4>(p, rooms.parts.plain_vecs, owner, sender, call, rooms.plain_vecs)) {}

  template <class T>
  __device__ void send(int64_t place, const Vec<T>& vec, uint32_t) const {
    write_through(vecs + place, reinterpret_cast<const uint4&>(vec));
  }

  __device__ Message look(int64_t place) const { return read_through(vecs + place); }

  template <class T>
  __device__ Vec<T> receive(int64_t, uint32_t, Message message) const {
    return reinterpret_cast<const Vec<T>&>(message);
  }
};

// Tells all others that this block has sent its rows, and waits for theirs.
__device__ inline void exchange_flags(const AllReduceParams& p, const Rooms& rooms, uint32_t call) {
  const auto flag_of = [&](int owner, int sender) {
    return find_room<uint32_t>(p, rooms.parts.flags, owner, sender, call, kMaxAllReduceBlocks) +
           blockIdx.x;
  };
  __syncthreads();  // the release below is of what all threads have sent
  const int peer = static_cast<int>(threadIdx.x);
  if (peer < p.num_ranks && peer != p.rank) {
    release_to_system(flag_of(peer, p.rank), call);
    const uint32_t* theirs = flag_of(p.rank, peer);
    while (acquire_from_system(theirs) != call) continue;
  }
  __syncthreads();
}

// Who sums a vector in a two-shot call, and its place among that rank's. A warp's vectors have one
// owner, and a row of some length all of them, so that all blocks do as much.
struct Share {
  int owner;
  int64_t place;

  __device__ Share(int64_t place_of_all, int num_ranks) {
    const auto chunk = static_cast<uint32_t>(place_of_all / kChunkVecs);
    const auto count = static_cast<uint32_t>(num_ranks);
    owner = static_cast<int>(chunk % count);
    place = int64_t{chunk / count} * kChunkVecs + place_of_all % kChunkVecs;
  }
};

// The sum over the ranks, in their order, of a vector that all others have sent to a place here.
// kAtOnce: reads that are under way before one is waited for.
template <class Inbox, int kAtOnce, class T>
__device__ inline Vec<T> sum_over_ranks(const AllReduceParams& p, const Rooms& rooms, int64_t place,
                                        const T* own, uint32_t call) {
  constexpr int kSize = Vec<T>::kSize;
  float sums[kSize] = {};
  for (int first = 0; first < p.num_ranks; first += kAtOnce) {
    typename Inbox::Message messages[kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int sender = first + i;
      if (sender == p.rank || sender >= p.num_ranks) continue;
      messages[i] = Inbox(p, rooms, p.rank, sender, call).look(place);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int sender = first + i;
      if (sender >= p.num_ranks) continue;
      const Vec<T> vec =
          sender == p.rank
              ? load_vec(own)
              : Inbox(p, rooms, p.rank, sender, call).template receive<T>(place, call, messages[i]);
#pragma unroll
      for (int j = 0; j < kSize; ++j) sums[j] += to_float(vec.value[j]);
    }
  }
  Vec<T> sum;
#pragma unroll
  for (int j = 0; j < kSize; ++j) sum.value[j] = from_float<T>(sums[j]);
  return sum;
}

// Grid: blocks that take turns at the rows. A row's elements go to the threads as
// in rms_norm. All ranks add to the residual and normalise all rows, of two-shot sums too: to send
// what one of them had added and normalised would be twice as much on the links, which are slower
// than memory.
template <class T, int kVecsPerThread, AllReduceWay kWay>
__global__ void __launch_bounds__(kMaxThreads) all_reduce_kernel(AllReduceParams p, Rooms rooms) {
  constexpr bool kIsTwoShot = kWay == AllReduceWay::kTwoShot;
  constexpr bool kIsPlain = kWay == AllReduceWay::kPlain;
  using Inbox = std::conditional_t<kIsPlain, PlainInbox, FlaggedInbox>;
  constexpr int kSize = Vec<T>::kSize, kAtOnce = kVecsPerThread == 1 ? 4 : 1;  // by registers
  allow_next_kernel();
  wait_for_last_kernel();
  auto* counters = static_cast<Counters*>(p.buffers[p.rank]);
  const uint32_t call = next_call(*static_cast<volatile uint32_t*>(&counters->last_call));
  const int vecs_per_row = p.hidden_size / kSize;
  const auto* input = static_cast<const T*>(p.input);
  auto* out = static_cast<T*>(p.out);
  const auto send_to_all = [&](int64_t place, const Vec<T>& vec) {
    for (int step = 1; step < p.num_ranks; ++step) {
      const int peer = (p.rank + step) % p.num_ranks;  // not all at the same link first
      Inbox(p, rooms, peer, p.rank, call).send(place, vec, call);
    }
  };

  // All rows of the block are on their way before it waits for any.
  for (int row = blockIdx.x; row < p.num_rows; row += gridDim.x) {
    for (int at = threadIdx.x; at < vecs_per_row; at += blockDim.x) {
      const int64_t place = int64_t{row} * vecs_per_row + at;
      if constexpr (kIsTwoShot) {
        const Share to(place, p.num_ranks);
        if (to.owner == p.rank) continue;
        const Vec<T> vec = load_vec(input + place * kSize);
        Inbox(p, rooms, to.owner, p.rank, call).send(to.place, vec, call);
      } else {
        send_to_all(place, load_vec(input + place * kSize));
      }
    }
  }
  if constexpr (kIsPlain) exchange_flags(p, rooms, call);
  if constexpr (kIsTwoShot) {
    for (int row = blockIdx.x; row < p.num_rows; row += gridDim.x) {
      for (int at = threadIdx.x; at < vecs_per_row; at += blockDim.x) {
        const int64_t place = int64_t{row} * vecs_per_row + at;
        const Share own(place, p.num_ranks);
        if (own.owner != p.rank) continue;
        const Vec<T> sum =
            sum_over_ranks<Inbox, kAtOnce>(p, rooms, own.place, input + place * kSize, call);
        send_to_all(rooms.share + own.place, sum);
        store_vec(out + place * kSize, sum);  // this thread reads it again
      }
    }
  }
  for (int row = blockIdx.x; row < p.num_rows; row += gridDim.x) {
    Vec<T> kept[kVecsPerThread];
    float sum_of_squares = 0.0f;
#pragma unroll
    for (int j = 0; j < kVecsPerThread; ++j) {
      const int at = threadIdx.x + j * blockDim.x;
      if (at >= vecs_per_row) continue;
      const int64_t place = int64_t{row} * vecs_per_row + at;
      Vec<T>& vec = kept[j];
      if constexpr (kIsTwoShot) {
        const Share from(place, p.num_ranks);
        if (from.owner == p.rank) {
          vec = load_vec(out + place * kSize);
        } else {
          const Inbox inbox(p, rooms, p.rank, from.owner, call);
          const int64_t there = rooms.share + from.place;
          vec = inbox.template receive<T>(there, call, inbox.look(there));
        }
      } else {
        vec = sum_over_ranks<Inbox, kAtOnce>(p, rooms, place, input + place * kSize, call);
      }
      if (p.residual == nullptr) {
        store_vec(out + place * kSize, vec);
        continue;
      }
      T* residual = static_cast<T*>(p.residual) + place * kSize;
      const Vec<T> old = load_vec(residual);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        vec.value[i] = from_float<T>(to_float(vec.value[i]) + to_float(old.value[i]));
      }
      store_vec(residual, vec);
      sum_of_squares = add_squares(sum_of_squares, vec);
    }
    if (p.residual == nullptr) continue;
    __syncthreads();  // block_sum's memory is read no more
    const float inverse = inverse_rms(block_sum(sum_of_squares), p.hidden_size, p.eps);
#pragma unroll
    for (int j = 0; j < kVecsPerThread; ++j) {
      const int at = threadIdx.x + j * blockDim.x;
      if (at >= vecs_per_row) continue;
      const int64_t place = int64_t{row} * vecs_per_row + at;
      const Vec<T> weight = load_vec(static_cast<const T*>(p.weight) + int64_t{at} * kSize);
      store_vec(out + place * kSize, normalise(kept[j], inverse, weight));
    }
  }

  // Whoever ends last counts the call: by then every block has read its number.
  __syncthreads();
  if (threadIdx.x == 0 && atomicAdd(&counters->num_ended_blocks, 1u) == gridDim.x - 1) {
    counters->num_ended_blocks = 0;
    counters->last_call = call;
  }
}

template <class T, int kVecsPerThread>
void launch(const AllReduceParams& p, int num_threads, cudaStream_t stream) {
  const int per_multiprocessor = std::min(2, kMaxThreads / num_threads);
  const int grid =
      std::min({p.num_rows, per_multiprocessor * num_multiprocessors(), kMaxAllReduceBlocks});
  const auto start = [&](auto* kernel) {
    launch_in_chain("all_reduce", kernel, dim3(static_cast<unsigned>(grid)),
                    dim3(static_cast<unsigned>(num_threads)), stream, p,
                    Rooms(p.max_bytes, p.num_ranks));
  };
  switch (p.way) {
    case AllReduceWay::kOneShot:
      return start(all_reduce_kernel<T, kVecsPerThread, AllReduceWay::kOneShot>);
    case AllReduceWay::kTwoShot:
      return start(all_reduce_kernel<T, kVecsPerThread, AllReduceWay::kTwoShot>);
    case AllReduceWay::kPlain:
      return start(all_reduce_kernel<T, kVecsPerThread, AllReduceWay::kPlain>);
  }
}

}  // namespace

void all_reduce(const AllReduceParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return;
  dispatch_dtype(params.dtype, [&](auto element) {
    using T = decltype(element);
    const int vecs = params.hidden_size / Vec<T>::kSize;
    check(vecs <= kMaxThreads * kMaxVecsPerThread, "all_reduce: a row has at most ",
          kMaxThreads * kMaxVecsPerThread * Vec<T>::kSize, " elements, got ", params.hidden_size);
    if (vecs <= kMaxThreads) {
      launch<T, 1>(params, (vecs + kWarpSize - 1) / kWarpSize * kWarpSize, stream);
    } else {
      launch<T, kMaxVecsPerThread>(params, kMaxThreads, stream);
    }
  });
}

}  // namespace nano_vllm::cuda
