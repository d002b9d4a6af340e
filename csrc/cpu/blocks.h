// Blocks of elements as the CPU kernels handle them: float32 in the first-level cache, loaded from
// and rounded to the tensor's dtype. The loops are plain, for the compiler to vectorise; float16's
// conversions are in halves.cpp.
#pragma once

#include <cstdint>
#include <type_traits>

#include "halves.h"

namespace dx {

template <class T>
DX_INLINE void load(const T* __restrict from, float* __restrict to, int64_t count) {
  if constexpr (std::is_same_v<T, Half>)
    load(from, count, 1, count, to);
  else
    for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
}

template <class T>
DX_INLINE void store(const float* __restrict from, T* __restrict to, int64_t count) {
  if constexpr (std::is_same_v<T, Half>)
    store(from, 1, count, to, count);
  else
    for (int64_t i = 0; i < count; ++i) round_to(from[i], to[i]);
}

// The elements as float32: where they are, or loaded into the buffer.
template <class T>
DX_INLINE const float* view(const T* from, float* buffer, int64_t count) {
  if constexpr (std::is_same_v<T, float>)
    return from;
  else
    return load(from, buffer, count), buffer;
}

// Where to compute float32 that `keep` stores: in its place, or in the buffer.
template <class T>
DX_INLINE float* place(T* to, float* buffer) {
  if constexpr (std::is_same_v<T, float>)
    return to;
  else
    return buffer;
}

template <class T>
DX_INLINE void keep(const float* computed, T* to, int64_t count) {
  if constexpr (!std::is_same_v<T, float>) store(computed, to, count);
}

// Asks for elements that are needed soon, so that they come while something else is computed.
template <class T>
DX_INLINE void prefetch(const T* from, int64_t count) {
#if defined(DX_GNU)
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += line) __builtin_prefetch(from + i);
#endif
}

}  // namespace dx
