// Random operations on a pool, or on one and its next tier, bad ones among them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "block_allocator_model.h"

namespace nano_vllm::test {

// NANO_VLLM_NIGHTLY in the environment: longer runs.
inline bool is_nightly() { return std::getenv("NANO_VLLM_NIGHTLY") != nullptr; }

struct WalkOptions {
  int32_t num_blocks, block_size;
  int32_t num_tier_blocks;  // 0: without a next tier
  int64_t num_operations;
};

class RandomWalk {
 public:
  RandomWalk(const WalkOptions& options, uint64_t seed)
      : options_(options),
        pool(options.num_blocks, options.block_size, seed),
        tier(std::max(options.num_tier_blocks, 1), options.block_size, seed),
        random_(seed) {
    if (options.num_tier_blocks > 0) pool.set_next_tier(tier);
  }

  void run() {
    const int32_t num_blocks = options_.num_blocks + options_.num_tier_blocks;
    const int64_t check_interval = num_blocks <= 12 ? 1 : 16 * num_blocks;
    for (int64_t i = 0; i < options_.num_operations; ++i) {
      const bool on_tier = options_.num_tier_blocks > 0 && below(4) == 0;
      operate(on_tier ? tier : pool, on_tier ? tier_holders_ : pool_holders_);
      if (below(8) == 0) pool.copy_evictions();
      if (i % check_interval == 0) pool.check();
    }
    pool.check();
    for (Holders* holders : {&pool_holders_, &tier_holders_}) {
      CheckedPool& of = holders == &pool_holders_ ? pool : tier;
      while (!holders->held.empty()) free(of, *holders);
      CHECK(of.allocator.num_free() == of.num_blocks());
    }
    pool.check();
  }

 private:
  struct Holders {
    std::vector<std::pair<int32_t, BlockOwner>> held;  // one entry for each reference
    int32_t eagerness = 50;
  };

  WalkOptions options_;

 public:
  CheckedPool pool, tier;

 private:
  void operate(CheckedPool& on, Holders& holders) {
    // The chance of taking over giving back drifts, so that the pool is now full, now empty.
    if (below(10 * on.num_blocks()) == 0) holders.eagerness = 20 + below(60);
    const bool takes = below(100) < holders.eagerness;
    const int32_t draw = below(64);
    if (draw < 12) return takes ? allocate(on, holders) : free(on, holders);
    if (draw < 18) return takes ? allocate_many(on, holders) : free_many(on, holders);
    if (draw < 24) return takes ? share(on, holders) : free(on, holders);
    if (draw < 28) return make_writable(on, holders);
    if (draw < 36) return lookup(on, holders);
    if (draw < 60) return commit(on, holders);
    if (draw < 63) return forget(on);
    misuse(on, holders);
  }

  void allocate(CheckedPool& on, Holders& holders) {
    const BlockOwner owner = random_owner();
    const int32_t block = on.allocate(owner);
    if (block != kNoBlock) holders.held.emplace_back(block, owner);
  }

  void allocate_many(CheckedPool& on, Holders& holders) {
    const BlockOwner owner = random_owner();
    for (const int32_t block : on.allocate_many(below(on.num_blocks() / 4 + 3), owner)) {
      holders.held.emplace_back(block, owner);
    }
  }

  void share(CheckedPool& on, Holders& holders) {
    if (holders.held.empty()) return;
    const BlockOwner owner = random_owner();
    const int32_t block = holders.held[below(holders.held.size())].first;
    on.share(block, owner);
    holders.held.emplace_back(block, owner);
  }

  void free(CheckedPool& on, Holders& holders) {
    if (holders.held.empty()) return;
    std::swap(holders.held[below(holders.held.size())], holders.held.back());
    const auto [block, owner] = holders.held.back();
    on.free(block, owner);
    holders.held.pop_back();
  }

  void free_many(CheckedPool& on, Holders& holders) {
    const BlockOwner owner = random_owner();
    auto& held = holders.held;
    std::shuffle(held.begin(), held.end(), random_);
    const auto first = std::partition(held.begin(), held.end(),
                                      [owner](const auto& entry) { return entry.second != owner; });
    const auto count = std::min<int64_t>(held.end() - first, below(17));
    std::vector<int32_t> blocks;
    for (auto entry = held.end() - count; entry != held.end(); ++entry) {
      blocks.push_back(entry->first);
    }
    held.resize(held.size() - static_cast<size_t>(count), {kNoBlock, owner});
    on.free_many(blocks, owner);
  }

  void make_writable(CheckedPool& on, Holders& holders) {
    if (holders.held.empty()) return;
    auto& [block, owner] = holders.held[below(holders.held.size())];
    if (owner == BlockOwner::kSequence) block = on.make_writable(block);
  }

  void commit(CheckedPool& on, Holders& holders) {
    if (holders.held.empty()) return;
    const Content content = random_content();
    on.commit(holders.held[below(holders.held.size())].first, content);
    parents_[below(parents_.size())] = on.allocator.hash(content.parent, content.tokens.data());
  }

  void lookup(CheckedPool& on, Holders& holders) {
    const BlockOwner owner = random_owner();
    const int32_t block = on.lookup(random_content(), owner);
    if (block != kNoBlock) holders.held.emplace_back(block, owner);
  }

  void forget(CheckedPool& on) { on.forget(below(on.num_blocks())); }

  // Calls that must throw and change nothing.
  void misuse(CheckedPool& on, Holders& holders) {
    BlockAllocator& allocator = on.allocator;
    const int64_t out_of_range[] = {-1, on.num_blocks(), int64_t{1} << 32, INT64_MIN};
    const int64_t bad = out_of_range[below(4)];
    const Tokens tokens(options_.block_size, 1);
    on.refuse([&] { allocator.share(bad); });
    on.refuse([&] { allocator.free(bad); });
    on.refuse([&] { allocator.ref_count(bad); });
    on.refuse([&] { allocator.state(bad); });
    on.refuse([&] { allocator.make_writable(bad); });
    on.refuse([&] { allocator.forget(bad); });
    on.refuse([&] { allocator.commit(bad, {}, tokens.data()); });
    on.refuse([&] { allocator.allocate_many(-1); });
    on.refuse([&] { allocator.set_next_tier(&allocator); });
    const auto& queue = on.model.queue;
    std::vector<int32_t> blocks;
    for (const auto& entry : holders.held) blocks.push_back(entry.first);
    if (!queue.empty()) {
      const int32_t unheld = queue[below(queue.size())];
      on.refuse([&] { allocator.share(unheld); });
      on.refuse([&] { allocator.free(unheld); });
      on.refuse([&] { allocator.make_writable(unheld); });
      on.refuse([&] { allocator.commit(unheld, {}, tokens.data()); });
      std::vector<int32_t> mixed(blocks.begin(),
                                 blocks.begin() + std::min<size_t>(4, blocks.size()));
      mixed.push_back(unheld);
      on.refuse([&] { allocator.free_many(mixed); });
    }
    if (blocks.empty()) return;
    const int32_t block = blocks[below(blocks.size())];
    const std::vector<int32_t> once_too_often(on.model.refs[block] + 1, block);
    on.refuse([&] { allocator.free_many(once_too_often); });
    // References that are there, but not of this owner.
    const BlockOwner owner = random_owner();
    const auto owned = static_cast<size_t>(on.model.references(owner));
    if (owned >= blocks.size()) return;
    blocks.resize(owned + 1);
    on.refuse([&] { allocator.free_many(blocks, owner); });
    if (owned > 0) return;
    on.refuse([&] { allocator.free(block, owner); });
    if (owner == BlockOwner::kSequence) {
      on.refuse([&] { allocator.make_writable(block); });
    }
  }

  BlockOwner random_owner() {
    constexpr BlockOwner kDraws[] = {BlockOwner::kSequence, BlockOwner::kSequence, BlockOwner::kPin,
                                     BlockOwner::kTransfer};
    return kDraws[below(4)];
  }

  // Few different ones, so that contents meet again; often one that a tier has.
  Content random_content() {
    const Model& model = below(2) == 0 ? tier.model : pool.model;
    const Content& known = model.content[below(model.content.size())];
    if (below(3) == 0 && !known.tokens.empty()) return known;
    const int32_t num_blocks = options_.num_blocks + options_.num_tier_blocks;
    Content content{parents_[below(parents_.size())], Tokens(options_.block_size, 7)};
    content.tokens[below(options_.block_size)] = below(num_blocks / 4 + 2);
    return content;
  }

  int32_t below(size_t bound) { return static_cast<int32_t>(random_() % bound); }

  std::mt19937_64 random_;
  Holders pool_holders_, tier_holders_;
  std::vector<BlockHash> parents_ = std::vector<BlockHash>(4);  // recent hashes
};

}  // namespace nano_vllm::test
