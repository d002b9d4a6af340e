// One element of one sampler step; diffusion_ext/samplers.py derives the coefficients.
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

// x0 = clip(kx x + km m); limit is infinite for no clipping. A NaN stays one, as in torch.clamp.
DX_INLINE float predict_x0(const StepCoefficients& c, float x, float m, float limit) {
  const float x0 = fma(c.kx, x, c.km * m);
  return x0 < -limit ? -limit : (x0 > limit ? limit : x0);
}

// x' = ax x + am m + a0 x0 + ah h + az z
DX_INLINE float step_sample(const StepCoefficients& c, float x, float m, float x0, float h,
                            float z) {
  return fma(c.az, z, fma(c.ah, h, fma(c.a0, x0, fma(c.ax, x, c.am * m))));
}

}  // namespace dx
