// Memory that runs out anywhere in the block allocator: whatever a call asks for fails in turn. A
// call that throws has changed nothing, in the next tier neither; one that does not has lost no
// more than the content of an evicted block.
// NANO_VLLM_NIGHTLY in the environment: ten times as many operations.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <new>

#include "block_allocator_model.h"
#include "block_allocator_walk.h"
#include "check.h"

namespace {

// Of the allocations from now on, which one fails, and whether the later ones do too; 0: none.
int64_t fails_at = 0;
bool stays_failing = false;
int64_t num_failures = 0;

void* allocate_or_fail(std::size_t size) {
  if (fails_at > 0 && --fails_at == 0) {
    if (stays_failing) fails_at = 1;
    ++num_failures;
    throw std::bad_alloc();
  }
  void* memory = std::malloc(size > 0 ? size : 1);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

// The sanitizers' own are replaced, all of them, so that new and delete agree.
void* operator new(std::size_t size) { return allocate_or_fail(size); }
void* operator new[](std::size_t size) { return allocate_or_fail(size); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }

namespace nano_vllm {
namespace test {
namespace {

struct Failures {
  int64_t thrown = 0;     // calls that said so
  int64_t unnoticed = 0;  // that did not
};

// Makes a call until it succeeds, its first allocation failing, then its second, and so on. Memory
// is back when this returns. Returns whether the call that succeeded has seen a failure.
bool make_with_failures(const std::function<void()>& call, int64_t first, bool stays,
                        const std::function<void()>& check, Failures& failures) {
  struct Restore {
    ~Restore() { fails_at = 0; }
  } restore;
  for (int64_t k = first;; ++k) {
    const int64_t before = num_failures;
    stays_failing = stays;
    fails_at = k;
    try {
      call();
      fails_at = 0;
      failures.unnoticed += num_failures != before;
      return num_failures != before;
    } catch (const std::bad_alloc&) {
      fails_at = 0;
      ++failures.thrown;
      check();
    }
  }
}

void test_every_operation() {
  Failures failures;
  for (const bool stays : {false, true}) {
    for (WalkOptions options : {WalkOptions{4, 2, 0, 10'000}, WalkOptions{3, 1, 1, 20'000},
                                WalkOptions{5, 2, 3, 20'000}, WalkOptions{30, 2, 30, 10'000}}) {
      if (is_nightly()) options.num_operations *= 10;
      RandomWalk walk(options, 1 + options.num_blocks);
      std::mt19937_64 random(options.num_blocks);
      for (CheckedPool* pool : {&walk.pool, &walk.tier}) {
        pool->model.keeps_losing = stays;
        pool->attempt = [&](const std::function<void()>& call) {
          // Not always from the first on: one that goes unnoticed hides those behind it.
          const auto first = static_cast<int64_t>(1 + random() % 4);
          return make_with_failures(call, first, stays, [&] { walk.pool.check(); }, failures);
        };
      }
      walk.run();
    }
  }
  CHECK(failures.thrown > 1'000);
  CHECK(failures.unnoticed > 100);
}

// The allocator's own memory: what was taken is given back.
void test_construction() {
  Failures failures;
  make_with_failures([] { BlockAllocator(100, 4); }, 1, false, [] {}, failures);
  CHECK(failures.thrown >= 3);
  CHECK(failures.unnoticed == 0);
}

// The books of two evictions, of which memory suffices for one.
void test_lost_eviction() {
  for (int64_t k = 1; k <= 8; ++k) {
    CheckedPool pool(2, 1, 0), tier(1, 1, 0);
    pool.set_next_tier(tier);
    const Content contents[] = {{{}, {1}}, {{}, {2}}};
    for (const Content& content : contents) pool.commit(pool.allocate(kOwners[0]), content);
    pool.free_many({0, 1}, kOwners[0]);
    CHECK(pool.allocate(kOwners[0]) == 1);
    int64_t fails = k;
    pool.attempt = [&](const std::function<void()>& call) {
      Failures failures;
      return make_with_failures(call, fails, false, [&] { pool.check(); }, failures);
    };
    CHECK(pool.allocate(kOwners[0]) == 0);
    pool.attempt = nullptr;
    pool.check();
    const std::vector<Eviction> evictions = pool.allocator.take_evictions();
    CHECK((evictions.front() == Eviction{1, 0}));
    CHECK(evictions == pool.model.evictions);
  }
}

}  // namespace
}  // namespace test
}  // namespace nano_vllm

int main() {
  using namespace nano_vllm::test;
  test_every_operation();
  test_construction();
  test_lost_eviction();
  return report_checks();
}
