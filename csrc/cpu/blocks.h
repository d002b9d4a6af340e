// Blocks of elements as the CPU kernels handle them: float32 in the first-level cache, loaded from
// and rounded to the tensor's dtype. The loops are plain, for the compiler to vectorise.
#pragma once

#include "../math/half.h"

namespace dx {

template <class T>
DX_INLINE void load(const T* __restrict from, float* __restrict to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
}

template <class T>
DX_INLINE void store(const float* __restrict from, T* __restrict to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) round_to(from[i], to[i]);
}

}  // namespace dx
