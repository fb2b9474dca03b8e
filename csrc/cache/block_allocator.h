// The pool of KV blocks: who holds which block, and which of the others still have content worth
// finding again.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#include "cache/block_hash.h"

namespace nano_vllm {

// No block is left to allocate. Nothing has changed.
class OutOfBlocks : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

enum class BlockState : uint8_t { kFree, kActive, kCached };

// What a reference is for. References are counted by it, so that who keeps books of its own can
// compare: a reference too many is one that somebody has lost.
enum class BlockOwner : uint8_t {
  kSequence,  // a block table
  kPin,       // content that shall not be evicted
  kTransfer,  // a copy under way
};
inline constexpr int kNumBlockOwners = 3;

// The content of an evicted block is to be copied into a block of the next tier, before anything is
// written into it.
struct Eviction {
  int32_t block, tier_block;
};

// A fixed pool of blocks, numbered from 0, of block_size tokens each. It manages numbers alone: the
// keys and values live elsewhere. Every operation takes constant time for each block it names
// (hashing and comparing tokens: for each token). Not thread-safe.
//
// A block is in one of three states:
//   Free    nobody holds it and its content means nothing.
//   Active  it is held; its reference count says by how many.
//   Cached  nobody holds it, but the index finds it by its content.
//
// and changes state in these ways only:
//   Free   -> Active   allocate, make_writable
//   Cached -> Active   lookup, which keeps the content; and, where no block is Free, allocate and
//                      make_writable, which evict the least recently used Cached block: its content
//                      is lost
//   Active -> Free     the last holder frees a block that is not in the index
//   Active -> Cached   the last holder frees a block that is
//
// Invariants, verified by check_integrity():
//   1. A block's reference count is at least 1 if it is Active, else 0.
//   2. The free queue links every Free and every Cached block once, and no Active one: first the
//      Free, then the Cached, the least recently used first. Its head is what is allocated next.
//   3. A Cached block is indexed, a Free one is not, an Active one may be.
//   4. The index maps the hash of each indexed block to that block and holds nothing else.
//   5. An indexed block's hash is that of its parent and tokens. It never changes while the block
//      is indexed: who writes into a block calls make_writable first.
//   6. The reference counts add up to the references of all owners.
//
// With a next tier, a pool of slower memory, what is evicted here is indexed there, as a Cached
// block, unless it is there already; and take_evictions says what to copy.
//
// std::invalid_argument names a block that is out of range, or that nobody holds where an operation
// needs a held one (so a block cannot be freed twice); the pool is then unchanged.
class BlockAllocator {
 public:
  static constexpr int32_t kNoBlock = -1;

  // hash_key is a secret of the process: who knows it could prepare texts whose hashes collide.
  BlockAllocator(int64_t num_blocks, int64_t block_size, uint64_t hash_key = 0);

  int32_t num_blocks() const { return num_blocks_; }
  int32_t block_size() const { return block_size_; }
  // Free and Cached: what can be allocated.
  int32_t num_free() const { return num_free_; }
  int32_t num_cached() const { return num_cached_; }
  int32_t num_active() const { return num_blocks_ - num_free_; }
  int64_t num_references(BlockOwner owner) const { return references_[index_of(owner)]; }

  // A block with one reference. Throws OutOfBlocks.
  int32_t allocate(BlockOwner owner = BlockOwner::kSequence);
  // That many, or OutOfBlocks and none.
  std::vector<int32_t> allocate_many(int64_t count, BlockOwner owner = BlockOwner::kSequence);

  // Adds a reference to a held block.
  void share(int64_t block, BlockOwner owner = BlockOwner::kSequence);
  // Takes a reference away. Throws std::invalid_argument if the owner has none.
  void free(int64_t block, BlockOwner owner = BlockOwner::kSequence);
  // Takes away one reference for each mention, of all blocks or, if it throws, of none. A
  // sequence's blocks come in order: its tail is released first, hence evicted first, as it cannot
  // be found without its head.
  void free_many(const std::vector<int32_t>& blocks, BlockOwner owner = BlockOwner::kSequence);

  int32_t ref_count(int64_t block) const;
  BlockState state(int64_t block) const;

  // Copy-on-write, for a sequence. Returns the same block, taken out of the index, if the caller
  // alone holds it; else a new one, to which the caller's reference has moved and the caller copies
  // the content. Throws OutOfBlocks; std::invalid_argument if sequences have no references.
  int32_t make_writable(int64_t block);

  // Of block_size tokens after the parent.
  BlockHash hash(const BlockHash& parent, const int32_t* token_ids) const;

  // Says what a held block contains, block_size tokens after the parent, so that lookup finds it.
  // Where an equal block is in the index already, that one stays and this one is not indexed.
  // Throws std::invalid_argument if the block is indexed with other content.
  BlockHash commit(int64_t block, const BlockHash& parent, const int32_t* token_ids);

  // The block of this content with one reference added, or kNoBlock. Tokens and parent are compared
  // as well as the hash: a collision is a miss.
  int32_t lookup(const BlockHash& parent, const int32_t* token_ids,
                 BlockOwner owner = BlockOwner::kSequence);
  // Takes a block out of the index, whoever holds it: its content is not what commit was told.
  void forget(int64_t block);

  // Where evicted content goes: a pool of the same block size and hash key, which must outlive this
  // one and have no next tier itself; or null. Throws std::invalid_argument.
  void set_next_tier(BlockAllocator* tier);
  // Since the last call, in the order in which the copies are to be made.
  std::vector<Eviction> take_evictions();

  // Throws std::logic_error that names the broken invariant and the block.
  void check_integrity() const;

 private:
  friend struct BlockAllocatorPeer;  // by which the tests break the invariants

  struct Block {
    BlockState state = BlockState::kFree;
    bool is_indexed = false;
    int32_t ref_count = 0;
    int32_t previous = kNoBlock;  // in the free queue; kNoBlock while Active
    int32_t next = kNoBlock;
    BlockHash hash;    // of an indexed block
    BlockHash parent;  // of an indexed block
  };

  static size_t index_of(BlockOwner owner) { return static_cast<size_t>(owner); }
  int32_t checked(int64_t block) const;
  int32_t checked_held(int64_t block) const;
  void check_has(BlockOwner owner, int64_t count) const;
  int32_t take_head(BlockOwner owner);
  void move_to_next_tier(int32_t block);
  void activate(int32_t block, BlockOwner owner);
  void release(int32_t block);
  void link_before(int32_t block, int32_t next);
  void remove_from_index(Block& block);
  int32_t* tokens_of(int32_t block) { return &tokens_[int64_t{block} * block_size_]; }
  const int32_t* tokens_of(int32_t block) const { return &tokens_[int64_t{block} * block_size_]; }

  int32_t num_blocks_;
  int32_t block_size_;
  uint64_t hash_key_;
  int32_t num_free_;
  int32_t num_cached_ = 0;
  std::vector<Block>
      blocks_;  // one more than num_blocks: the last one closes the free queue's ring
  std::vector<int32_t> tokens_;  // [num_blocks, block_size]; of indexed blocks
  std::unordered_map<BlockHash, int32_t, BlockHash::Bucket> index_;
  std::array<int64_t, kNumBlockOwners> references_{};
  BlockAllocator* next_tier_ = nullptr;
  std::vector<Eviction> evictions_;
};

}  // namespace nano_vllm
