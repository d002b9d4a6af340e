// One element of the loss of a denoising network: what it should have predicted, which is linear in
// the clean sample and the noise (ε: Ho et al. 2020, eq. 14; v: Salimans & Ho 2022; the velocity of
// rectified flow: Liu et al. 2022), and the penalty of its distance from that.
#pragma once

#include "portable.h"

namespace dx {

DX_INLINE float denoising_target(float of_x0, float x0, float of_noise, float noise) {
  return fma(of_noise, noise, of_x0 * x0);
}

// A penalty and its derivative by the residual, which is NaN where the residual is.
struct Penalty {
  float value, slope;
};

DX_INLINE Penalty squared(float residual) { return {residual * residual, 2 * residual}; }

// Huber 1964: residual²/2 within delta, and straight on from there.
DX_INLINE Penalty huber(float residual, float delta) {
  const float slope = residual > delta ? delta : residual < -delta ? -delta : residual;
  return {slope * fma(-0.5f, slope, residual), slope};
}

}  // namespace dx
