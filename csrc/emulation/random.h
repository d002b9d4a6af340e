// Random numbers that are cheap enough to choose every thread's turn by.
#pragma once

#include <cstdint>

namespace dx::emulation {

// splitmix64 (Steele, Lea & Flood 2014)
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }

  // 0 .. n-1, for n up to 2^32
  uint64_t below(uint64_t n) { return ((next() >> 32) * n) >> 32; }

 private:
  uint64_t state_;
};

}  // namespace dx::emulation
