// Two random words to two normals (Box & Muller 1958), in float32 with the same bits everywhere:
//   u = (r0 + 1/2) 2^-32,  radius = sqrt(-2 ln u),  angle = 2 pi r1 2^-32
//   z0 = radius cos(angle),  z1 = radius sin(angle)
// The polynomials are minimax fits; their error is below 6e-9, a tenth of float32's rounding.
#pragma once

#include "portable.h"

namespace dx {

// ln(u), u = (r + 1/2) 2^-32, by u = (1 + f) 2^e with 1 + f in [sqrt(1/2), sqrt(2)).
DX_INLINE float log_uniform(uint32_t r) {
  const uint32_t sqrt_half = 0x3F3504F3u;
  const float u = fma(float(r), 0x1p-32f, 0x1p-33f);
  const uint32_t offset = bits_of(u) - sqrt_half;
  const float e = float(int32_t(offset) >> 23);
  // Near u = 1, where float32 has no digits left for u, 1 - u is read off the word.
  const float one_minus_u = fma(float(~r), 0x1p-32f, 0x1p-33f);
  const float f = e == 0.0f ? -one_minus_u : float_of((offset & 0x007FFFFFu) + sqrt_half) - 1.0f;
  // ln(1 + f) = f - f^2/2 + f^3 p(f)
  float p = -7.859928346e-02f;
  p = fma(p, f, 1.288129767e-01f);
  p = fma(p, f, -1.312845846e-01f);
  p = fma(p, f, 1.418123174e-01f);
  p = fma(p, f, -1.662459236e-01f);
  p = fma(p, f, 2.000228517e-01f);
  p = fma(p, f, -2.500080910e-01f);
  p = fma(p, f, 3.333331674e-01f);
  const float f2 = f * f;
  const float tail = fma(f2 * f, p, -0.5f * f2);
  // e ln 2 in two parts: the first is exact for every e that occurs.
  const float low = fma(e, 1.428606820e-06f, tail);
  return fma(e, 6.931457520e-01f, f + low);
}

// sin and cos of 2 pi r 2^-32. The quadrant is read off the word's top bits, so the reduction to
// [-pi/4, pi/4] is exact.
DX_INLINE void sincos_turn(uint32_t r, float& sine, float& cosine) {
  const uint32_t quadrant = (r + 0x20000000u) >> 30;
  const float x = float(int32_t(r - (quadrant << 30))) * 1.462918079e-09f;  // 2 pi 2^-32
  const float x2 = x * x;
  float s = -1.951729474e-04f;
  s = fma(s, x2, 8.332178107e-03f);
  s = fma(s, x2, -1.666665494e-01f);
  s = fma(x * x2, s, x);
  float c = 2.443844409e-05f;
  c = fma(c, x2, -1.388736744e-03f);
  c = fma(c, x2, 4.166664686e-02f);
  c = fma(x2 * x2, c, fma(-0.5f, x2, 1.0f));
  const bool odd = quadrant & 1;
  const uint32_t sine_sign = (quadrant & 2) << 30, cosine_sign = ((quadrant + 1) & 2) << 30;
  sine = float_of(bits_of(odd ? c : s) ^ sine_sign);
  cosine = float_of(bits_of(odd ? s : c) ^ cosine_sign);
}

DX_INLINE void box_muller(uint32_t r0, uint32_t r1, float& z0, float& z1) {
#if defined(__GNUC__) && !defined(__CUDA_ARCH__)
  const float radius = __builtin_sqrtf(-2.0f * log_uniform(r0));
#else
  const float radius = sqrtf(-2.0f * log_uniform(r0));
#endif
  float sine, cosine;
  sincos_turn(r1, sine, cosine);
  z0 = radius * cosine;
  z1 = radius * sine;
}

}  // namespace dx
