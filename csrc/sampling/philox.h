// Random numbers without state: each is a function of a key and a counter.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define NANO_VLLM_HOST_DEVICE __host__ __device__
#else
#define NANO_VLLM_HOST_DEVICE
#endif

namespace nano_vllm {

// The first two words of Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2,
// 3", SC 2011), of a 128-bit counter in two halves.
NANO_VLLM_HOST_DEVICE inline uint64_t philox4x32(uint64_t key, uint64_t low, uint64_t high) {
  constexpr int kRounds = 10;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint32_t c0 = static_cast<uint32_t>(low), c1 = static_cast<uint32_t>(low >> 32);
  uint32_t c2 = static_cast<uint32_t>(high), c3 = static_cast<uint32_t>(high >> 32);
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t first = uint64_t{0xD2511F53} * c0, second = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(second);
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(first);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return uint64_t{c1} << 32 | c0;
}

// One number in [0, 1) of 53 bits.
NANO_VLLM_HOST_DEVICE inline double uniform_number(uint64_t key, uint64_t low, uint64_t high) {
  return static_cast<double>(philox4x32(key, low, high) >> 11) * 0x1p-53;
}

}  // namespace nano_vllm
