// The vector unit is chosen when the program runs. A kernel is written once, as a lambda marked
// DX_KERNEL that calls only DX_INLINE functions; it is inlined into a function compiled for each
// instruction set, where the compiler vectorises its loops, and the best one that the processor
// has is called. A function marked DX_APART is not inlined into the one that calls it.
#pragma once

#include <type_traits>

#include "../math/portable.h"

#if defined(__x86_64__) && defined(DX_GNU)
#define DX_X86 1
#elif defined(__aarch64__) && defined(__ARM_NEON)
#define DX_NEON 1  // which the compiler may use anywhere: only products.h asks
#endif

#if defined(__clang__)
// Loops for processors without fma call exact_fma, and only GCC vectorises those.
#pragma clang diagnostic ignored "-Wpass-failed"
#endif

#if defined(DX_GNU)
#define DX_KERNEL __attribute__((always_inline))
#define DX_APART __attribute__((noinline))
#else
#define DX_KERNEL
#define DX_APART
#endif

namespace dx {

enum class Isa { baseline, neon, avx2, avx512 };

// The processor's best, or what DIFFUSION_EXT_CPU_CAPABILITY (baseline, avx2) lowers it to.
Isa best_isa();
const char* name_of(Isa isa);
// Whether the processor multiplies pairs of bfloat16 by AVX-512, and is not lowered below that.
bool multiplies_bf16();

#if defined(DX_X86)
#if defined(__clang__)
#define DX_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2,f16c"
#else
#define DX_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2,f16c,prefer-vector-width=512"
#endif
#define DX_AVX2 "avx2,fma,bmi2,f16c"
// A function of one instruction set's intrinsics.
#define DX_AVX512_KERNEL __attribute__((target(DX_AVX512)))
#define DX_AVX2_KERNEL __attribute__((target(DX_AVX2)))

// Tells the compiler that this processor has an fma instruction, or has none: of fma()'s two ways
// it then keeps one. Every function of kernels begins with it.
DX_INLINE void promise_fma(bool there) {
  if (has_fma != there) __builtin_unreachable();
}

template <class Kernel>
DX_AVX512_KERNEL void run_avx512(const Kernel& kernel) {
  promise_fma(true);
  kernel();
}
template <class Kernel>
DX_AVX2_KERNEL void run_avx2(const Kernel& kernel) {
  promise_fma(true);
  kernel();
}
#endif

// For the least that the compiler was told of the processors.
template <class Kernel>
void run_baseline(const Kernel& kernel) {
#if defined(DX_X86) && defined(DX_FMA_IS_CHOSEN)
  promise_fma(false);
#endif
  kernel();
}

template <class Kernel>
void on_best_isa(const Kernel& kernel) {
#if defined(DX_X86)
  const Isa isa = best_isa();
  if (isa == Isa::avx512) return run_avx512(kernel);
  if (isa == Isa::avx2) return run_avx2(kernel);
#endif
  run_baseline(kernel);
}

// Calls f with each bool as a constant, so that the compiler has a loop for each combination.
template <class F>
DX_INLINE void with_constants(const F& f) {
  f();
}
template <class F, class... Rest>
DX_INLINE void with_constants(const F& f, bool first, Rest... rest) {
  if (first)
    with_constants([&](auto... c) DX_KERNEL { f(std::true_type(), c...); }, rest...);
  else
    with_constants([&](auto... c) DX_KERNEL { f(std::false_type(), c...); }, rest...);
}

}  // namespace dx
