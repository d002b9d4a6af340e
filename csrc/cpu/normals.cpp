// Thirty-two Philox counters at a time, 128 normals. The compilers turn the generator's 32 x 32 ->
// 64 bit products into shuffles and twice the multiplications; the intrinsics below keep each word
// in a 64-bit lane, where the product needs neither. A normal takes 0.58 ns of a Zen 4 core with
// AVX-512, of which its arithmetic units could not do the 3.2 vector instructions in under 0.48.
#include "normals.h"

#include <algorithm>

#include "../math/normal.h"
#include "../math/philox.h"
#include "simd.h"

#if defined(DX_X86)
#if !defined(__clang__)
// False, in GCC 12's own header (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

namespace dx {
namespace {

constexpr int kCounters = 32;
constexpr int64_t kBlock = 4 * kCounters;  // elements

// Word k of the i-th counter, or its k-th normal.
using WordBlock = uint32_t[4][kCounters];
using NormalBlock = float[4][kCounters];

// The words of counters first .. first + 31; first is a multiple of 32, so its low half counts up
// without a carry.
DX_INLINE void philox_block(const NormalKey& key, uint64_t first, WordBlock r) {
  for (uint32_t i = 0; i < kCounters; ++i) {
    const Words4 w = philox4x32({uint32_t(first) + i, uint32_t(first >> 32), key.step, key.stream},
                                uint32_t(key.seed), uint32_t(key.seed >> 32));
    r[0][i] = w.r0, r[1][i] = w.r1, r[2][i] = w.r2, r[3][i] = w.r3;
  }
}

DX_INLINE void box_muller_block(const WordBlock r, NormalBlock z) {
  for (int k = 0; k < 4; k += 2)
#pragma omp simd
    for (int i = 0; i < kCounters; ++i) box_muller(r[k][i], r[k + 1][i], z[k][i], z[k + 1][i]);
}

DX_INLINE void normal_blocks(const NormalKey& key, uint64_t first, int64_t blocks, float* out) {
  for (int64_t b = 0; b < blocks; ++b, first += kCounters, out += kBlock) {
    WordBlock r;
    NormalBlock z;
    philox_block(key, first, r);
    box_muller_block(r, z);
    for (int i = 0; i < kBlock; ++i) out[i] = z[i % 4][i / 4];
  }
}

#if defined(DX_X86)

constexpr uint64_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;

// What counters have in common that differ in their low word alone: the rounds' keys, and of the
// first three rounds what follows from the three other words.
struct Uniform {
  uint64_t key0[10], key1[10];
  uint64_t c2_round0, c0_round1, c2_round1, c2_round2;

  Uniform(const NormalKey& key, uint32_t block_high) {
    for (uint32_t i = 0; i < 10; ++i) {
      key0[i] = uint32_t(key.seed) + i * 0x9E3779B9u;
      key1[i] = uint32_t(key.seed >> 32) + i * 0xBB67AE85u;
    }
    const uint64_t p1 = kMultiplier1 * key.step;
    const uint64_t p0 = kMultiplier0 * ((p1 >> 32) ^ block_high ^ key0[0]);
    c2_round0 = key.stream ^ key1[0];
    c0_round1 = uint32_t(p1) ^ key0[1];
    c2_round1 = (p0 >> 32) ^ key1[1];
    c2_round2 = uint32_t(p0) ^ key1[2];
  }
};

// The ten rounds of V vectors c[0], side by side, which hides the multiplications' latency. Each
// word lies in a 64-bit lane, for any of its low half's products: a product's high half may stay
// above a word, since only the low 32 bits of a lane are ever used.
#define DX_PHILOX(V, c, u, MUL, HIGH, XOR, XOR3, SET)                            \
  for (int v = 0; v < V; ++v) {                                                  \
    const auto p0 = MUL(c[0][v], SET(kMultiplier0));                             \
    const auto p1 = MUL(XOR(HIGH(p0, 32), SET(u.c2_round0)), SET(kMultiplier1)); \
    c[0][v] = XOR(HIGH(p1, 32), SET(u.c0_round1));                               \
    c[2][v] = XOR(p0, SET(u.c2_round1));                                         \
    const auto q0 = MUL(c[0][v], SET(kMultiplier0));                             \
    const auto q1 = MUL(c[2][v], SET(kMultiplier1));                             \
    c[0][v] = XOR3(HIGH(q1, 32), p1, SET(u.key0[2]));                            \
    c[2][v] = XOR(HIGH(q0, 32), SET(u.c2_round2));                               \
    c[1][v] = q1;                                                                \
    c[3][v] = q0;                                                                \
  }                                                                              \
  for (int round = 3; round < 10; ++round)                                       \
    for (int v = 0; v < V; ++v) {                                                \
      const auto p0 = MUL(c[0][v], SET(kMultiplier0));                           \
      const auto p1 = MUL(c[2][v], SET(kMultiplier1));                           \
      c[0][v] = XOR3(HIGH(p1, 32), c[1][v], SET(u.key0[round]));                 \
      c[2][v] = XOR3(HIGH(p0, 32), c[3][v], SET(u.key1[round]));                 \
      c[1][v] = p1;                                                              \
      c[3][v] = p0;                                                              \
    }

// Two vectors of counters become one of their words, in pairs of neighbours: c[k][v]'s in the even
// lanes, c[k][v + 1]'s in the odd ones. The ramps that the counters start from are such that a 4 x
// 4 transposition within 128 bits then brings the normals in the order of their elements.
DX_AVX512_KERNEL inline __m512i xor3_avx512(__m512i a, __m512i b, __m512i c) {
  return _mm512_ternarylogic_epi64(a, b, c, 0x96);
}

DX_AVX512_KERNEL inline void interleave_avx512(const NormalBlock z, int first, float* out) {
  const __m512 a = _mm512_load_ps(z[0] + first), b = _mm512_load_ps(z[1] + first);
  const __m512 c = _mm512_load_ps(z[2] + first), d = _mm512_load_ps(z[3] + first);
  const __m512d ab0 = _mm512_castps_pd(_mm512_unpacklo_ps(a, b));
  const __m512d ab1 = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
  const __m512d cd0 = _mm512_castps_pd(_mm512_unpacklo_ps(c, d));
  const __m512d cd1 = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
  _mm512_storeu_pd(out, _mm512_unpacklo_pd(ab0, cd0));
  _mm512_storeu_pd(out + 16, _mm512_unpackhi_pd(ab0, cd0));
  _mm512_storeu_pd(out + 32, _mm512_unpacklo_pd(ab1, cd1));
  _mm512_storeu_pd(out + 48, _mm512_unpackhi_pd(ab1, cd1));
}

DX_AVX512_KERNEL void normal_blocks_avx512(const Uniform& u, uint64_t first, int64_t blocks,
                                           float* out) {
  promise_fma(true);
  const __m512i even = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0);
  const __m512i odd = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
  for (int64_t b = 0; b < blocks; ++b, first += kCounters, out += kBlock) {
    __m512i c[4][4];
    for (int v = 0; v < 4; ++v)
      c[0][v] =
          _mm512_add_epi64(_mm512_set1_epi64(int64_t(first) + v / 2 * 16), v % 2 ? odd : even);
    DX_PHILOX(4, c, u, _mm512_mul_epu32, _mm512_srli_epi64, _mm512_xor_si512, xor3_avx512,
              _mm512_set1_epi64)
    alignas(64) WordBlock r;
    alignas(64) NormalBlock z;
    for (int k = 0; k < 4; ++k)
      for (int v = 0; v < 4; v += 2)
        _mm512_store_si512(r[k] + 8 * v, _mm512_mask_blend_epi32(
                                             0xAAAA, c[k][v], _mm512_slli_epi64(c[k][v + 1], 32)));
    box_muller_block(r, z);
    for (int i = 0; i < kCounters; i += 16) interleave_avx512(z, i, out + 4 * i);
  }
}

DX_AVX2_KERNEL inline __m256i xor3_avx2(__m256i a, __m256i b, __m256i c) {
  return _mm256_xor_si256(_mm256_xor_si256(a, b), c);
}

DX_AVX2_KERNEL inline void interleave_avx2(const NormalBlock z, int first, float* out) {
  const __m256 a = _mm256_load_ps(z[0] + first), b = _mm256_load_ps(z[1] + first);
  const __m256 c = _mm256_load_ps(z[2] + first), d = _mm256_load_ps(z[3] + first);
  const __m256d ab0 = _mm256_castps_pd(_mm256_unpacklo_ps(a, b));
  const __m256d ab1 = _mm256_castps_pd(_mm256_unpackhi_ps(a, b));
  const __m256d cd0 = _mm256_castps_pd(_mm256_unpacklo_ps(c, d));
  const __m256d cd1 = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
  _mm256_storeu_ps(out, _mm256_castpd_ps(_mm256_unpacklo_pd(ab0, cd0)));
  _mm256_storeu_ps(out + 8, _mm256_castpd_ps(_mm256_unpackhi_pd(ab0, cd0)));
  _mm256_storeu_ps(out + 16, _mm256_castpd_ps(_mm256_unpacklo_pd(ab1, cd1)));
  _mm256_storeu_ps(out + 24, _mm256_castpd_ps(_mm256_unpackhi_pd(ab1, cd1)));
}

DX_AVX2_KERNEL void normal_blocks_avx2(const Uniform& u, uint64_t first, int64_t blocks,
                                       float* out) {
  promise_fma(true);
  const __m256i even = _mm256_set_epi64x(5, 1, 4, 0), odd = _mm256_set_epi64x(7, 3, 6, 2);
  for (int64_t b = 0; b < blocks; ++b, first += kCounters, out += kBlock) {
    alignas(32) WordBlock r;
    alignas(32) NormalBlock z;
    for (int i = 0; i < kCounters; i += 8) {  // two vectors at a time: there are 16 registers
      __m256i c[4][2];
      c[0][0] = _mm256_add_epi64(_mm256_set1_epi64x(int64_t(first) + i), even);
      c[0][1] = _mm256_add_epi64(_mm256_set1_epi64x(int64_t(first) + i), odd);
      DX_PHILOX(2, c, u, _mm256_mul_epu32, _mm256_srli_epi64, _mm256_xor_si256, xor3_avx2,
                _mm256_set1_epi64x)
      for (int k = 0; k < 4; ++k)
        _mm256_store_si256(reinterpret_cast<__m256i*>(r[k] + i),
                           _mm256_blend_epi32(c[k][0], _mm256_slli_epi64(c[k][1], 32), 0xAA));
    }
    box_muller_block(r, z);
    for (int i = 0; i < kCounters; i += 8) interleave_avx2(z, i, out + 4 * i);
  }
}

#endif

// out [128 blocks]: the normals of the counters from `first` on, 32 a block, without a carry into
// the counters' high word.
void best_normal_blocks(const NormalKey& key, uint64_t first, int64_t blocks, float* out) {
#if defined(DX_X86)
  const Uniform uniform(key, uint32_t(first >> 32));
  if (best_isa() == Isa::avx512) return normal_blocks_avx512(uniform, first, blocks, out);
  if (best_isa() == Isa::avx2) return normal_blocks_avx2(uniform, first, blocks, out);
#endif
  run_baseline([&]() DX_KERNEL { normal_blocks(key, first, blocks, out); });
}

}  // namespace

void fill_normals(const NormalKey& key, int64_t begin, int64_t count, float* out) {
  constexpr int64_t carry = int64_t{1} << 34;  // elements of counters with the same high word
  while (count > 0) {
    const int64_t skipped = begin % kBlock;
    int64_t made;
    if (skipped == 0 && count >= kBlock) {
      made = std::min(count / kBlock * kBlock, carry - begin % carry);
      best_normal_blocks(key, uint64_t(begin) / 4, made / kBlock, out);
    } else {  // the ends of a run that are not whole blocks
      float z[kBlock];
      best_normal_blocks(key, uint64_t(begin - skipped) / 4, 1, z);
      made = std::min(count, kBlock - skipped);
      std::copy_n(z + skipped, made, out);
    }
    begin += made, count -= made, out += made;
  }
}

}  // namespace dx
