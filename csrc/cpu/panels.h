// Products of two matrices, of which the second lies in panels: groups of columns that are computed
// together, as wide as the registers allow. products.h has those of convolutions, whose rows lie
// apart.
#pragma once

#include <algorithm>
#include <iterator>

#include "products.h"

namespace dx {

// A float, or in its place two neighbouring bfloat16 of a row, or of a column of the panels.
#if defined(DX_GNU)
using Word = float __attribute__((may_alias));
#else
using Word = float;
#endif

// A [count, numbers], rows `stride` apart, times a panel [numbers, width], to rows of C that are
// `to_stride` apart. With `shrink` [count], C's own rows times that are added. Of `pairs` the
// numbers are two bfloat16 each, and their products are two too.
struct PanelProduct {
  const Word* a;
  int64_t stride, count, numbers;
  const float* panel;
  float* to;
  int64_t to_stride;
  const float* shrink;
  bool pairs = false;
};

#define DX_PRODUCT multiply_add
namespace portable {
using Half = Vector;
constexpr int kHalf = 0, kPanelRows[] = {0, 4, 4, 4};
#define DX_PRODUCTS_TARGET
inline Half half_of(Vector v) { return v; }
inline Half load_half(const float* p) { return *p; }
#include "panels_of_one_isa.h"
#undef DX_PRODUCTS_TARGET
}  // namespace portable

#if defined(DX_X86)
namespace avx2 {
using Half = Vector;
constexpr int kHalf = 0, kPanelRows[] = {0, 12, 6, 4};  // by vectors: 12 sums in 16 registers
#define DX_PRODUCTS_TARGET DX_AVX2_KERNEL
DX_PRODUCTS_TARGET inline Half half_of(Vector v) { return v; }
DX_PRODUCTS_TARGET inline Half load_half(const float* p) { return load(p); }
#include "panels_of_one_isa.h"
#undef DX_PRODUCTS_TARGET
}  // namespace avx2

namespace avx512 {
// Heads of 40 or 72 leave half a vector: a product of half a one takes half the time on a Zen 4.
using Half = __m256;
constexpr int kHalf = 8, kPanelRows[] = {0, 12, 12, 8};  // 24 sums in 32 registers
#define DX_PRODUCTS_TARGET DX_AVX512_KERNEL
DX_PRODUCTS_TARGET inline Half half_of(Vector v) {
  return _mm512_maskz_extractf32x8_ps(0xFF, v, 0);  // the cast makes GCC 12 warn of its own header
}
DX_PRODUCTS_TARGET inline Half load_half(const float* p) { return _mm256_loadu_ps(p); }
DX_PRODUCTS_TARGET inline Half multiply_add(Half a, Half b, Half c) {
  return _mm256_fmadd_ps(a, b, c);
}
DX_PRODUCTS_TARGET inline void store(float* p, Half v) { _mm256_storeu_ps(p, v); }
#include "panels_of_one_isa.h"
#undef DX_PRODUCTS_TARGET
}  // namespace avx512

// Two products of bfloat16 for one of float32, on the processors that have the instruction.
namespace avx512_bf16 {
using avx512::broadcast;
using avx512::Half;
using avx512::half_of;
using avx512::kHalf;
using avx512::kPanelRows;
using avx512::kWidth;
using avx512::load;
using avx512::load_half;
using avx512::multiply_add;
using avx512::store;
using avx512::Vector;
using avx512::zero;
#undef DX_PRODUCT
#define DX_PRODUCT multiply_pairs
#define DX_PRODUCTS_TARGET __attribute__((target(DX_AVX512 ",avx512bf16")))
DX_PRODUCTS_TARGET inline Vector multiply_pairs(Vector a, Vector b, Vector c) {
  return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
}
DX_PRODUCTS_TARGET inline Half multiply_pairs(Half a, Half b, Half c) {
  return _mm256_dpbf16_ps(c, (__m256bh)a, (__m256bh)b);
}
// A row of `count` numbers, a multiple of 32, rounded to pairs in its first half.
DX_PRODUCTS_TARGET inline void round_to_pairs(float* row, int64_t count) {
  for (int64_t i = 0; i < count; i += 2 * kWidth) {
    const __m512bh pairs = _mm512_cvtne2ps_pbh(load(row + i + kWidth), load(row + i));
    _mm512_storeu_si512(row + i / 2, (__m512i)pairs);
  }
}
#include "panels_of_one_isa.h"
#undef DX_PRODUCTS_TARGET
#undef DX_PRODUCT
#define DX_PRODUCT multiply_add
}  // namespace avx512_bf16

#elif defined(DX_NEON)
namespace neon {
using Half = Vector;
constexpr int kHalf = 0, kPanelRows[] = {0, 12, 12, 8};
#define DX_PRODUCTS_TARGET
inline Half half_of(Vector v) { return v; }
inline Half load_half(const float* p) { return load(p); }
#include "panels_of_one_isa.h"
#undef DX_PRODUCTS_TARGET
}  // namespace neon
#endif

#undef DX_PRODUCT

inline void multiply_panel(const PanelProduct& p, int64_t width) {
#if defined(DX_X86)
  const Isa isa = best_isa();
  if (p.pairs) return avx512_bf16::multiply_panel(p, width);
  if (isa == Isa::avx512) return avx512::multiply_panel(p, width);
  if (isa == Isa::avx2) return avx2::multiply_panel(p, width);
#elif defined(DX_NEON)
  if (best_isa() == Isa::neon) return neon::multiply_panel(p, width);
#endif
  portable::multiply_panel(p, width);
}

inline void round_to_pairs(float* row, int64_t count) {
#if defined(DX_X86)
  avx512_bf16::round_to_pairs(row, count);
#endif
}

// How the columns of a matrix [numbers, columns] are divided into panels. That of columns first,
// ..., first + width - 1 begins at numbers * first; there are zeros beyond the last column.
class Panels {
 public:
  explicit Panels(int64_t columns) : columns_(columns) {
#if defined(DX_X86)
    const Isa isa = best_isa();
    if (isa == Isa::avx512) vector_ = avx512::kWidth, half_ = avx512::kHalf;
    if (isa == Isa::avx2) vector_ = avx2::kWidth;
#elif defined(DX_NEON)
    if (best_isa() == Isa::neon) vector_ = neon::kWidth;
#endif
  }

  int64_t width_at(int64_t first) const {
    const int64_t left = columns_ - first, vectors = (left + vector_ - 1) / vector_;
    const int64_t taken = vectors == 4 ? 2 : std::min<int64_t>(vectors, 3);
    const bool last = taken == vectors, half = last && left <= taken * vector_ - half_;
    return taken * vector_ - (half ? half_ : 0);
  }
  // Of all panels: the columns and the zeros beyond them.
  int64_t width() const {
    const int64_t rest = columns_ % vector_;
    return columns_ - rest + (rest == 0 ? 0 : rest <= half_ ? half_ : vector_);
  }

 private:
  int64_t columns_, vector_ = portable::kWidth, half_ = 0;
};

}  // namespace dx
