// Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011).
#pragma once

#include "portable.h"

namespace dx {

struct Words4 {
  uint32_t r0, r1, r2, r3;
};

// The counter's four words, encrypted under the 64-bit key in ten rounds.
DX_INLINE Words4 philox4x32(Words4 counter, uint32_t key0, uint32_t key1) {
  uint32_t c0 = counter.r0, c1 = counter.r1, c2 = counter.r2, c3 = counter.r3;
#if defined(__CUDA_ARCH__)
#pragma unroll
#elif defined(DX_GNU) && !defined(__CUDACC__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ key0;
    c2 = uint32_t(p0 >> 32) ^ c3 ^ key1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

}  // namespace dx
