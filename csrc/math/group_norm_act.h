// group_norm_act for one channel of one sample (Wu & He 2018; FiLM: Perez et al. 2018):
//   xhat = (x + pre_shift - mean) rstd
//   y = act(a) post_scale + post_shift,  a = gain xhat + offset
//   gain = weight (1 + scale),  offset = bias (1 + scale) + shift
// and its derivative, with da = dy post_scale act'(a):
//   dx = rstd (gain da - S1/M - xhat S2/M),  S1 = sum gain da,  S2 = sum gain da xhat
// over the M elements of a group.
#pragma once

#include "activation.h"
#include "portable.h"

namespace dx {

// What a channel's parameters are.
struct ChannelParameters {
  float weight, bias, scale, shift, post_scale, post_shift, pre_shift;
};

// A mean as two floats, their sum: at 10000 +/- 0.1 one would lose the variation's digits.
struct Mean {
  float high, low;
};

DX_INLINE Mean mean_of(double mean) {
  const float high = float(mean);
  return {high, float(mean - high)};
}

// a - b without error: the rounded difference and what the rounding lost (Knuth, TAOCP 2, 4.2.2).
DX_INLINE Mean difference(float a, float b) {
  const float d = a - b, virtual_b = d - a;
  return {d, (a - (d - virtual_b)) - (b + virtual_b)};
}

// The channel's arithmetic: xhat = (x - centre) rstd + residual,
// a = (x - centre) slope + intercept.
struct Channel {
  float centre, rstd, residual, gain, offset, slope, intercept, post_scale, post_shift;

  Channel() = default;
  DX_INLINE Channel(const ChannelParameters& p, Mean mean, float rstd_) {
    const Mean shifted = difference(mean.high, p.pre_shift);
    const float one_scale = 1.0f + p.scale;
    centre = shifted.high;
    rstd = rstd_;
    residual = -(shifted.low + mean.low) * rstd;
    gain = p.weight * one_scale;
    offset = multiply_add(p.bias, one_scale, p.shift);
    slope = gain * rstd;
    intercept = multiply_add(gain, residual, offset);
    post_scale = p.post_scale;
    post_shift = p.post_shift;
  }

  template <Act activation>
  DX_INLINE float forward(float x) const {
    float derivative;
    const float y = activate<activation>(multiply_add(x - centre, slope, intercept), derivative);
    return multiply_add(y, post_scale, post_shift);
  }

  DX_INLINE float normalise(float x) const { return multiply_add(x - centre, rstd, residual); }
};

// What the backward needs of an element: xhat, act(a) and da.
struct Derivative {
  float xhat, act, da;

  template <Act activation>
  static DX_INLINE Derivative of(const Channel& c, float x, float dy) {
    Derivative d;
    float derivative;
    d.xhat = c.normalise(x);
    d.act = activate<activation>(multiply_add(c.gain, d.xhat, c.offset), derivative);
    d.da = dy * c.post_scale * derivative;
    return d;
  }
};

// The sums over a channel's elements from which every gradient follows, by index.
enum ChannelSum { kDa, kDaXhat, kDy, kDyAct, kXhat, kSums };

// S1/M and S2/M of a group of M elements.
struct GroupMeans {
  float da, da_xhat;
};

// dx, of which rstd (S1/M + xhat S2/M) is the part that the statistics have in it.
DX_INLINE float input_gradient(const Channel& c, const GroupMeans& means, float xhat, float da) {
  return multiply_add(c.slope, da, -c.rstd * multiply_add(xhat, means.da_xhat, means.da));
}

// The gradients of a channel's parameters in one sample.
DX_INLINE ChannelParameters parameter_gradients(const ChannelParameters& p, float rstd,
                                                const GroupMeans& means, double spatial,
                                                const double (&sums)[kSums]) {
  const float one_scale = 1.0f + p.scale;
  const double through = double(p.weight * one_scale) * sums[kDa];
  const double statistics = spatial * means.da + sums[kXhat] * means.da_xhat;
  return {float(one_scale * sums[kDaXhat]),
          float(one_scale * sums[kDa]),
          float(p.weight * sums[kDaXhat] + p.bias * sums[kDa]),
          float(sums[kDa]),
          float(sums[kDyAct]),
          float(sums[kDy]),
          float(rstd * (through - statistics))};
}

}  // namespace dx
