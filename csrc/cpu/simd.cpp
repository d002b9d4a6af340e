#include "simd.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(DX_X86)
#include <cpuid.h>
#endif

namespace dx {
namespace {

#if defined(DX_X86)
// The builtin of clang 16 does not know "f16c". What F16C asks of the operating system, to keep the
// registers of 256 bits, AVX2 asks too, and its builtin has looked.
bool processor_has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

Isa processor_isa() {
#if defined(DX_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2") && processor_has_f16c();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2) return avx512 ? Isa::avx512 : Isa::avx2;
#elif defined(DX_NEON)
  return Isa::neon;
#endif
  return Isa::baseline;
}

Isa chosen_isa() {
  const Isa isa = processor_isa();
  const char* wanted = std::getenv("DIFFUSION_EXT_CPU_CAPABILITY");
  if (wanted == nullptr) return isa;
  for (const Isa lower : {Isa::baseline, Isa::avx2})
    if (lower < isa && std::strcmp(wanted, name_of(lower)) == 0) return lower;
  return isa;
}

}  // namespace

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    case Isa::neon: return "neon";
    default: return "baseline";
  }
}

Isa best_isa() {
  static const Isa isa = chosen_isa();
  return isa;
}

bool multiplies_bf16() {
#if defined(DX_X86)
  static const bool there = __builtin_cpu_supports("avx512bf16");
  return there && best_isa() == Isa::avx512;
#else
  return false;
#endif
}

#if defined(DX_FMA_IS_CHOSEN)
const bool has_fma = best_isa() != Isa::baseline;
#endif

}  // namespace dx
