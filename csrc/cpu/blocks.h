// Blocks of elements as the CPU kernels handle them: float32 in the first-level cache, loaded from
// and rounded to the tensor's dtype. The loops are plain, for the compiler to vectorise.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include "../math/portable.h"

namespace dx {

// The half types as their bits; torch's own classes convert by calls that do not vectorise.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

DX_INLINE float to_float(float x) { return x; }

DX_INLINE float to_float(BFloat16 x) { return float_of(uint32_t{x.bits} << 16); }

DX_INLINE float to_float(Half x) {
  const uint32_t magnitude = (x.bits & 0x7FFFu) << 13;
  const float scaled = float_of(magnitude) * float_of(0x77800000u);      // 2^112; subnormals too
  const uint32_t special = magnitude >= 0x0F800000u ? 0x7F800000u : 0u;  // infinity and NaN
  return float_of(bits_of(scaled) | special | (uint32_t(x.bits & 0x8000u) << 16));
}

DX_INLINE void round_to(float value, float& out) { out = value; }

DX_INLINE void round_to(float value, BFloat16& out) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16;  // to nearest even
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  out.bits = uint16_t(nan ? 0x7FC0u : rounded);
}

DX_INLINE void round_to(float value, Half& out) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude - 0x38000000u + 0x0FFFu + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14: adding 1/2 moves the bits to keep to the end of the word, rounded by the adder.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
  const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t half = magnitude >= 0x477FF000u ? special : finite;  // 65520 and up is infinity
  out.bits = uint16_t(half | ((bits >> 16) & 0x8000u));
}

template <class T>
DX_INLINE void load(const T* __restrict from, float* __restrict to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
}

template <class T>
DX_INLINE void store(const float* __restrict from, T* __restrict to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) round_to(from[i], to[i]);
}

// Calls body with a null pointer of the element type that stands for the dtype.
template <class Body>
void dispatch_floating(torch::headeronly::ScalarType dtype, const char* op, const Body& body) {
  using torch::headeronly::ScalarType;
  if (dtype == ScalarType::Float) return body(static_cast<float*>(nullptr));
  if (dtype == ScalarType::Half) return body(static_cast<Half*>(nullptr));
  if (dtype == ScalarType::BFloat16) return body(static_cast<BFloat16*>(nullptr));
  STD_TORCH_CHECK(false, op, ": the kernels serve float32, float16 and bfloat16");
}

}  // namespace dx
