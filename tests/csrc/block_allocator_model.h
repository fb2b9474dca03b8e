// What the block allocator must do, with linear searches and no thought for speed, and a pool that
// asks both. The model knows what is in memory too: a block of either tier that is found must hold
// what was asked for.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <functional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cache/block_allocator.h"
#include "check.h"

namespace nano_vllm {

struct BlockAllocatorPeer {
  using Block = BlockAllocator::Block;
  static Block& block(BlockAllocator& allocator, int32_t i) { return allocator.blocks_[i]; }
  static int32_t& token(BlockAllocator& allocator, int32_t i) { return allocator.tokens_[i]; }
  static int32_t& num_free(BlockAllocator& allocator) { return allocator.num_free_; }
  static int32_t& num_cached(BlockAllocator& allocator) { return allocator.num_cached_; }
  static auto& index(BlockAllocator& allocator) { return allocator.index_; }
  static auto& references(BlockAllocator& allocator) { return allocator.references_; }
  static auto& evictions(BlockAllocator& allocator) { return allocator.evictions_; }
};

inline bool operator==(const Eviction& a, const Eviction& b) {
  return a.block == b.block && a.tier_block == b.tier_block;
}

namespace test {

using Tokens = std::vector<int32_t>;

constexpr int32_t kNoBlock = BlockAllocator::kNoBlock;
constexpr BlockOwner kOwners[kNumBlockOwners] = {BlockOwner::kSequence, BlockOwner::kPin,
                                                 BlockOwner::kTransfer};

struct Content {
  BlockHash parent;
  Tokens tokens;  // none: no content
  bool operator==(const Content& other) const {
    return parent == other.parent && tokens == other.tokens;
  }
};

// A pool: what the allocator says and does, block numbers included.
class Model {
 public:
  explicit Model(int32_t num_blocks) : refs(num_blocks), content(num_blocks) {
    for (int32_t block = 0; block < num_blocks; ++block) queue.push_back(block);
  }

  int64_t& references(BlockOwner owner) { return owned[static_cast<size_t>(owner)]; }

  int32_t allocate(BlockOwner owner) {
    const int32_t block = queue.front();
    if (next_tier != nullptr && is_indexed(block)) move_to_next_tier(content[block], block);
    queue.pop_front();
    refs[block] = 1;
    ++references(owner);
    content[block] = {};
    return block;
  }

  void share(int32_t block, BlockOwner owner) {
    ++refs[block];
    ++references(owner);
  }

  void free(int32_t block, BlockOwner owner) {
    --references(owner);
    if (--refs[block] > 0) return;
    if (is_indexed(block)) {
      queue.push_back(block);
    } else {
      queue.push_front(block);
    }
  }

  int32_t make_writable(int32_t block) {
    if (refs[block] == 1) {
      content[block] = {};
      return block;
    }
    --refs[block];
    --references(BlockOwner::kSequence);
    return allocate(BlockOwner::kSequence);
  }

  void commit(int32_t block, const Content& what) {
    if (find(what) == kNoBlock) content[block] = what;
  }

  int32_t lookup(const Content& what, BlockOwner owner) {
    const int32_t block = find(what);
    if (block == kNoBlock) return block;
    if (refs[block] == 0) unqueue(block);
    share(block, owner);
    return block;
  }

  void forget(int32_t block) {
    if (state(block) == BlockState::kCached) {
      unqueue(block);
      queue.push_front(block);
    }
    content[block] = {};
  }

  int32_t find(const Content& what) const {
    const auto found = std::find(content.begin(), content.end(), what);
    return found == content.end() ? kNoBlock : static_cast<int32_t>(found - content.begin());
  }

  bool is_indexed(int32_t block) const { return !content[block].tokens.empty(); }

  BlockState state(int32_t block) const {
    if (refs[block] > 0) return BlockState::kActive;
    return is_indexed(block) ? BlockState::kCached : BlockState::kFree;
  }

  int32_t num_blocks() const { return static_cast<int32_t>(refs.size()); }

  std::vector<int32_t> refs;
  std::vector<Content> content;  // as the index finds it
  std::deque<int32_t> queue;     // next to be allocated first
  std::array<int64_t, kNumBlockOwners> owned{};

  Model* next_tier = nullptr;
  std::vector<Eviction> evictions;
  // The books of the eviction that comes after so many others cannot be kept, -1: of none; nor, if
  // memory does not come back, those of any later one.
  int32_t num_until_loss = -1;
  bool keeps_losing = false;
  int64_t num_without_memory = 0;
  // What became of evicted content.
  int64_t num_copied = 0, num_there_already = 0, num_lost = 0;

 private:
  void unqueue(int32_t block) { queue.erase(std::find(queue.begin(), queue.end(), block)); }

  void move_to_next_tier(const Content& what, int32_t block) {
    Model& tier = *next_tier;
    int32_t there = tier.find(what);
    if (there != kNoBlock) {
      ++num_there_already;
      if (tier.refs[there] == 0) {
        tier.unqueue(there);
        tier.queue.push_back(there);
      }
      return;
    }
    if (tier.queue.empty()) {
      ++num_lost;
      return;
    }
    there = tier.queue.front();
    if (num_until_loss == 0) {
      if (!keeps_losing) num_until_loss = -1;
      ++num_without_memory;
      tier.content[there] = {};
      return;
    }
    if (num_until_loss > 0) --num_until_loss;
    ++num_copied;
    tier.queue.pop_front();
    tier.queue.push_back(there);
    tier.content[there] = what;
    evictions.push_back({block, there});
  }
};

// An allocator and its model: each operation is asked of both, which must agree.
class CheckedPool {
 private:
  template <class Call>
  void make(const Call& call) {
    failure_went_unnoticed_ = false;
    if (!attempt) return call();
    failure_went_unnoticed_ = attempt(std::cref(call));
  }

  // What the model does. Where memory failed and nobody said so, the content of one of the evicted
  // blocks is lost, whichever.
  template <class Step>
  auto predict(const Step& step) {
    if (!failure_went_unnoticed_) return step();
    CHECK(below != nullptr);
    const Model before = model, below_before = below->model;
    for (int32_t lost = 0;; ++lost) {
      model.num_until_loss = lost;
      const auto result = step();
      const bool is_lost = model.num_without_memory > before.num_without_memory;
      model.num_until_loss = -1;
      if (!is_lost || (agrees() && below->agrees())) {
        CHECK(is_lost);
        return result;
      }
      model = before;
      below->model = below_before;
    }
  }

 public:
  CheckedPool(int32_t num_blocks, int32_t block_size, uint64_t hash_key)
      : allocator(num_blocks, block_size, hash_key), model(num_blocks), memory(num_blocks) {}

  // Also where one of them has been copied.
  void set_next_tier(CheckedPool& tier) {
    below = &tier;
    tier.above = this;
    allocator.set_next_tier(&tier.allocator);
    model.next_tier = &tier.model;
  }

  int32_t num_blocks() const { return model.num_blocks(); }
  bool is_full() const { return model.queue.empty(); }

  // kNoBlock if there is none.
  int32_t allocate(BlockOwner owner) {
    int32_t block = kNoBlock;
    const auto call = [&] { block = allocator.allocate(owner); };
    if (is_full()) {
      CHECK_THROWS(make(call), OutOfBlocks);
      return kNoBlock;
    }
    make(call);
    CHECK(block == predict([&] { return model.allocate(owner); }));
    return block;
  }

  std::vector<int32_t> allocate_many(int32_t count, BlockOwner owner) {
    std::vector<int32_t> blocks;
    const auto call = [&] { blocks = allocator.allocate_many(count, owner); };
    if (count > static_cast<int32_t>(model.queue.size())) {
      CHECK_THROWS(make(call), OutOfBlocks);
      return {};
    }
    make(call);
    CHECK(blocks == predict([&] {
            std::vector<int32_t> expected(count);
            for (int32_t& block : expected) block = model.allocate(owner);
            return expected;
          }));
    return blocks;
  }

  void share(int32_t block, BlockOwner owner) {
    make([&] { allocator.share(block, owner); });
    model.share(block, owner);
  }

  void free(int32_t block, BlockOwner owner) {
    make([&] { allocator.free(block, owner); });
    model.free(block, owner);
  }

  void free_many(const std::vector<int32_t>& blocks, BlockOwner owner) {
    make([&] { allocator.free_many(blocks, owner); });
    // A block named twice is released where it is named last.
    for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) {
      if (std::find(blocks.rbegin(), block, *block) != block) continue;
      for (auto n = std::count(blocks.begin(), blocks.end(), *block); n > 0; --n) {
        model.free(*block, owner);
      }
    }
  }

  // The block that the caller has now. It is written into.
  int32_t make_writable(int32_t block) {
    int32_t writable = block;
    const auto call = [&] { writable = allocator.make_writable(block); };
    if (model.refs[block] > 1 && is_full()) {
      CHECK_THROWS(make(call), OutOfBlocks);
      return block;
    }
    make(call);
    CHECK(writable == predict([&] { return model.make_writable(block); }));
    write(writable, {});
    return writable;
  }

  // Of a block that holds something else already, an error.
  void commit(int32_t block, const Content& what) {
    BlockHash hash;
    const auto call = [&] { hash = allocator.commit(block, what.parent, what.tokens.data()); };
    if (model.is_indexed(block) && !(model.content[block] == what)) {
      CHECK_THROWS(make(call), std::invalid_argument);
      return;
    }
    if (!model.is_indexed(block)) write(block, what);
    make(call);
    CHECK(hash == allocator.hash(what.parent, what.tokens.data()));
    model.commit(block, what);
  }

  int32_t lookup(const Content& what, BlockOwner owner) {
    int32_t block = kNoBlock;
    make([&] { block = allocator.lookup(what.parent, what.tokens.data(), owner); });
    CHECK(block == model.lookup(what, owner));
    if (block != kNoBlock) {
      if (above != nullptr) above->copy_evictions();
      CHECK(memory[block] == what);
    }
    return block;
  }

  void forget(int32_t block) {
    make([&] { allocator.forget(block); });
    model.forget(block);
  }

  // A call that must throw and change nothing.
  template <class Call>
  void refuse(const Call& call) {
    CHECK_THROWS(make(call), std::invalid_argument);
  }

  void copy_evictions() {
    if (below == nullptr) return;
    const std::vector<Eviction> evictions = allocator.take_evictions();
    CHECK(evictions == model.evictions);
    for (const Eviction& eviction : evictions) {
      below->memory[eviction.tier_block] = memory[eviction.block];
    }
    model.evictions.clear();
  }

  // Whether everything that can be known of the allocator is as in the model.
  bool agrees() {
    using Peer = BlockAllocatorPeer;
    bool equal = Peer::evictions(allocator) == model.evictions &&
                 allocator.num_free() == static_cast<int32_t>(model.queue.size()) &&
                 allocator.num_active() + allocator.num_free() == num_blocks();
    int32_t queued = Peer::block(allocator, num_blocks()).next, num_cached = 0;
    for (const int32_t block : model.queue) {
      equal = equal && queued == block;
      if (!equal) return false;
      queued = Peer::block(allocator, queued).next;
      num_cached += model.is_indexed(block);
    }
    equal = equal && allocator.num_cached() == num_cached;
    for (const BlockOwner owner : kOwners) {
      equal = equal && allocator.num_references(owner) == model.references(owner);
    }
    const int32_t block_size = allocator.block_size();
    for (int32_t block = 0; equal && block < num_blocks(); ++block) {
      const Peer::Block& entry = Peer::block(allocator, block);
      equal = allocator.state(block) == model.state(block) &&
              allocator.ref_count(block) == model.refs[block] &&
              entry.is_indexed == model.is_indexed(block);
      if (!equal || !entry.is_indexed) continue;
      const int32_t* tokens = &Peer::token(allocator, block * block_size);
      equal = entry.parent == model.content[block].parent &&
              std::equal(tokens, tokens + block_size, model.content[block].tokens.begin());
    }
    return equal;
  }

  void check() {
    bool sound = true;
    try {
      allocator.check_integrity();
    } catch (const std::logic_error& error) {
      std::fprintf(stderr, "%s\n", error.what());
      sound = false;
    }
    CHECK(sound);
    CHECK(agrees());
    if (below != nullptr) below->check();
  }

  BlockAllocator allocator;
  Model model;
  std::vector<Content> memory;  // what is in each block; whether the index knows it or not
  CheckedPool* above = nullptr;
  CheckedPool* below = nullptr;
  // Makes a call of the allocator, in ways of its own, and says whether a failure went unnoticed.
  std::function<bool(const std::function<void()>&)> attempt;

 private:
  // After the copies from the block, or to it.
  void write(int32_t block, const Content& what) {
    const auto touches = [block](const Eviction& e) { return e.block == block; };
    const auto& evictions = model.evictions;
    if (std::any_of(evictions.begin(), evictions.end(), touches)) copy_evictions();
    if (above != nullptr) above->copy_evictions();
    memory[block] = what;
  }

  bool failure_went_unnoticed_ = false;
};

}  // namespace test
}  // namespace nano_vllm
