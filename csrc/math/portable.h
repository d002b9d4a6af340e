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

// x86 has an fma instruction only from 2013 on, and not in every processor since. Whether this one
// has is known when the program runs, but where the compiler is told that all have.
#if !defined(__CUDACC__) && (defined(__x86_64__) || defined(_M_X64)) && !defined(__FMA__) && \
    !defined(__AVX2__)
#define DX_FMA_IS_CHOSEN 1
// A constant for the compilers too: a function that begins with a promise of its value
// (cpu/simd.h) keeps one way through what follows.
extern const bool has_fma;
// fma on a processor without the instruction (cpu/exact_fma.cpp). GCC vectorises loops that call
// it, by a form of it for four elements.
#if defined(DX_GNU) && !defined(__clang__) && !defined(DX_DEFINES_EXACT_FMA)
#pragma omp declare simd simdlen(4) notinbranch
__attribute__((const))
#endif
float exact_fma(float a, float b, float c);
#else
constexpr bool has_fma = true;
#endif

// a*b + c with one rounding. Where bits agree across processors, every fma is written out: the
// compilers are told to contract nothing.
DX_INLINE float fma(float a, float b, float c) {
#if defined(DX_FMA_IS_CHOSEN)
  if (!has_fma) return exact_fma(a, b, c);
#endif
#if defined(DX_GNU) && !defined(__CUDA_ARCH__)
  return __builtin_fmaf(a, b, c);
#else
  return fmaf(a, b, c);
#endif
}

// a*b + c where the bits are no promise: in two roundings where one would take a function's call.
DX_INLINE float multiply_add(float a, float b, float c) {
  return has_fma ? fma(a, b, c) : a * b + c;
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
