// The fibers behind cuda_runtime.h.
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr unsigned char kUnused = 0x5c;  // at the end of a stack
constexpr int kMaxIdleRounds = 200;      // in which no thread gets on: none will
constexpr unsigned kMaxClusterSize = 2;

// Where a thread goes on. swapcontext would spend most of the time in system calls, and have
// AddressSanitizer go over the whole stack.
struct Place {
  void* buffer[5];  // as __builtin_setjmp wants it
};

struct Fiber {
  Place place;
  std::unique_ptr<unsigned char[]> stack;  // with its first frame once the fiber has run
  dim3 index, block;
  int rank = 0;               // of its block in the cluster
  int64_t cluster_round = 0;  // what it waits for the end of
  bool is_done = false;
  const std::function<bool()>* waits_for = nullptr;
  uint32_t loads_under_way = 0;
};

// Threads that meet; a generation ends when all have come.
struct Meeting {
  std::vector<void*> data;
  int num_here = 0;
  int64_t generation = 0;
};

struct Grid {
  const std::function<void()>* body = nullptr;
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  Place scheduler;
  unsigned cluster_size = 1;
  std::map<int, Meeting> meetings[kMaxClusterSize];  // of each block
  Meeting of_cluster;

  std::map<int, Meeting>& own_meetings() { return meetings[current->rank]; }
} grid;

alignas(1024) unsigned char shared_bytes[kMaxClusterSize][kSharedBytes];

// AddressSanitizer would take the jumps below for the end of the frames they leave.
#define UNWATCHED __attribute__((noinline, no_sanitize("address")))

// In a function of its own: none may both save a place and leave for one.
[[noreturn]] UNWATCHED void leave_for(Place& place) { __builtin_longjmp(place.buffer, 1); }

// Returns when somebody goes on at `here`.
UNWATCHED void go_on(Place& here, Place& there) {
  if (__builtin_setjmp(here.buffer) == 0) leave_for(there);
}

// Runs one body after the other, so that its stack is laid out once.
void run_fiber() {
  while (true) {
    (*grid.body)();
    grid.current->is_done = true;
    go_on(grid.current->place, grid.scheduler);
  }
}

UNWATCHED void start(Fiber& fiber) {
  fiber.stack.reset(new unsigned char[kStackBytes]);
  fiber.stack[0] = kUnused;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, run_fiber, 0);
  if (__builtin_setjmp(grid.scheduler.buffer) == 0) setcontext(&context);
}

// From block first on.
void run_cluster(dim3 first) {
  for (auto& meetings : grid.meetings) meetings.clear();
  grid.of_cluster = {};
  std::memset(shared_bytes, 0xff, grid.cluster_size * kSharedBytes);  // NaN, and no barrier
  const size_t num_threads = size_t{grid.cluster_size} * blockDim.x;
  if (grid.fibers.size() < num_threads) grid.fibers.resize(num_threads);
  for (size_t i = 0; i < num_threads; ++i) {
    Fiber& fiber = grid.fibers[i];
    fiber.rank = static_cast<int>(i / blockDim.x);
    fiber.index = dim3(static_cast<unsigned>(i % blockDim.x), 0, 0);
    fiber.block = dim3(first.x + static_cast<unsigned>(fiber.rank), first.y, first.z);
    fiber.is_done = false, fiber.waits_for = nullptr, fiber.loads_under_way = 0;
  }
  size_t num_done = 0;
  std::vector<int> lag(num_threads / kWarpSize + 1);  // of each warp: rounds that it stays behind
  for (int idle_rounds = 0; num_done < num_threads;) {
    bool has_moved = false;
    for (size_t i = 0; i < num_threads; ++i) {
      Fiber& fiber = grid.fibers[i];
      int& rounds = lag[i / kWarpSize];
      if (i % kWarpSize == 0) rounds = rounds > 0 ? rounds - 1 : lag_of_warp();
      if (rounds > 0) continue;
      if (fiber.is_done || (fiber.waits_for != nullptr && !(*fiber.waits_for)())) continue;
      fiber.waits_for = nullptr;
      grid.current = &fiber;
      threadIdx = fiber.index, blockIdx = fiber.block;
      if (fiber.stack == nullptr) {
        start(fiber);
      } else {
        go_on(grid.scheduler, fiber.place);
      }
      if (fiber.stack[0] != kUnused) {
        std::fprintf(stderr, "a thread's stack is full\n");
        std::abort();
      }
      num_done += fiber.is_done;
      has_moved = true;
    }
    idle_rounds = has_moved ? 0 : idle_rounds + 1;
    if (idle_rounds == kMaxIdleRounds) {
      std::fprintf(stderr, "block %u: %zu of %zu threads wait for ever\n", blockIdx.x,
                   num_threads - num_done, num_threads);
      std::abort();
    }
  }
}

}  // namespace

unsigned char* shared_memory() { return shared_bytes[grid.current->rank]; }
unsigned char* shared_memory_of(int rank) { return shared_bytes[rank]; }
int rank_in_cluster() { return grid.current->rank; }

void run_grid(dim3 size, dim3 block_size, unsigned cluster_size, size_t shared,
              const std::function<void()>& body) {
  if (shared > kSharedBytes || block_size.y != 1 || block_size.z != 1) std::abort();
  if (cluster_size > kMaxClusterSize || size.x % cluster_size != 0) std::abort();
  gridDim = size, blockDim = block_size, grid.body = &body, grid.cluster_size = cluster_size;
  for (unsigned z = 0; z < size.z; ++z) {
    for (unsigned y = 0; y < size.y; ++y) {
      for (unsigned x = 0; x < size.x; x += cluster_size) run_cluster(dim3(x, y, z));
    }
  }
  land_writes();
}

uint32_t& loads_under_way() { return grid.current->loads_under_way; }

void wait_until(const std::function<bool()>& condition) {
  if (condition()) return;
  Fiber* const self = grid.current;
  self->waits_for = &condition;
  go_on(self->place, grid.scheduler);
}

int64_t syncs_of_block() { return grid.own_meetings()[0].generation; }

void meet(int key, int rank, int count, void* data, const std::function<void(void**)>& run) {
  Meeting& meeting = grid.own_meetings()[key];
  meeting.data.resize(static_cast<size_t>(count));
  meeting.data[static_cast<size_t>(rank)] = data;
  const int64_t generation = meeting.generation;
  if (meeting.num_here + 1 == count) run(meeting.data.data());
  arrive(key, count);
  wait_until([&] { return meeting.generation != generation; });
}

void arrive(int key, int count) {
  Meeting& meeting = grid.own_meetings()[key];
  if (++meeting.num_here < count) return;
  meeting.num_here = 0;
  ++meeting.generation;
}

void arrive_at_cluster() {
  Meeting& all = grid.of_cluster;
  grid.current->cluster_round = all.generation;
  if (++all.num_here < static_cast<int>(grid.cluster_size * blockDim.x)) return;
  all.num_here = 0;
  ++all.generation;
}

void wait_for_cluster() {
  const int64_t round = grid.current->cluster_round;
  wait_until([=] { return grid.of_cluster.generation != round; });
}

}  // namespace cuda_on_cpu
