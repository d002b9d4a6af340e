// fma for x86 processors without the instruction, where the C library's takes 20 ns and its
// callers' loops are not vectorised.
//
// float64 holds the product of two float32 exactly, and s, its sum with a third, to 53 bits.
// Another rounding, to float32, goes wrong only where s was rounded itself and lies half way
// between two float32. There s is taken to that one of the two float64 around the exact sum whose
// last bit is odd, which every later rounding takes the right way (Boldo & Melquiond 2008,
// "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd"). An fma
// takes 0.8 ns of a Zen 4 core so where GCC vectorises, four at a time, and 2.8 ns where clang
// calls it for each number.
#define DX_DEFINES_EXACT_FMA 1
#include "../math/portable.h"

#if defined(DX_FMA_IS_CHOSEN)
#include <emmintrin.h>

namespace dx {
namespace {

// p + c rounded to odd.
inline __m128d sum_to_odd(__m128d p, __m128d c) {
  const __m128d s = _mm_add_pd(p, c), zero = _mm_setzero_pd();
  // What the rounding lost, or where that is 0, 0 (Knuth, TAOCP 2, 4.2.2); at infinity it is NaN.
  const __m128d lost = _mm_add_pd(_mm_sub_pd(c, _mm_sub_pd(s, p)), _mm_sub_pd(p, _mm_sub_pd(s, c)));
  const __m128d lossy = _mm_or_pd(_mm_cmplt_pd(lost, zero), _mm_cmpgt_pd(lost, zero));
  // 1 where s was rounded, and where that was away from zero: there its magnitude goes down again.
  const __m128i inexact = _mm_srli_epi64(_mm_castpd_si128(lossy), 63);
  const __m128i away = _mm_srli_epi64(_mm_castpd_si128(_mm_xor_pd(lost, s)), 63);
  const __m128i down = _mm_sub_epi64(_mm_castpd_si128(s), _mm_and_si128(inexact, away));
  return _mm_castsi128_pd(_mm_or_si128(down, inexact));
}

inline __m128d upper(__m128 x) { return _mm_cvtps_pd(_mm_movehl_ps(x, x)); }

inline __m128 rounded(__m128d low, __m128d high) {
  return _mm_movelh_ps(_mm_cvtpd_ps(low), _mm_cvtpd_ps(high));
}

// The last 29 bits of each lane, which float32 has not got.
inline __m128i last_bits(__m128d low, __m128d high) {
  const __m128 words = _mm_shuffle_ps(_mm_castpd_ps(low), _mm_castpd_ps(high), 0x88);
  return _mm_and_si128(_mm_castps_si128(words), _mm_set1_epi32(0x1FFFFFFF));
}

// Whether a lane's second rounding may be wrong: of products p that are no float32 (of one that is,
// as where a factor is 1, no sum is rounded twice wrongly: Figueroa 1995, "When is double rounding
// innocuous?") and of sums half way, or with a result that is subnormal or the smallest normal: the
// float32 around it are further apart than its size tells.
inline bool in_doubt(__m128i last_of_p, __m128i last_of_s, __m128 result) {
  const __m128i whole = _mm_cmpeq_epi32(last_of_p, _mm_setzero_si128());
  const __m128i half = _mm_cmpeq_epi32(last_of_s, _mm_set1_epi32(0x10000000));
  const __m128i magnitude = _mm_and_si128(_mm_castps_si128(result), _mm_set1_epi32(0x7FFFFFFF));
  // Their order begins at 1, and zero, which is exact, comes last.
  const __m128i order = _mm_add_epi32(magnitude, _mm_set1_epi32(0x7FFFFFFF));
  const __m128i coarse = _mm_cmplt_epi32(order, _mm_set1_epi32(int32_t(0x80800000)));
  return _mm_movemask_epi8(_mm_or_si128(_mm_andnot_si128(whole, half), coarse)) != 0;
}

}  // namespace

#if defined(DX_GNU)
// GCC calls it by the names that x86's vector function ABI gives to exact_fma's form for four
// elements: one for SSE2, and another for where it is told that there is AVX.
#define DX_FORM(isa) "_ZGV" isa "N4vvv__ZN2dx9exact_fmaEfff"
__m128 exact_fma_of_four(__m128 a, __m128 b, __m128 c) __asm__(DX_FORM("b"));
__m128 exact_fma_with_avx(__m128 a, __m128 b, __m128 c) __asm__(DX_FORM("c"))
    __attribute__((alias(DX_FORM("b"))));
#endif

__m128 exact_fma_of_four(__m128 a, __m128 b, __m128 c) {
  const __m128d p_low = _mm_mul_pd(_mm_cvtps_pd(a), _mm_cvtps_pd(b)), c_low = _mm_cvtps_pd(c);
  const __m128d p_high = _mm_mul_pd(upper(a), upper(b)), c_high = upper(c);
  const __m128d low = _mm_add_pd(p_low, c_low), high = _mm_add_pd(p_high, c_high);
  const __m128 result = rounded(low, high);
  if (!in_doubt(last_bits(p_low, p_high), last_bits(low, high), result)) return result;
  return rounded(sum_to_odd(p_low, c_low), sum_to_odd(p_high, c_high));
}

float exact_fma(float a, float b, float c) {
  return _mm_cvtss_f32(exact_fma_of_four(_mm_set_ss(a), _mm_set_ss(b), _mm_set_ss(c)));
}

}  // namespace dx

#endif
