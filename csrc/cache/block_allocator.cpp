#include "cache/block_allocator.h"

#include <algorithm>
#include <limits>
#include <new>
#include <string>

#include "common/error.h"

namespace nano_vllm {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

int32_t checked_size(const char* name, int64_t size) {
  check(size >= 1 && size < kMaxInt32, name, " must be in [1, ", kMaxInt32, "), got ", size);
  return static_cast<int32_t>(size);
}

}  // namespace

BlockAllocator::BlockAllocator(int64_t num_blocks, int64_t block_size, uint64_t hash_key)
    : num_blocks_(checked_size("num_blocks", num_blocks)),
      block_size_(checked_size("block_size", block_size)),
      hash_key_(hash_key),
      num_free_(num_blocks_),
      blocks_(static_cast<size_t>(num_blocks) + 1),
      tokens_(static_cast<size_t>(num_blocks) * static_cast<size_t>(block_size)) {
  index_.reserve(static_cast<size_t>(num_blocks));
  const int32_t end = num_blocks_;
  blocks_[end].previous = blocks_[end].next = end;
  for (int32_t block = 0; block < num_blocks_; ++block) link_before(block, end);
}

int32_t BlockAllocator::allocate(BlockOwner owner) {
  if (num_free_ == 0) {
    throw OutOfBlocks("all " + std::to_string(num_blocks_) + " KV blocks are in use");
  }
  return take_head(owner);
}

std::vector<int32_t> BlockAllocator::allocate_many(int64_t count, BlockOwner owner) {
  check(count >= 0, "the number of blocks must be at least 0, got ", count);
  if (count > num_free_) {
    throw OutOfBlocks(std::to_string(count) + " KV blocks asked for, " + std::to_string(num_free_) +
                      " of " + std::to_string(num_blocks_) + " are free");
  }
  std::vector<int32_t> blocks(static_cast<size_t>(count));
  for (int32_t& block : blocks) block = take_head(owner);
  return blocks;
}

void BlockAllocator::share(int64_t block, BlockOwner owner) {
  Block& entry = blocks_[checked_held(block)];
  check(entry.ref_count < kMaxInt32, "block ", block, " has ", kMaxInt32, " references already");
  ++entry.ref_count;
  ++references_[index_of(owner)];
}

void BlockAllocator::free(int64_t block, BlockOwner owner) {
  const int32_t held = checked_held(block);
  check_has(owner, 1);
  --references_[index_of(owner)];
  if (--blocks_[held].ref_count == 0) release(held);
}

void BlockAllocator::free_many(const std::vector<int32_t>& blocks, BlockOwner owner) {
  // All references first: only then is it known that none is missing.
  const auto count = static_cast<int64_t>(blocks.size());
  for (size_t i = 0; i < blocks.size(); ++i) {
    try {
      Block& entry = blocks_[checked_held(blocks[i])];
      check(entry.ref_count > 0, "block ", blocks[i], " is freed more often than it is held");
      --entry.ref_count;
    } catch (...) {
      while (i-- > 0) ++blocks_[blocks[i]].ref_count;
      throw;
    }
  }
  try {
    check_has(owner, count);
  } catch (...) {
    for (const int32_t block : blocks) ++blocks_[block].ref_count;
    throw;
  }
  references_[index_of(owner)] -= count;
  for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) {
    const Block& entry = blocks_[*block];
    if (entry.ref_count == 0 && entry.state == BlockState::kActive) release(*block);
  }
}

int32_t BlockAllocator::ref_count(int64_t block) const { return blocks_[checked(block)].ref_count; }

BlockState BlockAllocator::state(int64_t block) const { return blocks_[checked(block)].state; }

int32_t BlockAllocator::make_writable(int64_t block) {
  Block& entry = blocks_[checked_held(block)];
  check_has(BlockOwner::kSequence, 1);
  if (entry.ref_count == 1) {
    remove_from_index(entry);
    return static_cast<int32_t>(block);
  }
  const int32_t copy = allocate();
  --entry.ref_count;
  --references_[index_of(BlockOwner::kSequence)];
  return copy;
}

BlockHash BlockAllocator::hash(const BlockHash& parent, const int32_t* token_ids) const {
  return hash_block(hash_key_, parent, token_ids, block_size_);
}

BlockHash BlockAllocator::commit(int64_t block, const BlockHash& parent, const int32_t* token_ids) {
  const int32_t held = checked_held(block);
  Block& entry = blocks_[held];
  const BlockHash content = hash(parent, token_ids);
  if (entry.is_indexed) {
    check(entry.hash == content, "block ", block,
          " is committed with other content; make it writable first");
    return content;
  }
  if (index_.try_emplace(content, held).second) {
    entry.is_indexed = true;
    entry.hash = content;
    entry.parent = parent;
    std::copy_n(token_ids, block_size_, tokens_of(held));
  }
  return content;
}

int32_t BlockAllocator::lookup(const BlockHash& parent, const int32_t* token_ids,
                               BlockOwner owner) {
  const auto found = index_.find(hash(parent, token_ids));
  if (found == index_.end()) return kNoBlock;
  const int32_t block = found->second;
  const Block& entry = blocks_[block];
  if (entry.parent != parent || !std::equal(token_ids, token_ids + block_size_, tokens_of(block))) {
    return kNoBlock;
  }
  if (entry.state == BlockState::kActive) {
    share(block, owner);
  } else {
    activate(block, owner);
  }
  return block;
}

void BlockAllocator::forget(int64_t block) {
  const int32_t forgotten = checked(block);
  Block& entry = blocks_[forgotten];
  if (entry.state == BlockState::kCached) {
    // To the head of the queue, where the Free ones are.
    activate(forgotten, BlockOwner::kSequence);
    remove_from_index(entry);
    free(forgotten);
    return;
  }
  remove_from_index(entry);
}

void BlockAllocator::set_next_tier(BlockAllocator* tier) {
  if (tier != nullptr) {
    check(tier != this && tier->block_size_ == block_size_ && tier->hash_key_ == hash_key_,
          "the next tier must be another pool of the same block size and hash key");
    check(tier->next_tier_ == nullptr, "the next tier must have no next tier itself");
  }
  next_tier_ = tier;
}

std::vector<Eviction> BlockAllocator::take_evictions() {
  std::vector<Eviction> taken;
  taken.swap(evictions_);
  return taken;
}

int32_t BlockAllocator::checked(int64_t block) const {
  check(block >= 0 && block < num_blocks_, "block must be in [0, ", num_blocks_, "), got ", block);
  return static_cast<int32_t>(block);
}

int32_t BlockAllocator::checked_held(int64_t block) const {
  const int32_t in_range = checked(block);
  check(blocks_[in_range].state == BlockState::kActive, "block ", block, " is held by nobody");
  return in_range;
}

void BlockAllocator::check_has(BlockOwner owner, int64_t count) const {
  static constexpr const char* kNames[kNumBlockOwners] = {"sequences", "pins", "transfers"};
  const int64_t held = references_[index_of(owner)];
  check(count <= held, count, " references of ", kNames[index_of(owner)],
        " are freed, but there are ", held);
}

// The head of the free queue, which must not be empty, as an Active block without content.
int32_t BlockAllocator::take_head(BlockOwner owner) {
  const int32_t block = blocks_[num_blocks_].next;
  if (next_tier_ != nullptr && blocks_[block].is_indexed) move_to_next_tier(block);
  activate(block, owner);
  remove_from_index(blocks_[block]);
  return block;
}

// The content is lost where the next tier is full of held blocks, or memory for the books is short.
void BlockAllocator::move_to_next_tier(int32_t block) {
  BlockAllocator& tier = *next_tier_;
  const Block& entry = blocks_[block];
  int32_t there = tier.lookup(entry.parent, tokens_of(block), BlockOwner::kTransfer);
  if (there == kNoBlock) {
    if (tier.num_free_ == 0) return;
    there = tier.allocate(BlockOwner::kTransfer);
    const size_t num_evictions = evictions_.size();
    try {
      evictions_.push_back({block, there});
      tier.commit(there, entry.parent, tokens_of(block));
    } catch (const std::bad_alloc&) {
      evictions_.resize(num_evictions);
    }
  }
  tier.free(there, BlockOwner::kTransfer);
}

void BlockAllocator::activate(int32_t block, BlockOwner owner) {
  Block& entry = blocks_[block];
  blocks_[entry.previous].next = entry.next;
  blocks_[entry.next].previous = entry.previous;
  entry.previous = entry.next = kNoBlock;
  --num_free_;
  if (entry.state == BlockState::kCached) --num_cached_;
  entry.state = BlockState::kActive;
  entry.ref_count = 1;
  ++references_[index_of(owner)];
}

// An Active block whose last reference is gone joins the free queue: without content at the head,
// with content at the tail.
void BlockAllocator::release(int32_t block) {
  Block& entry = blocks_[block];
  const int32_t end = num_blocks_;
  link_before(block, entry.is_indexed ? end : blocks_[end].next);
  ++num_free_;
  if (entry.is_indexed) ++num_cached_;
  entry.state = entry.is_indexed ? BlockState::kCached : BlockState::kFree;
}

void BlockAllocator::link_before(int32_t block, int32_t next) {
  const int32_t previous = blocks_[next].previous;
  blocks_[block].previous = previous;
  blocks_[block].next = next;
  blocks_[previous].next = blocks_[next].previous = block;
}

void BlockAllocator::remove_from_index(Block& block) {
  if (!block.is_indexed) return;
  index_.erase(block.hash);
  block.is_indexed = false;
}

void BlockAllocator::check_integrity() const {
  const auto require = [](bool ok, const char* broken, int32_t block) {
    if (!ok) {
      throw std::logic_error(std::string("block allocator: ") + broken + " (block " +
                             std::to_string(block) + ")");
    }
  };

  const int32_t end = num_blocks_;
  std::vector<bool> is_queued(blocks_.size());
  int32_t num_queued = 0, num_cached = 0;
  int32_t previous = end;
  for (int32_t block = blocks_[end].next; block != end; block = blocks_[block].next) {
    require(block >= 0 && block < num_blocks_, "the free queue holds a number out of range", block);
    const Block& entry = blocks_[block];
    require(!is_queued[block], "the free queue holds a block twice", block);
    require(entry.previous == previous, "the free queue's links disagree", block);
    require(entry.state != BlockState::kActive, "an Active block is in the free queue", block);
    require(entry.state == BlockState::kCached || num_cached == 0,
            "a Free block comes after a Cached one in the free queue", block);
    is_queued[block] = true;
    ++num_queued;
    if (entry.state == BlockState::kCached) ++num_cached;
    previous = block;
  }
  require(blocks_[end].previous == previous, "the free queue's tail is not its last block",
          previous);
  require(num_queued == num_free_, "num_free is not the number of queued blocks", num_free_);
  require(num_cached == num_cached_, "num_cached is not the number of Cached blocks", num_cached_);

  size_t num_indexed = 0;
  int64_t num_references = 0;
  for (int32_t block = 0; block < num_blocks_; ++block) {
    const Block& entry = blocks_[block];
    const bool is_active = entry.state == BlockState::kActive;
    require(is_active ? entry.ref_count >= 1 : entry.ref_count == 0,
            "the reference count contradicts the state", block);
    require(is_active != is_queued[block], "a Free or Cached block is not in the free queue",
            block);
    require(is_active || entry.is_indexed == (entry.state == BlockState::kCached),
            "a Cached block is not indexed, or a Free one is", block);
    num_references += entry.ref_count;
    if (!entry.is_indexed) continue;
    ++num_indexed;
    const auto found = index_.find(entry.hash);
    require(found != index_.end() && found->second == block,
            "the index does not map a block's hash to it", block);
    require(hash(entry.parent, tokens_of(block)) == entry.hash,
            "a block's hash is not that of its content", block);
  }
  for (const int64_t count : references_) {
    require(count >= 0, "an owner has fewer than no references", end);
    num_references -= count;
  }
  require(num_references == 0, "the references of the owners are not those of the blocks", end);
  require(num_indexed == index_.size(), "the index holds a block that is not marked as indexed",
          end);
}

}  // namespace nano_vllm
