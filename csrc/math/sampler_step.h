// One element of one sampler step; diffusion_ext/samplers/rows.py derives the coefficients.
#pragma once

#include "portable.h"

namespace dx {

// A row of the table, in the order of its columns.
struct StepCoefficients {
  float kx, km, ax, am, a0, ah, az;
};

constexpr int kStepColumns = 7;
static_assert(sizeof(StepCoefficients) == kStepColumns * sizeof(float));

// Classifier-free guidance (Ho & Salimans 2022, eq. 6).
DX_INLINE float guide(float uncond, float cond, float guidance) {
  return fma(guidance, cond - uncond, uncond);
}

// x0 = kx x + km m
DX_INLINE float predict_x0(const StepCoefficients& c, float x, float m) {
  return fma(c.kx, x, c.km * m);
}

// x0 within [-limit, limit]. A NaN stays one, as in torch.clamp.
DX_INLINE float clip_x0(float x0, float limit) {
  return x0 < -limit ? -limit : (x0 > limit ? limit : x0);
}

// The terms of a step beside x and m: a weight of 0, or a tensor that is not there, leaves one out.
struct StepTerms {
  bool x0, history, noise;
};

// x' = ax x + am m + a0 x0 + ah h + az z
DX_INLINE float step_sample(const StepCoefficients& c, StepTerms terms, float x, float m, float x0,
                            float h, float z) {
  float out = fma(c.ax, x, c.am * m);
  if (terms.x0) out = fma(c.a0, x0, out);
  if (terms.history) out = fma(c.ah, h, out);
  if (terms.noise) out = fma(c.az, z, out);
  return out;
}

}  // namespace dx
