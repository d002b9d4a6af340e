// The activations that follow a GroupNorm, with their derivatives, in float32.
// The polynomials are minimax fits, good to 1e-7 of exp(x) for |x| < 10 (1e-6 at 80), and to
// 2e-8 for the normal distribution.
#pragma once

#include <type_traits>

#include "portable.h"

namespace dx {

// The order of diffusion_ext.ops.group_norm_act.ACTIVATIONS.
enum class Act : int64_t { identity, relu, silu, gelu, gelu_tanh, mish };
constexpr int64_t kActs = 6;

// x within [-87, 88], where exp(x) is finite and normal. A NaN may become either bound: what the
// activations multiply the result with is one itself. Compared as integers, signed for the upper
// bound and unsigned for the lower, since for floats the compiler makes a blend of each comparison.
DX_INLINE float within_exp(float x) {
  const int32_t most = 0x42B00000;     // 88
  const uint32_t least = 0xC2AE0000u;  // -87: as unsigned, negative numbers go up in magnitude
  const int32_t bits = int32_t(bits_of(x));
  const uint32_t below = uint32_t(bits < most ? bits : most);
  return float_of(below < least ? below : least);
}

// exp and 1/x for the activations, whose bits are no contract: on a GPU each is one instruction of
// its special function unit, good to 2 units in the last place. What would be subnormal is 0.
DX_INLINE float exp(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.442695041f));
  return y;
#else
  x = within_exp(x);
  // exp(x) = 2^n 2^f with f in [-1/2, 1/2]; adding and subtracting 1.5 * 2^23 rounds n to an
  // integer. Where an fma would be a call, x - n ln 2 is taken in two parts, of which the first is
  // exact (Cody & Waite 1980).
  const float magic = 12582912.0f, log2_e = 1.442695041f;
  const float shifted = multiply_add(x, log2_e, magic), n = shifted - magic;
  const float f =
      has_fma ? fma(x, log2_e, -n) : ((x - n * 6.93359375e-01f) + n * 2.121944400e-04f) * log2_e;
  float p = 1.326472639e-03f;
  p = multiply_add(p, f, 9.671513032e-03f);
  p = multiply_add(p, f, 5.550733750e-02f);
  p = multiply_add(p, f, 2.402224208e-01f);
  p = multiply_add(p, f, 6.931469776e-01f);
  p = multiply_add(p, f, 1.0f);
  return float_of(bits_of(p) + (bits_of(shifted) << 23));  // n is added to the exponent
#endif
}

// 2^x for x up to 127, to 8e-8: the weights of attention. What would be subnormal is 0, and a NaN
// stays one.
DX_INLINE float exp2(float x) {
  const float magic = 12582912.0f, shifted = x + magic, f = x - (shifted - magic);
  float p = 1.535336194e-04f;
  p = multiply_add(p, f, 1.339887440e-03f);
  p = multiply_add(p, f, 9.618437357e-03f);
  p = multiply_add(p, f, 5.550332471e-02f);
  p = multiply_add(p, f, 2.402264791e-01f);
  p = multiply_add(p, f, 6.931472029e-01f);
  p = multiply_add(p, f, 1.0f);
  const float y = float_of(bits_of(p) + (bits_of(shifted) << 23));
  return x < -126.0f ? 0.0f : y;
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
  const float t = reciprocal(multiply_add(2.828427125e-01f, fabsf(a), 1.0f));
  float g = -2.021183179e-01f;  // erfc(x) = exp(-x^2) t g(t), t = 1/(1 + 0.4 x), x = |a|/sqrt(2)
  g = multiply_add(g, t, 7.169376346e-01f);
  g = multiply_add(g, t, -3.838863399e-01f);
  g = multiply_add(g, t, 4.790154487e-01f);
  g = multiply_add(g, t, 1.574088664e-01f);
  g = multiply_add(g, t, 2.326426728e-01f);
  const float tail = 0.5f * density * t * g;  // half of erfc(x), to 2e-8
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
    derivative = multiply_add(a * s, 1.0f - s, s);
    return a * s;
  } else if constexpr (act == Act::gelu) {
    float density;
    const float cdf = normal_cdf(a, density);
    derivative = multiply_add(3.989422804e-01f * a, density, cdf);
    return a * cdf;
  } else if constexpr (act == Act::mish) {
    // a tanh(log(1 + e^a)) = a n / (n + 2), n = e^a (e^a + 2): both sides of the fraction by
    // e^(-2a) where a > 0, so that nothing overflows.
    const bool above = a > 0.0f;
    const float u = exp(-fabsf(a)), u2 = u * u;
    const float n = above ? multiply_add(2.0f, u, 1.0f) : multiply_add(2.0f, u, u2);
    const float over = reciprocal(n + (above ? 2.0f * u2 : 2.0f)), t = n * over;
    derivative = multiply_add(a, 4.0f * over * over * ((above ? u2 : u) * (1.0f + u)), t);
    return a * t;
  } else {
    // 0.5 (1 + tanh(y)) = sigmoid(2y), y = sqrt(2/pi) (a + 0.044715 a^3)
    const float a2 = a * a;
    const float s = sigmoid(1.595769122f * multiply_add(0.044715f * a2, a, a));
    derivative =
        multiply_add(a * s * (1.0f - s), multiply_add(2.140644490e-01f, a2, 1.595769122f), s);
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
    case Act::mish: return f(std::integral_constant<Act, Act::mish>());
  }
}

}  // namespace dx
