// Every state that a small pool can come to, breadth first: each operation on each state, against
// the model. States that differ in names alone (of blocks, contents, sequences) are one.
// NANO_VLLM_NIGHTLY in the environment: larger pools too.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <unordered_set>
#include <utility>
#include <vector>

#include "block_allocator_model.h"
#include "block_allocator_walk.h"
#include "check.h"

namespace nano_vllm {
namespace test {
namespace {

struct Bounds {
  int32_t num_blocks, num_tier_blocks;  // of the tier, 0: there is none
  size_t num_contents;                  // at most 3
  size_t max_held;                      // by each sequence
  size_t max_tier_held;
};

// The same token after another parent is another content.
const Content kContents[] = {{{}, {1}}, {{}, {2}}, {{5, 6}, {1}}};

constexpr int kNumHolders = 3;
constexpr BlockOwner kHolders[kNumHolders] = {BlockOwner::kSequence, BlockOwner::kSequence,
                                              BlockOwner::kPin};

struct World {
  explicit World(const Bounds& bounds)
      : pool(bounds.num_blocks, 1, 7), tier(std::max(bounds.num_tier_blocks, 1), 1, 7) {
    if (bounds.num_tier_blocks > 0) pool.set_next_tier(tier);
  }
  World(const World& other)
      : pool(other.pool), tier(other.tier), held(other.held), tier_held(other.tier_held) {
    if (pool.below != nullptr) pool.set_next_tier(tier);
  }

  // What is left of a state without the names. Each block is in the queue or held, each content
  // in a block: they are numbered as they come.
  BlockHash key() const {
    BlockHash least = key_of({0, 1, 2});
    const BlockHash other = key_of({1, 0, 2});
    if (std::make_pair(other.high, other.low) < std::make_pair(least.high, least.low)) {
      least = other;
    }
    return least;
  }

  CheckedPool pool, tier;
  std::array<std::vector<int32_t>, kNumHolders> held;
  std::vector<int32_t> tier_held;  // by transfers

 private:
  BlockHash key_of(const std::array<int, kNumHolders>& order) const {
    std::vector<int32_t> words;
    std::vector<const Content*> contents;
    const auto number_content = [&](const Content& content) {
      if (content.tokens.empty()) return -1;
      const auto known = std::find_if(contents.begin(), contents.end(),
                                      [&](const Content* other) { return *other == content; });
      const auto number = static_cast<int32_t>(known - contents.begin());
      if (known == contents.end()) contents.push_back(&content);
      return number;
    };
    const auto add = [&](const Model& model,
                         const std::vector<const std::vector<int32_t>*>& lists) {
      std::vector<int32_t> blocks(model.queue.begin(), model.queue.end());
      words.push_back(static_cast<int32_t>(blocks.size()));
      for (const auto* list : lists) {
        words.push_back(static_cast<int32_t>(list->size()));
        for (const int32_t block : *list) {
          const auto known = std::find(blocks.begin(), blocks.end(), block);
          words.push_back(static_cast<int32_t>(known - blocks.begin()));
          if (known == blocks.end()) blocks.push_back(block);
        }
      }
      for (const int32_t block : blocks) words.push_back(number_content(model.content[block]));
    };
    add(pool.model, {&held[order[0]], &held[order[1]], &held[order[2]]});
    add(tier.model, {&tier_held});
    return hash_block(0, {}, words.data(), static_cast<int64_t>(words.size()));
  }
};

class Exploration {
 public:
  explicit Exploration(const Bounds& bounds) : bounds_(bounds) {}

  void run() {
    reach(std::make_unique<World>(bounds_));
    int64_t depth = -1;
    for (; !frontier_.empty(); ++depth) {
      std::vector<std::unique_ptr<World>> level;
      level.swap(frontier_);
      for (std::unique_ptr<World>& world : level) {
        expand(*world);
        misuse(*world);
        world.reset();
      }
    }
    std::printf("%d blocks, %d of the next tier: %zu states, %lld operations, depth %lld\n",
                bounds_.num_blocks, bounds_.num_tier_blocks, seen_.size(),
                static_cast<long long>(num_operations_), static_cast<long long>(depth));
    CHECK(seen_.size() > 1);
  }

 private:
  void reach(std::unique_ptr<World> world) {
    world->pool.copy_evictions();
    world->pool.check();
    if (seen_.insert(world->key()).second) frontier_.push_back(std::move(world));
  }

  template <class Operation>
  void apply(const World& from, const Operation& operation) {
    auto world = std::make_unique<World>(from);
    operation(*world);
    ++num_operations_;
    reach(std::move(world));
  }

  void expand(const World& from) {
    for (int s = 0; s < kNumHolders; ++s) expand_holder(from, s);
    for (int32_t block = 0; block < bounds_.num_blocks; ++block) {
      apply(from, [&](World& world) { world.pool.forget(block); });
    }
    if (bounds_.num_tier_blocks > 0) expand_tier(from);
  }

  void expand_holder(const World& from, int s) {
    const BlockOwner owner = kHolders[s];
    const std::vector<int32_t>& held = from.held[s];
    const size_t room = bounds_.max_held - held.size();
    if (room > 0) {
      apply(from, [&](World& world) {
        const int32_t block = world.pool.allocate(owner);
        if (block != kNoBlock) world.held[s].push_back(block);
      });
      for (int32_t block = 0; block < bounds_.num_blocks; ++block) {
        if (from.pool.model.refs[block] == 0) continue;
        apply(from, [&](World& world) {
          world.pool.share(block, owner);
          world.held[s].push_back(block);
        });
      }
      for (size_t c = 0; c < bounds_.num_contents; ++c) {
        apply(from, [&](World& world) {
          const int32_t block = world.pool.lookup(kContents[c], owner);
          if (block != kNoBlock) world.held[s].push_back(block);
        });
      }
    }
    for (size_t count = 2; count <= room; ++count) {
      apply(from, [&](World& world) {
        const auto blocks = world.pool.allocate_many(static_cast<int32_t>(count), owner);
        world.held[s].insert(world.held[s].end(), blocks.begin(), blocks.end());
      });
    }
    for (size_t i = 0; i < held.size(); ++i) {
      apply(from, [&](World& world) {
        world.pool.free(held[i], owner);
        world.held[s].erase(world.held[s].begin() + static_cast<int64_t>(i));
      });
      for (size_t c = 0; c < bounds_.num_contents; ++c) {
        apply(from, [&](World& world) { world.pool.commit(held[i], kContents[c]); });
      }
      if (owner != BlockOwner::kSequence) continue;
      apply(from,
            [&](World& world) { world.held[s][i] = world.pool.make_writable(world.held[s][i]); });
    }
    apply(from, [&](World& world) {
      world.pool.free_many(held, owner);
      world.held[s].clear();
    });
  }

  void expand_tier(const World& from) {
    constexpr BlockOwner kOwner = BlockOwner::kTransfer;
    for (int32_t block = 0; block < bounds_.num_tier_blocks; ++block) {
      apply(from, [&](World& world) { world.tier.forget(block); });
    }
    for (size_t i = 0; i < from.tier_held.size(); ++i) {
      apply(from, [&](World& world) {
        world.tier.free(from.tier_held[i], kOwner);
        world.tier_held.erase(world.tier_held.begin() + static_cast<int64_t>(i));
      });
    }
    if (from.tier_held.size() == bounds_.max_tier_held) return;
    apply(from, [&](World& world) {
      const int32_t block = world.tier.allocate(kOwner);
      if (block != kNoBlock) world.tier_held.push_back(block);
    });
    for (size_t c = 0; c < bounds_.num_contents; ++c) {
      apply(from, [&](World& world) {
        const int32_t block = world.tier.lookup(kContents[c], kOwner);
        if (block != kNoBlock) world.tier_held.push_back(block);
      });
    }
  }

  // What must throw and change nothing.
  void misuse(World& world) {
    BlockAllocator& allocator = world.pool.allocator;
    for (int32_t block = 0; block < bounds_.num_blocks; ++block) {
      const int32_t refs = world.pool.model.refs[block];
      const std::vector<int32_t> once_too_often(static_cast<size_t>(refs) + 1, block);
      world.pool.refuse([&] { allocator.free_many(once_too_often); });
      if (refs > 0) {
        world.pool.refuse([&] { allocator.free(block, BlockOwner::kTransfer); });
        continue;
      }
      world.pool.refuse([&] { allocator.free(block); });
    }
    world.pool.check();
  }

  Bounds bounds_;
  std::unordered_set<BlockHash, BlockHash::Bucket> seen_;
  std::vector<std::unique_ptr<World>> frontier_;
  int64_t num_operations_ = 0;
};

}  // namespace
}  // namespace test
}  // namespace nano_vllm

int main() {
  using namespace nano_vllm::test;
  for (const Bounds& bounds : {Bounds{4, 0, 3, 2, 0}, Bounds{2, 1, 3, 2, 1}, Bounds{3, 1, 2, 1, 1},
                               Bounds{4, 2, 3, 1, 2}}) {
    Exploration(bounds).run();
  }
  if (is_nightly()) {
    for (const Bounds& bounds : {Bounds{2, 0, 3, 3, 0}, Bounds{4, 0, 3, 3, 0},
                                 Bounds{2, 2, 3, 2, 2}, Bounds{3, 1, 3, 2, 1}}) {
      Exploration(bounds).run();
    }
  }
  return report_checks();
}
