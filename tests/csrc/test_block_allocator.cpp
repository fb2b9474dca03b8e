// The block allocator against a plain model that predicts every result, block numbers included,
// over a million random operations (ten million with NANO_VLLM_NIGHTLY in the environment), and
// what is easier to read as an example.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "block_allocator_model.h"
#include "block_allocator_walk.h"
#include "check.h"

namespace nano_vllm {
namespace test {
namespace {

void test_random_operations() {
  int64_t num_copied = 0, num_there_already = 0, num_lost = 0;
  for (WalkOptions options :
       {WalkOptions{1, 1, 0, 50'000}, WalkOptions{2, 4, 0, 100'000}, WalkOptions{5, 3, 0, 150'000},
        WalkOptions{8, 16, 0, 100'000}, WalkOptions{64, 2, 0, 50'000},
        WalkOptions{500, 16, 0, 50'000}, WalkOptions{1, 1, 1, 50'000},
        WalkOptions{3, 2, 1, 100'000}, WalkOptions{4, 1, 3, 150'000}, WalkOptions{6, 4, 6, 100'000},
        WalkOptions{40, 2, 20, 50'000}, WalkOptions{100, 16, 300, 50'000}}) {
    if (is_nightly()) options.num_operations *= 10;
    RandomWalk walk(options, 1 + options.num_blocks);
    walk.run();
    const Model& model = walk.pool.model;
    num_copied += model.num_copied;
    num_there_already += model.num_there_already;
    num_lost += model.num_lost;
  }
  CHECK(num_copied > 5'000);
  CHECK(num_there_already > 500);
  CHECK(num_lost > 1'000);
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

void test_next_tier() {
  BlockAllocator pool(3, 1, 9), tier(2, 1, 9);
  pool.set_next_tier(&tier);
  const Tokens tokens = {10, 11, 12};
  BlockHash parents[4] = {};
  const std::vector<int32_t> blocks = pool.allocate_many(3);
  for (int i = 0; i < 3; ++i) parents[i + 1] = pool.commit(i, parents[i], &tokens[i]);
  pool.free_many(blocks);
  // The tail is evicted first, and it is the first to go from the tier too.
  CHECK((pool.allocate_many(3) == std::vector<int32_t>{2, 1, 0}));
  CHECK((pool.take_evictions() == std::vector<Eviction>{{2, 0}, {1, 1}, {0, 0}}));
  CHECK(pool.take_evictions().empty());
  CHECK(tier.lookup(parents[2], &tokens[2], BlockOwner::kTransfer) == kNoBlock);
  CHECK(tier.lookup(parents[1], &tokens[1], BlockOwner::kTransfer) == 1);
  CHECK(tier.lookup(parents[0], &tokens[0], BlockOwner::kTransfer) == 0);
  CHECK(tier.num_references(BlockOwner::kTransfer) == 2);
  // What is there already is not copied again; where all is held, the content is lost.
  for (int i : {0, 2}) pool.commit(i, parents[i], &tokens[i]);
  pool.free_many({0, 2});
  CHECK((pool.allocate_many(2) == std::vector<int32_t>{2, 0}));
  CHECK(pool.take_evictions().empty());
  CHECK(tier.num_active() == 2);
  // Without a tier, as before.
  tier.free_many({0, 1}, BlockOwner::kTransfer);
  pool.set_next_tier(nullptr);
  pool.commit(2, parents[2], &tokens[2]);
  pool.free(2);
  CHECK(pool.allocate() == 2);
  CHECK(pool.take_evictions().empty());
  pool.check_integrity();
  tier.check_integrity();
}

void test_bad_next_tiers() {
  BlockAllocator pool(2, 4, 1), tier(2, 4, 1), other_size(2, 8, 1), other_key(2, 4, 2);
  for (BlockAllocator* bad : {&pool, &other_size, &other_key}) {
    CHECK_THROWS(pool.set_next_tier(bad), std::invalid_argument);
  }
  pool.set_next_tier(&tier);
  CHECK_THROWS(tier.set_next_tier(&pool), std::invalid_argument);
}

// What pins alone hold is no block of a sequence.
void test_make_writable_is_for_sequences() {
  BlockAllocator allocator(2, 1);
  const int32_t block = allocator.allocate(BlockOwner::kPin);
  CHECK_THROWS(allocator.make_writable(block), std::invalid_argument);
  allocator.share(block, BlockOwner::kPin);
  CHECK_THROWS(allocator.make_writable(block), std::invalid_argument);
  CHECK(allocator.num_references(BlockOwner::kPin) == 2);
  allocator.share(block);
  CHECK(allocator.make_writable(block) == 1);
  CHECK(allocator.num_references(BlockOwner::kPin) == 2);
  CHECK(allocator.num_references(BlockOwner::kSequence) == 1);
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
  expect("references of the owners", [](auto& a) { ++Peer::references(a)[0]; });
  expect("references of the owners", [](auto& a) { --Peer::references(a)[0]; });
  expect("references of the owners", [](auto& a) { ++Peer::block(a, 1).ref_count; });
  expect("fewer than no references", [](auto& a) {
    ++Peer::references(a)[0];
    --Peer::references(a)[1];
  });
}

}  // namespace
}  // namespace test
}  // namespace nano_vllm

int main() {
  using namespace nano_vllm::test;
  test_random_operations();
  test_eviction_order();
  test_next_tier();
  test_bad_next_tiers();
  test_make_writable_is_for_sequences();
  test_collision_is_a_miss();
  test_bad_sizes();
  test_hash();
  test_integrity_check();
  return report_checks();
}
