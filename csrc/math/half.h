// The half types as their bits, and their conversions. Torch's own classes convert on the host by
// calls that do not vectorise.
#pragma once

#include "portable.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace dx {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

DX_INLINE float to_float(float x) { return x; }

DX_INLINE float to_float(BFloat16 x) { return float_of(uint32_t{x.bits} << 16); }

DX_INLINE float to_float(Half x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t magnitude = (x.bits & 0x7FFFu) << 13;
  const float scaled = float_of(magnitude) * float_of(0x77800000u);      // 2^112; subnormals too
  const uint32_t special = magnitude >= 0x0F800000u ? 0x7F800000u : 0u;  // infinity and NaN
  return float_of(bits_of(scaled) | special | (uint32_t(x.bits & 0x8000u) << 16));
#endif
}

DX_INLINE void round_to(float value, float& out) { out = value; }

DX_INLINE void round_to(float value, BFloat16& out) {
#if defined(__CUDA_ARCH__)
  out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16;  // to nearest even
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  out.bits = uint16_t(nan ? 0x7FC0u : rounded);
#endif
}

DX_INLINE void round_to(float value, Half& out) {
#if defined(__CUDA_ARCH__)
  out.bits = __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude - 0x38000000u + 0x0FFFu + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14: adding 1/2 moves the bits to keep to the end of the word, rounded by the adder.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
  const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t half = magnitude >= 0x477FF000u ? special : finite;  // 65520 and up is infinity
  out.bits = uint16_t(half | ((bits >> 16) & 0x8000u));
#endif
}

}  // namespace dx
