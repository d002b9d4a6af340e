// Rows times columns, the sums in registers: what the CPU's convolutions spend their time in. The
// one place with intrinsics: what the compiler made of plain loops did 35 to 49 thousand million
// products a second on AVX2, where this does 52 to 57.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../math/half.h"
#include "simd.h"

#if defined(DX_X86)
#include <immintrin.h>
#elif defined(DX_NEON)
#include <arm_neon.h>
#endif

namespace dx {

constexpr int kColumns = 32;  // output channels that are computed together
// Products that are summed up one after the other, before these sums are added up: in one sum of
// thousands each is rounded to what the others have come to.
constexpr int64_t kSummed = 256;

// Sums [count, 32] of rows times filters, which may be of half precision: they are widened as they
// are loaded, two vectors for as many products as all rows have. A row is given in segments, which
// lie apart: the pixels under a filter, each in one tensor or two.
struct Products {
  const float* const* rows;  // [segments, stride]: where the segments of each row begin
  int64_t stride, segments, parts;
  int64_t counts[2];  // of numbers in a segment, by turns where there are two parts
  int64_t offset;     // added to every beginning

  int64_t numbers() const { return segments / parts * (counts[0] + (parts == 2 ? counts[1] : 0)); }
};

namespace portable {
using Vector = float;
constexpr int kWidth = 1, kRows = 4;
#define DX_PRODUCTS_TARGET
inline Vector zero() { return 0.0f; }
inline Vector load(const float* p) { return *p; }
inline Vector load(const dx::Half* p) { return to_float(*p); }
inline Vector load(const BFloat16* p) { return to_float(*p); }
inline Vector broadcast(float x) { return x; }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
inline Vector add(Vector a, Vector b) { return a + b; }
inline void store(float* p, Vector v) { *p = v; }
#include "products_of_one_isa.h"
#undef DX_PRODUCTS_TARGET
}  // namespace portable

#if defined(DX_X86)
namespace avx2 {
#define DX_PRODUCTS_TARGET DX_AVX2_KERNEL
using Vector = __m256;
constexpr int kWidth = 8, kRows = 6;  // 16 registers: 12 sums, 2 filters, 1 number
DX_PRODUCTS_TARGET inline Vector zero() { return _mm256_setzero_ps(); }
DX_PRODUCTS_TARGET inline Vector load(const float* p) { return _mm256_loadu_ps(p); }
DX_PRODUCTS_TARGET inline Vector load(const dx::Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
DX_PRODUCTS_TARGET inline Vector load(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
DX_PRODUCTS_TARGET inline Vector broadcast(float x) { return _mm256_set1_ps(x); }
DX_PRODUCTS_TARGET inline Vector multiply_add(Vector a, Vector b, Vector c) {
  return _mm256_fmadd_ps(a, b, c);
}
DX_PRODUCTS_TARGET inline Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
DX_PRODUCTS_TARGET inline void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
#include "products_of_one_isa.h"
#undef DX_PRODUCTS_TARGET
}  // namespace avx2

namespace avx512 {
#define DX_PRODUCTS_TARGET DX_AVX512_KERNEL
using Vector = __m512;
constexpr int kWidth = 16, kRows = 8;
DX_PRODUCTS_TARGET inline Vector zero() { return _mm512_setzero_ps(); }
DX_PRODUCTS_TARGET inline Vector load(const float* p) { return _mm512_loadu_ps(p); }
// The masks are whole: without one GCC 12 warns of its own headers.
DX_PRODUCTS_TARGET inline Vector load(const dx::Half* p) {
  return _mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_epi16(p));
}
DX_PRODUCTS_TARGET inline Vector load(const BFloat16* p) {
  const __m512i bits = _mm512_maskz_cvtepu16_epi32(0xFFFF, _mm256_loadu_epi16(p));
  return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xFFFF, bits, 16));
}
DX_PRODUCTS_TARGET inline Vector broadcast(float x) { return _mm512_set1_ps(x); }
DX_PRODUCTS_TARGET inline Vector multiply_add(Vector a, Vector b, Vector c) {
  return _mm512_fmadd_ps(a, b, c);
}
DX_PRODUCTS_TARGET inline Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
DX_PRODUCTS_TARGET inline void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
#include "products_of_one_isa.h"
#undef DX_PRODUCTS_TARGET
}  // namespace avx512

#elif defined(DX_NEON)
// Every processor of this architecture has it. Nobody has timed it: the tests run on an emulator.
namespace neon {
#define DX_PRODUCTS_TARGET
using Vector = float32x4_t;
constexpr int kWidth = 4, kRows = 8;  // of 32 registers; 12 rows would leave 8 of a block's 32
inline Vector zero() { return vdupq_n_f32(0.0f); }
inline Vector load(const float* p) { return vld1q_f32(p); }
inline Vector load(const dx::Half* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
}
inline Vector load(const BFloat16* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16));
}
inline Vector broadcast(float x) { return vdupq_n_f32(x); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }
inline Vector add(Vector a, Vector b) { return vaddq_f32(a, b); }
inline void store(float* p, Vector v) { vst1q_f32(p, v); }
#include "products_of_one_isa.h"
#undef DX_PRODUCTS_TARGET
}  // namespace neon
#endif

// Filters [numbers, 32] lie in panels [32 / panel, numbers, panel], of as many columns as are
// computed at once: two vectors.
inline int64_t panel() {
#if defined(DX_X86)
  const Isa isa = best_isa();
  if (isa != Isa::baseline) return isa == Isa::avx512 ? avx512::kPanel : avx2::kPanel;
#elif defined(DX_NEON)
  if (best_isa() == Isa::neon) return neon::kPanel;
#endif
  return portable::kPanel;
}

// Lays number n, of `numbers`, of a filter's 32 columns where they belong: panel by panel, for the
// panel's size is known only as it runs, and an element's place would take a division.
template <class T>
DX_INLINE void lay_columns(const T* __restrict columns, int64_t panel, int64_t numbers, int64_t n,
                           T* __restrict filters) {
  for (int64_t first = 0; first < kColumns; first += panel)
    std::copy_n(columns + first, panel, filters + first * numbers + n * panel);
}

// The first `columns` of the sums [count, 32]; those up to the next vector's end are written too.
template <class F>
void multiply(const Products& p, int64_t count, int64_t columns, const F* filters, float* sums) {
#if defined(DX_X86)
  const Isa isa = best_isa();
  if (isa == Isa::avx512) return avx512::multiply_all(p, count, columns, filters, sums);
  if (isa == Isa::avx2) return avx2::multiply_all(p, count, columns, filters, sums);
#elif defined(DX_NEON)
  if (best_isa() == Isa::neon) return neon::multiply_all(p, count, columns, filters, sums);
#endif
  portable::multiply_all(p, count, columns, filters, sums);
}

}  // namespace dx
