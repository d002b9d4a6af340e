// Two random words to two normals (Box & Muller 1958), in float32 with the same bits everywhere:
//   u = (r0 + 1/2) 2^-32,  radius = sqrt(-2 ln u),  angle = 2 pi r1 2^-32
//   z0 = radius cos(angle),  z1 = radius sin(angle)
// The polynomials are minimax fits, good to 2.5e-8 of ln u and to 5e-9 for sin and cos. With the
// rounding of float32 a normal is within 3e-7 of its radius.
#pragma once

#include "portable.h"

namespace dx {

// -2 ln(u), u = (r + 1/2) 2^-32, by u = (1 + f) 2^e with f in [-1/2, 0).
DX_INLINE float minus_two_log(uint32_t r) {
  // r as a signed number: u, or where that is 1/2 and more, u - 1, of which float32 keeps all the
  // digits that it has none left for in u itself.
  const float v = fma(float(int32_t(r)), 0x1p-32f, 0x1p-33f);
  const bool upper = v < 0.0f;
  const float mantissa = float_of((bits_of(v) & 0x007FFFFFu) | 0x3F000000u);
  const float f = upper ? v : mantissa - 1.0f;
  const float e = upper ? 0.0f : float(int32_t(bits_of(v) >> 23) - 126);
  float p = -2.829078499e+00f;  // -2 ln(1 + f) = f (-2 + f p(f))
  p = fma(p, f, -3.279147672e+00f);
  p = fma(p, f, -2.417404636e+00f);
  p = fma(p, f, -3.618960469e-01f);
  p = fma(p, f, -5.273802856e-01f);
  p = fma(p, f, 4.873653476e-01f);
  p = fma(p, f, -6.672642394e-01f);
  p = fma(p, f, 9.999904343e-01f);
  p = fma(p, f, -2.0f);
  return fma(p, f, e * -1.386294361e+00f);
}

// Two normals of a radius and the angle 2 pi r 2^-32. The top bit of r + 2^30 says whether the
// nearest multiple of half a turn is odd; what r is beyond that multiple, a signed number, is
// exact.
DX_INLINE void turn(float radius, uint32_t r, float& z0, float& z1) {
  const float x = float(int32_t(r << 1)) * 7.314590396e-10f;  // pi 2^-32; in [-pi/2, pi/2]
  const float x2 = x * x;
  float s = 2.600054762e-06f;  // sin(x) = x + x^3 s(x^2)
  s = fma(s, x2, -1.980661521e-04f);
  s = fma(s, x2, 8.333017292e-03f);
  s = fma(s, x2, -1.666665710e-01f);
  s = fma(x * x2, s, x);
  float c = -2.607711110e-07f;
  c = fma(c, x2, 2.476188660e-05f);
  c = fma(c, x2, -1.388840352e-03f);
  c = fma(c, x2, 4.166664073e-02f);
  c = fma(c, x2, -4.999999955e-01f);
  c = fma(c, x2, 1.0f);
  radius = float_of(bits_of(radius) ^ ((r + 0x40000000u) & 0x80000000u));
  z0 = radius * c;
  z1 = radius * s;
}

// The square root, correctly rounded, of a number from 2^-100 to 2^100. On a GPU it is what nvcc
// makes of sqrtf within that range (read in the machine code for sm_90), without the check of the
// range and the branch for what lies outside it.
DX_INLINE float root(float x) {
#if defined(__CUDA_ARCH__)
  float reciprocal;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(x));
  const float near = x * reciprocal, half = 0.5f * reciprocal;
  return fma(fma(-near, near, x), half, near);
#elif defined(DX_GNU)
  return __builtin_sqrtf(x);
#else
  return sqrtf(x);
#endif
}

// minus_two_log is between 2e-10 and 46.
DX_INLINE void box_muller(uint32_t r0, uint32_t r1, float& z0, float& z1) {
  const float radius = root(minus_two_log(r0));
  turn(radius, r1, z0, z1);
}

}  // namespace dx
