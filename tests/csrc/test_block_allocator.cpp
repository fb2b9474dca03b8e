// The block allocator against a plain model that predicts every result, block numbers included,
// over a million random operations, bad ones among them.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
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
};

namespace test {
namespace {

using Tokens = std::vector<int32_t>;

// The same pool with linear searches: a block is what `content`, `refs` and `queue` say.
class Model {
 public:
  struct Content {
    BlockHash parent;
    Tokens tokens;
    bool operator==(const Content& other) const {
      return parent == other.parent && tokens == other.tokens;
    }
  };

  explicit Model(int32_t num_blocks) : refs(num_blocks), content(num_blocks) {
    for (int32_t block = 0; block < num_blocks; ++block) queue.push_back(block);
  }

  int32_t allocate() {
    const int32_t block = queue.front();
    queue.pop_front();
    refs[block] = 1;
    content[block] = {};
    return block;
  }

  void free(int32_t block) {
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
    return allocate();
  }

  void commit(int32_t block, const Content& what) {
    if (find(what) == BlockAllocator::kNoBlock) content[block] = what;
  }

  int32_t lookup(const Content& what) {
    const int32_t block = find(what);
    if (block == BlockAllocator::kNoBlock) return block;
    if (refs[block]++ == 0) queue.erase(std::find(queue.begin(), queue.end(), block));
    return block;
  }

  int32_t find(const Content& what) const {
    const auto found = std::find(content.begin(), content.end(), what);
    return found == content.end() ? BlockAllocator::kNoBlock
                                  : static_cast<int32_t>(found - content.begin());
  }

  bool is_indexed(int32_t block) const { return !content[block].tokens.empty(); }

  BlockState state(int32_t block) const {
    if (refs[block] > 0) return BlockState::kActive;
    return is_indexed(block) ? BlockState::kCached : BlockState::kFree;
  }

  int32_t num_cached() const {
    int32_t count = 0;
    for (const int32_t block : queue) count += is_indexed(block);
    return count;
  }

  std::vector<int32_t> refs;
  std::vector<Content> content;  // no tokens: not indexed
  std::deque<int32_t> queue;     // next to be allocated first
};

class RandomWalk {
 public:
  RandomWalk(int32_t num_blocks, int32_t block_size, uint64_t seed)
      : num_blocks_(num_blocks),
        block_size_(block_size),
        allocator_(num_blocks, block_size, seed),
        model_(num_blocks),
        random_(seed) {}

  void run(int64_t num_operations) {
    const int64_t check_interval = num_blocks_ <= 8 ? 1 : 16 * num_blocks_;
    for (int64_t i = 0; i < num_operations; ++i) {
      operate();
      CHECK(allocator_.num_free() == static_cast<int32_t>(model_.queue.size()));
      CHECK(allocator_.num_active() + allocator_.num_free() == num_blocks_);
      if (i % check_interval == 0) check_everything();
    }
    check_everything();
    while (!held_.empty()) free(pick_held());
    check_everything();
    CHECK(allocator_.num_free() == num_blocks_);
  }

 private:
  void operate() {
    // The chance of taking over giving back drifts, so that the pool is now full, now empty.
    if (below(10 * num_blocks_) == 0) eagerness_ = 20 + below(60);
    const bool takes = below(100) < eagerness_;
    switch (below(8)) {
      case 0:
      case 1:
        return takes ? allocate() : free(pick_held());
      case 2:
        return takes ? allocate_many() : free_many();
      case 3:
        return takes ? share() : free(pick_held());
      case 4:
        return make_writable();
      case 5:
      case 6:
        return takes ? lookup() : commit();
      default:
        return misuse();
    }
  }

  void allocate() {
    if (model_.queue.empty()) {
      CHECK_THROWS(allocator_.allocate(), OutOfBlocks);
    } else {
      const int32_t block = model_.allocate();
      CHECK(allocator_.allocate() == block);
      held_.push_back(block);
    }
  }

  void allocate_many() {
    const int32_t count = below(num_blocks_ / 4 + 3);
    if (count > static_cast<int32_t>(model_.queue.size())) {
      CHECK_THROWS(allocator_.allocate_many(count), OutOfBlocks);
      return;
    }
    std::vector<int32_t> blocks(count);
    for (int32_t& block : blocks) block = model_.allocate();
    CHECK(allocator_.allocate_many(count) == blocks);
    held_.insert(held_.end(), blocks.begin(), blocks.end());
  }

  void share() {
    const int32_t block = pick_held();
    if (block == BlockAllocator::kNoBlock) return;
    allocator_.share(block);
    ++model_.refs[block];
    held_.push_back(block);
  }

  void free(int32_t block) {
    if (block == BlockAllocator::kNoBlock) return;
    allocator_.free(block);
    model_.free(block);
    forget(block);
  }

  void free_many() {
    std::shuffle(held_.begin(), held_.end(), random_);
    const size_t count = held_.empty() ? 0 : below(std::min<size_t>(held_.size(), 16)) + 1;
    const std::vector<int32_t> blocks(held_.end() - count, held_.end());
    held_.resize(held_.size() - count);
    allocator_.free_many(blocks);
    // A block named twice is released where it is named last.
    for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) {
      if (std::find(blocks.rbegin(), block, *block) != block) continue;
      for (auto n = std::count(blocks.begin(), blocks.end(), *block); n > 0; --n) {
        model_.free(*block);
      }
    }
  }

  void make_writable() {
    const int32_t block = pick_held();
    if (block == BlockAllocator::kNoBlock) return;
    if (model_.refs[block] > 1 && model_.queue.empty()) {
      CHECK_THROWS(allocator_.make_writable(block), OutOfBlocks);
      return;
    }
    const int32_t writable = model_.make_writable(block);
    CHECK(allocator_.make_writable(block) == writable);
    forget(block);
    held_.push_back(writable);
  }

  void commit() {
    const int32_t block = pick_held();
    if (block == BlockAllocator::kNoBlock) return;
    const Model::Content content = random_content();
    if (model_.is_indexed(block) && !(model_.content[block] == content)) {
      CHECK_THROWS(allocator_.commit(block, content.parent, content.tokens.data()),
                   std::invalid_argument);
      return;
    }
    model_.commit(block, content);
    const BlockHash hash = allocator_.commit(block, content.parent, content.tokens.data());
    CHECK(hash == allocator_.hash(content.parent, content.tokens.data()));
    parents_[below(parents_.size())] = hash;
  }

  void lookup() {
    const Model::Content content = random_content();
    const int32_t block = model_.lookup(content);
    CHECK(allocator_.lookup(content.parent, content.tokens.data()) == block);
    if (block != BlockAllocator::kNoBlock) held_.push_back(block);
  }

  // Calls that must throw and change nothing.
  void misuse() {
    const int64_t out_of_range[] = {-1, num_blocks_, int64_t{1} << 32, INT64_MIN};
    const int64_t bad = out_of_range[below(4)];
    const Tokens tokens(block_size_, 1);
    CHECK_THROWS(allocator_.share(bad), std::invalid_argument);
    CHECK_THROWS(allocator_.free(bad), std::invalid_argument);
    CHECK_THROWS(allocator_.ref_count(bad), std::invalid_argument);
    CHECK_THROWS(allocator_.state(bad), std::invalid_argument);
    CHECK_THROWS(allocator_.make_writable(bad), std::invalid_argument);
    CHECK_THROWS(allocator_.commit(bad, {}, tokens.data()), std::invalid_argument);
    CHECK_THROWS(allocator_.allocate_many(-1), std::invalid_argument);
    if (!model_.queue.empty()) {
      const int32_t unheld = model_.queue[below(model_.queue.size())];
      CHECK_THROWS(allocator_.share(unheld), std::invalid_argument);
      CHECK_THROWS(allocator_.free(unheld), std::invalid_argument);
      CHECK_THROWS(allocator_.make_writable(unheld), std::invalid_argument);
      CHECK_THROWS(allocator_.commit(unheld, {}, tokens.data()), std::invalid_argument);
      std::vector<int32_t> blocks(held_.begin(), held_.begin() + std::min<size_t>(held_.size(), 4));
      blocks.push_back(unheld);
      CHECK_THROWS(allocator_.free_many(blocks), std::invalid_argument);
    }
    if (!held_.empty()) {
      const int32_t block = pick_held();
      const std::vector<int32_t> once_too_often(model_.refs[block] + 1, block);
      CHECK_THROWS(allocator_.free_many(once_too_often), std::invalid_argument);
    }
  }

  void check_everything() {
    bool sound = true;
    try {
      allocator_.check_integrity();
    } catch (const std::logic_error& error) {
      std::fprintf(stderr, "%s\n", error.what());
      sound = false;
    }
    CHECK(sound);
    bool equal = allocator_.num_cached() == model_.num_cached();
    for (int32_t block = 0; block < num_blocks_; ++block) {
      equal = equal && allocator_.state(block) == model_.state(block) &&
              allocator_.ref_count(block) == model_.refs[block];
    }
    CHECK(equal);
  }

  // Few different ones, so that contents meet again.
  Model::Content random_content() {
    Model::Content content{parents_[below(parents_.size())], Tokens(block_size_, 7)};
    content.tokens[below(block_size_)] = below(num_blocks_ / 4 + 2);
    return content;
  }

  int32_t pick_held() {
    return held_.empty() ? BlockAllocator::kNoBlock : held_[below(held_.size())];
  }

  void forget(int32_t block) {
    const auto found = std::find(held_.begin(), held_.end(), block);
    *found = held_.back();
    held_.pop_back();
  }

  int32_t below(size_t bound) { return static_cast<int32_t>(random_() % bound); }

  int32_t num_blocks_, block_size_;
  int32_t eagerness_ = 50;
  BlockAllocator allocator_;
  Model model_;
  std::mt19937_64 random_;
  std::vector<int32_t> held_;                                   // one entry for each reference
  std::vector<BlockHash> parents_ = std::vector<BlockHash>(4);  // recent hashes
};

void test_random_operations() {
  struct Pool {
    int32_t num_blocks, block_size;
    int64_t num_operations;
  };
  for (const Pool& pool : {Pool{1, 1, 100'000}, Pool{2, 4, 150'000}, Pool{5, 3, 250'000},
                           Pool{8, 16, 200'000}, Pool{64, 2, 200'000}, Pool{500, 16, 100'000}}) {
    RandomWalk(pool.num_blocks, pool.block_size, 1 + pool.num_blocks).run(pool.num_operations);
  }
}

void test_eviction_order() {
  BlockAllocator allocator(4, 1);
  const std::vector<int32_t> blocks = allocator.allocate_many(4);
  CHECK((blocks == std::vector<int32_t>{0, 1, 2, 3}));
  const Tokens tokens = {10, 11, 12};
  BlockHash parents[4] = {};
  for (int i = 0; i < 3; ++i) parents[i + 1] = allocator.commit(i, parents[i], &tokens[i]);
  allocator.free_many({0, 1, 2});
  allocator.free(3);
  CHECK(allocator.allocate() == 3);                      // the Free one first
  CHECK(allocator.lookup(parents[1], &tokens[1]) == 1);  // used, so the last to go
  allocator.free(1);
  CHECK(allocator.allocate() == 2);  // the tail before the head
  CHECK(allocator.lookup(parents[2], &tokens[2]) == BlockAllocator::kNoBlock);
  CHECK(allocator.allocate() == 0);
  CHECK(allocator.allocate() == 1);
  CHECK_THROWS(allocator.allocate(), OutOfBlocks);
  allocator.check_integrity();
}

// Equal hashes of different contents cannot be made, so the index is told that they were.
void test_collision_is_a_miss() {
  BlockAllocator allocator(2, 1);
  const int32_t token = 5, other = 6;
  const BlockHash parent = {1, 2};
  const BlockHash hash = allocator.commit(allocator.allocate(), {}, &token);
  auto& index = BlockAllocatorPeer::index(allocator);
  index[allocator.hash({}, &other)] = 0;
  index[allocator.hash(parent, &token)] = 0;
  CHECK(allocator.lookup({}, &other) == BlockAllocator::kNoBlock);
  CHECK(allocator.lookup(parent, &token) == BlockAllocator::kNoBlock);
  CHECK(allocator.lookup({}, &token) == 0);
  CHECK(hash != allocator.hash(parent, &token));
}

void test_bad_sizes() {
  for (const int64_t bad : {int64_t{0}, int64_t{-1}, int64_t{1} << 31, INT64_MAX}) {
    CHECK_THROWS(BlockAllocator(bad, 16), std::invalid_argument);
    CHECK_THROWS(BlockAllocator(16, bad), std::invalid_argument);
  }
}

// Expected values: OpenSSL 3.0, `openssl mac -macopt size:16 -macopt hexkey:... SIPHASH` over the
// parent and the tokens as little-endian int32; the first is also in SipHash's reference vectors.
void test_hash() {
  const auto equals = [](const BlockHash& hash, const char* expected) {
    unsigned char bytes[sizeof(hash)];
    std::memcpy(bytes, &hash, sizeof(hash));
    std::string hex;
    for (const unsigned char byte : bytes) {
      char digits[3];
      std::snprintf(digits, sizeof(digits), "%02x", byte);
      hex += digits;
    }
    return hex == expected;
  };
  CHECK(equals(SipHash(0x0706050403020100, 0x0f0e0d0c0b0a0908).finish(0, 0),
               "a3817f04ba25a8e66df67214c7550293"));
  const Tokens four = {1, 2, 3, 4}, three = {7, 49151, INT32_MAX};
  CHECK(equals(hash_block(123, {}, four.data(), 4), "15d295608c1c975ea928f499e268683a"));
  const BlockHash parent = {0xefcdab8967452301, 0x7766554433221100};
  CHECK(equals(hash_block(0xfedcba9876543210, parent, three.data(), 3),
               "09f7a612613639e81dfc9313c3f54e6e"));
  Tokens sixteen(16);
  for (int32_t i = 0; i < 16; ++i) sixteen[i] = i;
  CHECK(equals(hash_block(0xfedcba9876543210, parent, sixteen.data(), 16),
               "d74abf52c2ae02c980f3349e0cd919aa"));
}

// check_integrity() sees each kind of damage and says what it is.
void test_integrity_check() {
  using Peer = BlockAllocatorPeer;
  // Blocks: 0 Active and indexed, 1 Active, 2 Cached, 3 and 4 Free.
  const auto expect = [](const char* message, const std::function<void(BlockAllocator&)>& damage) {
    BlockAllocator allocator(5, 1);
    allocator.allocate_many(3);
    const int32_t tokens[] = {5, 6};
    allocator.commit(0, {}, &tokens[0]);
    allocator.commit(2, {}, &tokens[1]);
    allocator.free(2);
    allocator.check_integrity();
    damage(allocator);
    std::string said = "nothing";
    try {
      allocator.check_integrity();
    } catch (const std::logic_error& error) {
      said = error.what();
    }
    if (!CHECK(said.find(message) != std::string::npos)) {
      std::fprintf(stderr, "expected \"%s\", got \"%s\"\n", message, said.c_str());
    }
  };
  expect("out of range", [](auto& a) { Peer::block(a, 3).next = 77; });
  expect("twice", [](auto& a) {
    Peer::block(a, 4).next = 3;
    Peer::block(a, 3).previous = 5;
  });
  expect("links disagree", [](auto& a) { Peer::block(a, 4).previous = 2; });
  expect("Active block is in", [](auto& a) { Peer::block(a, 3).state = BlockState::kActive; });
  expect("after a Cached", [](auto& a) { Peer::block(a, 3).state = BlockState::kCached; });
  expect("tail", [](auto& a) { Peer::block(a, 5).previous = 3; });
  expect("num_free", [](auto& a) { ++Peer::num_free(a); });
  expect("num_cached", [](auto& a) { ++Peer::num_cached(a); });
  expect("reference count", [](auto& a) { Peer::block(a, 0).ref_count = 0; });
  expect("reference count", [](auto& a) { Peer::block(a, 3).ref_count = 1; });
  expect("not in the free queue", [](auto& a) {
    Peer::block(a, 1).state = BlockState::kFree;
    Peer::block(a, 1).ref_count = 0;
  });
  expect("Free one is", [](auto& a) { Peer::block(a, 3).is_indexed = true; });
  expect("does not map", [](auto& a) { Peer::index(a).erase(Peer::block(a, 2).hash); });
  expect("does not map", [](auto& a) { Peer::index(a)[Peer::block(a, 2).hash] = 0; });
  expect("of its content", [](auto& a) { ++Peer::token(a, 2); });
  expect("not marked", [](auto& a) { Peer::index(a)[BlockHash{1, 2}] = 1; });
}

}  // namespace
}  // namespace test
}  // namespace nano_vllm

int main() {
  using namespace nano_vllm::test;
  test_random_operations();
  test_eviction_order();
  test_collision_is_a_miss();
  test_bad_sizes();
  test_hash();
  test_integrity_check();
  return report_checks();
}
