// The few words that let one formula serve the host, whichever its vector unit, and the device.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// GCC's words, which clang has too. DX_PLAIN_CXX does without, as MSVC has to: its code is then
// tried by compilers that are at hand (tests/packaging/test_plain_cxx.py).
#if defined(__GNUC__) && !defined(DX_PLAIN_CXX)
#define DX_GNU 1
#endif

#if defined(__CUDACC__)
#define DX_INLINE __host__ __device__ __forceinline__
#elif defined(DX_GNU)
// Forced, so that a formula is compiled for the vector unit of the kernel that it is inlined into.
#define DX_INLINE inline __attribute__((always_inline))
#elif defined(_MSC_VER)
#define DX_INLINE __forceinline
#else
#define DX_INLINE inline
#endif

namespace dx {

// a*b + c with one rounding. Where bits agree across processors, every fma is written out: the
// compilers are told to contract nothing.
DX_INLINE float fma(float a, float b, float c) {
#if defined(DX_GNU) && !defined(__CUDA_ARCH__)
  return __builtin_fmaf(a, b, c);
#else
  return fmaf(a, b, c);
#endif
}

DX_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

DX_INLINE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

}  // namespace dx
