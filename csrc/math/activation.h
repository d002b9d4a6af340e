// The activations that follow a GroupNorm, with their derivatives, in float32.
// The polynomials are minimax fits with errors below 1e-8.
#pragma once

#include <type_traits>

#include "portable.h"

namespace dx {

// The order of diffusion_ext.ops.group_norm_act.ACTIVATIONS.
enum class Act : int64_t { identity, relu, silu, gelu, gelu_tanh };
constexpr int64_t kActs = 5;

// exp and 1/x for the activations, whose bits are no contract: on a GPU each is one instruction of
// its special function unit, good to 2 units in the last place. What would be subnormal is 0.
DX_INLINE float exp(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.442695041f));
  return y;
#else
  x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);  // keeps the result finite and normal
  // x = n ln 2 + r; adding and subtracting 1.5 * 2^23 rounds n to an integer.
  const float magic = 12582912.0f;
  const float shifted = fma(x, 1.442695041f, magic);
  const float n = shifted - magic;
  const float r = fma(n, -1.428606820e-06f, fma(n, -6.931457520e-01f, x));
  float p = 1.395045521e-03f;  // exp(r) = 1 + r + r^2 p(r)
  p = fma(p, r, 8.368876246e-03f);
  p = fma(p, r, 4.166620641e-02f);
  p = fma(p, r, 1.666651896e-01f);
  p = fma(p, r, 5.000000095e-01f);
  const float scale = float_of((bits_of(shifted) << 23) + 0x3F800000u);  // 2^n
  return fma(r * r, p, r + 1.0f) * scale;
#endif
}

DX_INLINE float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

DX_INLINE float sigmoid(float x) { return reciprocal(1.0f + exp(-x)); }

// The normal distribution's integral to a, and density exp(-a^2/2) (without the 1/sqrt(2 pi)).
DX_INLINE float normal_cdf(float a, float& density) {
  density = exp(-0.5f * a * a);
  const float x = fabsf(a) * 7.071067812e-01f;
  const float t = reciprocal(fma(0.5f, x, 1.0f));
  float g = 4.256108622e-02f;  // erfc(x) = exp(-x^2) t g(t), t = 1/(1 + x/2)
  g = fma(g, t, -2.305344905e-01f);
  g = fma(g, t, 4.818076244e-01f);
  g = fma(g, t, -4.360485513e-01f);
  g = fma(g, t, 1.134711406e-01f);
  g = fma(g, t, -4.727513547e-02f);
  g = fma(g, t, 8.851468499e-02f);
  g = fma(g, t, 1.766209106e-01f);
  g = fma(g, t, 2.466770191e-01f);
  g = fma(g, t, 2.821115390e-01f);
  g = fma(g, t, 2.820941781e-01f);
  const float tail = 0.5f * density * t * g;  // half of erfc(|a|/sqrt 2): exact where it is small
  return a < 0.0f ? tail : 1.0f - tail;
}

// act(a), and its derivative at a.
template <Act act>
DX_INLINE float activate(float a, float& derivative) {
  if constexpr (act == Act::identity) {
    derivative = 1.0f;
    return a;
  } else if constexpr (act == Act::relu) {
    derivative = a > 0.0f ? 1.0f : 0.0f;
    return a < 0.0f ? 0.0f : a;  // a NaN stays one
  } else if constexpr (act == Act::silu) {
    const float s = sigmoid(a);
    derivative = fma(a * s, 1.0f - s, s);
    return a * s;
  } else if constexpr (act == Act::gelu) {
    float density;
    const float cdf = normal_cdf(a, density);
    derivative = fma(3.989422804e-01f * a, density, cdf);
    return a * cdf;
  } else {
    // 0.5 (1 + tanh(y)) = sigmoid(2y), y = sqrt(2/pi) (a + 0.044715 a^3)
    const float a2 = a * a;
    const float s = sigmoid(1.595769122f * fma(0.044715f * a2, a, a));
    derivative = fma(a * s * (1.0f - s), fma(2.140644490e-01f, a2, 1.595769122f), s);
    return a * s;
  }
}

// Calls f with the activation as a constant.
template <class F>
DX_INLINE void dispatch_act(Act act, const F& f) {
  switch (act) {
    case Act::identity: return f(std::integral_constant<Act, Act::identity>());
    case Act::relu: return f(std::integral_constant<Act, Act::relu>());
    case Act::silu: return f(std::integral_constant<Act, Act::silu>());
    case Act::gelu: return f(std::integral_constant<Act, Act::gelu>());
    case Act::gelu_tanh: return f(std::integral_constant<Act, Act::gelu_tanh>());
  }
}

}  // namespace dx
