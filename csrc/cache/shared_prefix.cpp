#include "cache/shared_prefix.h"

#include <algorithm>
#include <cstring>
#include <unordered_map>
#include <vector>

namespace nano_vllm {
namespace {

struct Group {
  int64_t leader, num_blocks, num_members;
};

}  // namespace

int64_t find_shared_prefixes(const SharedPrefixParams& p) {
  std::vector<Group> groups;
  std::vector<int64_t> group_of(static_cast<size_t>(p.num_seqs), -1);
  std::unordered_map<int32_t, std::vector<size_t>> by_first_block;
  for (int64_t s = 0; s < p.num_seqs; ++s) {
    p.leaders[s] = static_cast<int32_t>(s);
    p.lens[s] = 0;
    if (p.query_start_loc != nullptr && p.query_start_loc[s + 1] - p.query_start_loc[s] != 1) {
      continue;
    }
    // The last token is the sequence's own.
    const int64_t num_blocks = (p.seq_lens[s] - 1) / p.block_size;
    if (num_blocks <= 0) continue;
    const int32_t* table = p.block_tables[s];
    std::vector<size_t>& candidates = by_first_block[table[0]];
    const auto joins = [&](size_t index) {
      Group& group = groups[index];
      const int32_t* leader = p.block_tables[group.leader];
      const int64_t most = std::min(num_blocks, group.num_blocks);
      // Tokens of one prompt that are rows of their own have all of it in common.
      const bool is_whole = std::memcmp(table, leader, static_cast<size_t>(most) * 4) == 0;
      const int64_t common =
          is_whole ? most : std::mismatch(table, table + most, leader).first - table;
      // One that shares little must not take from the others what they share.
      if (group.num_members > 1 && 2 * common < group.num_blocks) return false;
      group.num_blocks = common;
      ++group.num_members;
      return true;
    };
    const auto found = std::find_if(candidates.begin(), candidates.end(), joins);
    if (found != candidates.end()) {
      group_of[static_cast<size_t>(s)] = static_cast<int64_t>(*found);
    } else {
      group_of[static_cast<size_t>(s)] = static_cast<int64_t>(groups.size());
      candidates.push_back(groups.size());
      groups.push_back({s, num_blocks, 1});
    }
  }
  int64_t saved = 0;
  for (const Group& group : groups) {
    saved += (group.num_members - 1) * group.num_blocks * p.block_size;
  }
  if (saved == 0 || saved < p.min_saved_tokens) return 0;
  for (int64_t s = 0; s < p.num_seqs; ++s) {
    if (group_of[static_cast<size_t>(s)] < 0) continue;
    const Group& group = groups[static_cast<size_t>(group_of[static_cast<size_t>(s)])];
    if (group.num_members == 1) continue;
    p.leaders[s] = static_cast<int32_t>(group.leader);
    p.lens[s] = static_cast<int32_t>(group.num_blocks * p.block_size);
  }
  return saved;
}

}  // namespace nano_vllm
