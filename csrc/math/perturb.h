// One element of forward noising (Ho et al. 2020, eq. 4) and of the v target (Salimans & Ho 2022).
#pragma once

#include "portable.h"

namespace dx {

DX_INLINE float perturb_sample(float signal, float sigma, float x0, float noise) {
  return fma(signal, x0, sigma * noise);
}

DX_INLINE float velocity(float signal, float sigma, float x0, float noise) {
  return fma(signal, noise, -(sigma * x0));
}

}  // namespace dx
