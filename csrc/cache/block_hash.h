// The content hash of a KV block: SipHash-2-4 with 128-bit output (Aumasson and Bernstein,
// https://www.aumasson.jp/siphash/siphash.pdf) of the parent's hash followed by the tokens.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nano_vllm {

// Stands for a block's tokens and all tokens before them. All zero: no block, the parent of a
// sequence's first one.
struct BlockHash {
  uint64_t low = 0;
  uint64_t high = 0;

  bool operator==(const BlockHash& other) const { return low == other.low && high == other.high; }
  bool operator!=(const BlockHash& other) const { return !(*this == other); }

  // For std::unordered_map: the hash is uniform already.
  struct Bucket {
    size_t operator()(const BlockHash& hash) const { return static_cast<size_t>(hash.low); }
  };
};

class SipHash {
 public:
  SipHash(uint64_t key_low, uint64_t key_high)
      : v0_(key_low ^ 0x736f6d6570736575),
        v1_(key_high ^ 0x646f72616e646f6d ^ 0xee),
        v2_(key_low ^ 0x6c7967656e657261),
        v3_(key_high ^ 0x7465646279746573) {}

  void absorb(uint64_t word) {
    num_bytes_ += 8;
    compress(word);
  }

  // The last 0 to 7 bytes, in the low end of `tail`.
  BlockHash finish(uint64_t tail, int tail_bytes) {
    compress((num_bytes_ + static_cast<uint64_t>(tail_bytes)) << 56 | tail);
    v2_ ^= 0xee;
    rounds(4);
    const uint64_t low = v0_ ^ v1_ ^ v2_ ^ v3_;
    v1_ ^= 0xdd;
    rounds(4);
    return {low, v0_ ^ v1_ ^ v2_ ^ v3_};
  }

 private:
  static uint64_t rotate_left(uint64_t x, int bits) { return x << bits | x >> (64 - bits); }

  void compress(uint64_t word) {
    v3_ ^= word;
    rounds(2);
    v0_ ^= word;
  }

  void rounds(int count) {
    for (int i = 0; i < count; ++i) {
      v0_ += v1_;
      v2_ += v3_;
      v1_ = rotate_left(v1_, 13) ^ v0_;
      v3_ = rotate_left(v3_, 16) ^ v2_;
      v0_ = rotate_left(v0_, 32) + v3_;
      v2_ += v1_;
      v3_ = rotate_left(v3_, 21) ^ v0_;
      v1_ = rotate_left(v1_, 17) ^ v2_;
      v2_ = rotate_left(v2_, 32);
    }
  }

  uint64_t v0_, v1_, v2_, v3_;
  uint64_t num_bytes_ = 0;
};

// SipHash takes 128 bits of key; the second half being a function of the first, guessing the secret
// takes 2^64 trials.
inline BlockHash hash_block(uint64_t key, const BlockHash& parent, const int32_t* token_ids,
                            int64_t num_tokens) {
  SipHash hash(key, ~key);
  hash.absorb(parent.low);
  hash.absorb(parent.high);
  const auto token = [&](int64_t i) { return uint64_t{static_cast<uint32_t>(token_ids[i])}; };
  for (int64_t i = 0; i + 1 < num_tokens; i += 2) hash.absorb(token(i) | token(i + 1) << 32);
  return num_tokens % 2 != 0 ? hash.finish(token(num_tokens - 1), 4) : hash.finish(0, 0);
}

}  // namespace nano_vllm
