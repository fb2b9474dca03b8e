// CPU copy_blocks: one memcpy for each block and plane, shared among the threads.
#include <cstring>

#include "cache/copy_blocks.h"
#include "common/parallel.h"

namespace nano_vllm::cpu {
namespace {

constexpr int64_t kGrainBytes = 64 * 1024;  // less is not worth waking a thread for

}  // namespace

void copy_blocks(const CopyBlocksParams& p) {
  const int64_t copies = int64_t{p.num_planes} * p.num_pairs;
  parallel_for(copies, kGrainBytes / (p.block_bytes + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t plane = i / p.num_pairs, pair = i % p.num_pairs;
      const int64_t src_block = p.block_mapping[2 * pair],
                    dst_block = p.block_mapping[2 * pair + 1];
      std::memcpy(
          static_cast<char*>(p.dst) + plane * p.dst_stride_plane + dst_block * p.dst_stride_block,
          static_cast<const char*>(p.src) + plane * p.src_stride_plane +
              src_block * p.src_stride_block,
          static_cast<size_t>(p.block_bytes));
    }
  });
}

}  // namespace nano_vllm::cpu
