// Half precision into float32 and back, by rows. float16 has the processor's own conversions, which
// the compilers do not find in those of math/half.h; bfloat16 has these, a shift and a rounding.
#pragma once

#include <cstdint>

#include "../math/half.h"

namespace dx {

// Rows of `length` elements, `stride` elements from one to the next in `from`, none between in
// `to`.
void load(const Half* from, int64_t stride, int64_t rows, int64_t length, float* to);
void load(const BFloat16* from, int64_t stride, int64_t rows, int64_t length, float* to);

// The way back: `stride` is that of `to`.
void store(const float* from, int64_t rows, int64_t length, Half* to, int64_t stride);
void store(const float* from, int64_t rows, int64_t length, BFloat16* to, int64_t stride);

}  // namespace dx
