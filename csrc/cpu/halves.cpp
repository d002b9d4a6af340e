#include "halves.h"

#include "simd.h"

#if defined(DX_X86)
#include <immintrin.h>
#endif

namespace dx {
namespace {

template <class T>
DX_INLINE void load_rows(const T* __restrict from, int64_t stride, int64_t rows, int64_t length,
                         float* __restrict to) {
  for (int64_t r = 0; r < rows; ++r, from += stride, to += length)
    for (int64_t i = 0; i < length; ++i) to[i] = to_float(from[i]);
}

template <class T>
DX_INLINE void store_rows(const float* __restrict from, int64_t rows, int64_t length,
                          T* __restrict to, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r, from += length, to += stride)
    for (int64_t i = 0; i < length; ++i) round_to(from[i], to[i]);
}

#if defined(DX_X86)

DX_AVX2_KERNEL void load_avx2(const Half* from, int64_t stride, int64_t rows, int64_t length,
                              float* to) {
  for (int64_t r = 0; r < rows; ++r, from += stride, to += length) {
    int64_t i = 0;
    for (; i + 8 <= length; i += 8)
      _mm256_storeu_ps(
          to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    for (; i < length; ++i) to[i] = _cvtsh_ss(from[i].bits);
  }
}

DX_AVX2_KERNEL void store_avx2(const float* from, int64_t rows, int64_t length, Half* to,
                               int64_t stride) {
  for (int64_t r = 0; r < rows; ++r, from += length, to += stride) {
    int64_t i = 0;
    for (; i + 8 <= length; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
    for (; i < length; ++i) to[i].bits = _cvtss_sh(from[i], _MM_FROUND_TO_NEAREST_INT);
  }
}

// The lanes of the elements that are left.
DX_AVX512_KERNEL inline __mmask16 lanes(int64_t left) {
  return __mmask16(_bzhi_u32(0xFFFF, uint32_t(left)));
}

DX_AVX512_KERNEL void load_avx512(const Half* from, int64_t stride, int64_t rows, int64_t length,
                                  float* to) {
  for (int64_t r = 0; r < rows; ++r, from += stride, to += length) {
    int64_t i = 0;
    for (; i + 16 <= length; i += 16)
      _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_epi16(from + i)));
    if (i == length) continue;
    const __mmask16 mask = lanes(length - i);
    _mm512_mask_storeu_ps(to + i, mask, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from + i)));
  }
}

DX_AVX512_KERNEL void store_avx512(const float* from, int64_t rows, int64_t length, Half* to,
                                   int64_t stride) {
  for (int64_t r = 0; r < rows; ++r, from += length, to += stride) {
    int64_t i = 0;
    for (; i + 16 <= length; i += 16)
      _mm256_storeu_epi16(to + i,
                          _mm512_cvtps_ph(_mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
    if (i == length) continue;
    const __mmask16 mask = lanes(length - i);
    const __m512 rest = _mm512_maskz_loadu_ps(mask, from + i);
    _mm256_mask_storeu_epi16(to + i, mask, _mm512_cvtps_ph(rest, _MM_FROUND_TO_NEAREST_INT));
  }
}
#endif

}  // namespace

void load(const Half* from, int64_t stride, int64_t rows, int64_t length, float* to) {
#if defined(DX_X86)
  if (best_isa() == Isa::avx512) return load_avx512(from, stride, rows, length, to);
  if (best_isa() == Isa::avx2) return load_avx2(from, stride, rows, length, to);
#endif
  load_rows(from, stride, rows, length, to);
}

void store(const float* from, int64_t rows, int64_t length, Half* to, int64_t stride) {
#if defined(DX_X86)
  if (best_isa() == Isa::avx512) return store_avx512(from, rows, length, to, stride);
  if (best_isa() == Isa::avx2) return store_avx2(from, rows, length, to, stride);
#endif
  store_rows(from, rows, length, to, stride);
}

void load(const BFloat16* from, int64_t stride, int64_t rows, int64_t length, float* to) {
  on_best_isa([=]() DX_KERNEL { load_rows(from, stride, rows, length, to); });
}

void store(const float* from, int64_t rows, int64_t length, BFloat16* to, int64_t stride) {
  on_best_isa([=]() DX_KERNEL { store_rows(from, rows, length, to, stride); });
}

}  // namespace dx
