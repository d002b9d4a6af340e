// What attention reads: heads of any dtype and strides, and what is added to their scores.
#pragma once

#include <cstring>
#include <limits>

#include "../common.h"
#include "simd.h"
#include "tiles.h"

namespace dx {

constexpr float kMasked = -std::numeric_limits<float>::infinity();

// Heads [B, H, T, d] of any dtype, whose last stride is 1.
struct Heads {
  Source data;
  int64_t batch_stride, head_stride, row_stride, size;
  const BFloat16* pairs = nullptr;  // the data, where products are of pairs of bfloat16

  // What a row has to be multiplied with: numbers, or pairs of them.
  int64_t words() const { return pairs == nullptr ? size : (size + 1) / 2; }
  int64_t at(int64_t b, int64_t h, int64_t t) const {
    return b * batch_stride + h * head_stride + t * row_stride;
  }

  // Rows of head h of sample b as float32, or their pairs, in place or in the buffer.
  Tile<const float> rows(int64_t b, int64_t h, int64_t t, int64_t count, TileBuffer& buffer) const {
    if (pairs == nullptr) return data.view({at(b, h, t), row_stride, count, size}, buffer);
    for (int64_t r = 0; r < count; ++r) {
      buffer[(r + 1) * words() - 1] = 0.0f;  // beside the last of an odd number
      std::memcpy(buffer + r * words(), pairs + at(b, h, t + r), size * sizeof *pairs);
    }
    return {buffer, words()};
  }
  const float* row(int64_t b, int64_t h, int64_t t, TileBuffer& buffer) const {
    return rows(b, h, t, 1, buffer).at;
  }
};

// Of a bool, as a byte: GCC vectorises no loop over bool.
DX_INLINE float added(uint8_t counts) { return counts != 0 ? 0.0f : kMasked; }
template <class T>
DX_INLINE float added(T number) {
  return to_float(number);
}

// What is added to the scores, of any strides: numbers, or bools, which let a key count or not.
struct Mask {
  const void* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0, key_stride = 0;

  // s = scale s + the mask of a row's keys from one on.
  DX_INLINE void add(int64_t at, int64_t keys, float scale, float* s) const {
    switch (dtype) {
      case ScalarType::Bool: return add_of<uint8_t>(at, keys, scale, s);
      case ScalarType::Half: return add_of<Half>(at, keys, scale, s);
      case ScalarType::BFloat16: return add_of<BFloat16>(at, keys, scale, s);
      default: return add_of<float>(at, keys, scale, s);
    }
  }

 private:
  template <class T>
  DX_INLINE void add_of(int64_t at, int64_t keys, float scale, float* __restrict s) const {
    const T* __restrict from = static_cast<const T*>(data) + at;
    if (key_stride == 1) {
#pragma omp simd
      for (int64_t j = 0; j < keys; ++j) s[j] = multiply_add(s[j], scale, added(from[j]));
    } else {
      for (int64_t j = 0; j < keys; ++j)
        s[j] = multiply_add(s[j], scale, added(from[j * key_stride]));
    }
  }
};

}  // namespace dx
