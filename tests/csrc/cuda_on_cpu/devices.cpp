// Several GPUs, see cuda_runtime.h: a process for each, as each has blocks and shared memory of its
// own, and memory that they have in common. One of them runs at a time, so that a seed repeats a
// sequence.
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>
#include <utility>
#include <vector>

#include "check.h"
#include "cuda_runtime.h"

namespace cuda_on_cpu {
namespace {

constexpr int kMaxDevices = 8;
constexpr int kReadsOfTurn = 16;         // on average
constexpr int64_t kMaxIdle = 2'000'000;  // reads while nothing lands: nothing will

struct Host {
  std::minstd_rand random;
  int count;
  int weight[kMaxDevices];             // how often a device gets its turn; 0: it has ended
  std::atomic<int> turn[kMaxDevices];  // 1: the device's
  int64_t idle_reads;
};
Host* host = nullptr;
int self;

// All that is promised is that 8 bytes come together, and what a release comes behind.
struct Write {
  void* at;
  uint2 value;
  size_t num_bytes;
  bool is_release;
  unsigned block, thread;
  int64_t syncs, number;  // of its thread, and among all writes

  Write(void* to, uint2 words, size_t bytes, bool releases)
      : at(to),
        value(words),
        num_bytes(bytes),
        is_release(releases),
        block(blockIdx.x),
        thread(threadIdx.x),
        syncs(syncs_of_block()) {
    static int64_t count = 0;
    number = count++;
  }

  bool is_behind(const Write& other) const {
    return is_release && block == other.block && number > other.number &&
           (thread == other.thread || syncs > other.syncs);
  }
  void land() const { std::memcpy(at, &value, num_bytes); }
};
std::vector<Write> under_way;

int below(int limit) { return static_cast<int>(host->random() % static_cast<unsigned>(limit)); }

void wake(int device) {
  host->turn[device] = 1;
  syscall(SYS_futex, &host->turn[device], FUTEX_WAKE, 1, nullptr, nullptr, 0);
}

void wait_for_turn() {
  while (host->turn[self] == 0) {
    syscall(SYS_futex, &host->turn[self], FUTEX_WAIT, 0, nullptr, nullptr, 0);
  }
}

// Gives the turn to a device that has not ended, if there is one.
int next_device() {
  int total = 0;
  for (int i = 0; i < host->count; ++i) total += host->weight[i];
  if (total == 0) return self;
  int at = below(total), device = 0;
  while (at >= host->weight[device]) at -= host->weight[device++];
  return device;
}

// With all that it comes behind: what the others of these come behind is among them.
void land(size_t i) {
  std::swap(under_way[i], under_way.back());
  const Write last = under_way.back();
  under_way.pop_back();
  if (last.is_release) {
    const auto is_earlier = [&](const Write& write) {
      if (!last.is_behind(write)) return false;
      write.land();
      return true;
    };
    under_way.erase(std::remove_if(under_way.begin(), under_way.end(), is_earlier),
                    under_way.end());
  }
  last.land();
  host->idle_reads = 0;
}

// Lets time pass: writes land, other devices and other threads go on.
void before_read() {
  if (++host->idle_reads > kMaxIdle) {
    std::fprintf(stderr, "device %d: the devices wait for ever\n", self);
    std::abort();
  }
  while (!under_way.empty() && below(3) > 0) {
    land(static_cast<size_t>(below(static_cast<int>(under_way.size()))));
  }
  if (below(kReadsOfTurn) == 0) {
    const int next = next_device();
    if (next != self) {
      host->turn[self] = 0;
      wake(next);
      wait_for_turn();
    }
  }
  bool was_asked = false;
  wait_until([&] { return std::exchange(was_asked, true); });
}

void run_device(int device, const std::function<void(int)>& body) {
  self = device;
  wait_for_turn();
  body(device);
  host->weight[self] = 0;
  const int next = next_device();
  if (next != self) wake(next);
}

}  // namespace

unsigned char* allocate_common(size_t num_bytes) {
  void* memory =
      mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  return static_cast<unsigned char*>(memory);
}

void free_common(unsigned char* memory, size_t num_bytes) { munmap(memory, num_bytes); }

void write_common(uint4* at, uint4 value) {
  auto* halves = reinterpret_cast<uint2*>(at);
  under_way.emplace_back(halves, uint2{value.x, value.y}, sizeof(uint2), false);
  under_way.emplace_back(halves + 1, uint2{value.z, value.w}, sizeof(uint2), false);
}

uint4 read_common(const uint4* at) {
  before_read();
  return *at;
}

void release_common(uint32_t* at, uint32_t value) {
  under_way.emplace_back(at, uint2{value, 0}, sizeof(value), true);
}

uint32_t acquire_common(const uint32_t* at) {
  before_read();
  return *at;
}

void land_writes() {
  while (!under_way.empty()) land(under_way.size() - 1);
}

int lag_of_warp() { return host != nullptr && below(50) == 0 ? 100 : 0; }

bool run_devices(int count, unsigned seed, const std::function<void(int)>& body) {
  if (count > kMaxDevices) std::abort();
  host = new (allocate_common(sizeof(Host))) Host{};
  host->random.seed(seed);
  host->count = count;
  for (int i = 0; i < count; ++i) host->weight[i] = below(3) == 0 ? 1 : 20;
  std::fflush(nullptr);
  std::vector<pid_t> processes;
  for (int device = 0; device < count; ++device) {
    const pid_t process = fork();
    if (process < 0) std::abort();
    if (process == 0) {
      nano_vllm::test::check_count() = {};
      run_device(device, body);
      _exit(nano_vllm::test::check_count().failed == 0 ? 0 : 1);
    }
    processes.push_back(process);
  }
  wake(next_device());
  bool is_well = true;
  for (int ended = 0; ended < count; ++ended) {
    int status = 0;
    const pid_t process = wait(&status);
    const bool has_ended = WIFEXITED(status) && WEXITSTATUS(status) <= 1;
    is_well = is_well && has_ended && WEXITSTATUS(status) == 0;
    for (pid_t& other : processes) {
      if (other == process) other = 0;
      if (!has_ended && other > 0) kill(other, SIGKILL);  // they would wait for it
    }
  }
  free_common(reinterpret_cast<unsigned char*>(host), sizeof(Host));
  host = nullptr;
  return is_well;
}

}  // namespace cuda_on_cpu
