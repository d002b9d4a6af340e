// The loops of group_norm_act's forward: the statistics of a slab, then its normalisation and
// activation while the slab may still be in cache. Each dtype has them compiled in a file of its
// own, csrc/cpu/instances.
#pragma once

#include <cmath>
#include <limits>

#include "group_norm.h"

namespace dx::norm_forward {

// Sums of (x - shift) and (x - shift)^2. Around a shift near the mean float32 loses nothing.
struct Moments {
  double first = 0, second = 0;
  Moments& operator+=(const Moments& m) {
    first += m.first;
    second += m.second;
    return *this;
  }
};

// Of neighbours.
template <class T>
DX_INLINE Moments moments(const T* __restrict x, int64_t count, float shift) {
  Moments total;
  for (int64_t begin = 0; begin < count; begin += kRun) {
    const auto [first, second] =
        sum_lanes<2>({begin, std::min(begin + kRun, count)},
                     [&](int64_t i, Lanes<2>& lanes, int64_t lane) DX_KERNEL {
                       const float d = to_float(x[i]) - shift;
                       lanes[0][lane] += d;
                       lanes[1][lane] = fma(d, d, lanes[1][lane]);
                     });
    total += {first, second};
  }
  return total;
}

// Moments around row_shift, of elements to which pre_shift is still to be added, as moments around
// shift: row_shift is shift - pre_shift rounded to float32, and this puts the rest back.
DX_INLINE Moments recentre(const Moments& m, int64_t count, float row_shift, float pre_shift,
                           float shift) {
  const double e = double(row_shift) + pre_shift - shift;
  return {m.first + double(count) * e, m.second + (2 * m.first + double(count) * e) * e};
}

inline void finish(const Moments& m, float shift, int64_t count, double eps, double& mean,
                   float& rstd) {
  const double delta = m.first / double(count);
  const double variance = std::max(m.second / double(count) - delta * delta, 0.0);
  mean = shift + delta;
  rstd = float(1.0 / std::sqrt(variance + eps));
  // Neither a NaN, which max() hides, nor squares beyond float32 pass for a variance.
  if (!std::isfinite(m.second)) rstd = std::numeric_limits<float>::quiet_NaN();
}

// How many of a group's elements to take the mean of as a shift for its moments: the first eighth,
// 512 at the most. One would do but for an outlier: the error grows with (shift - mean)^2 /
// variance, which the mean of n elements of M bounds by M/n.
DX_INLINE int64_t elements_for_shift(int64_t count) {
  return std::min(count, std::clamp<int64_t>(count / 8, 16, 512));
}

// The group of a contiguous slab: in one run, or channel by channel where each has its pre_shift.
template <class T>
void contiguous_statistics(const Slab& slab, bool on_threads, const T* x, double eps, double* mean,
                           float* rstd) {
  const GroupNorm& g = slab.g;
  const T* group = x + slab.element;
  const auto pre_shift = [&](int64_t k) { return g.pre_shift.at(slab.n, slab.first + k); };
  const Range head{0, elements_for_shift(slab.units)};
  double sum = 0;
  on_best_isa([&]() DX_KERNEL {
    slab.for_each_channel(head, [&](int64_t k, Range r) DX_KERNEL {
      const int64_t count = r.end - r.begin;
      sum += moments(group + r.begin, count, 0.0f).first + double(count) * pre_shift(k);
    });
  });
  const float shift = float(sum / double(head.end));
  const Moments total = sum_chunks(slab, on_threads, [&](int64_t chunk) {
    const Range range = slab.chunk(chunk);
    Moments m;
    on_best_isa([&]() DX_KERNEL {
      if (!g.pre_shift.given()) {
        m = moments(group + range.begin, range.end - range.begin, shift);
        return;
      }
      slab.for_each_channel(range, [&](int64_t k, Range r) DX_KERNEL {
        const int64_t count = r.end - r.begin;
        const float pre = pre_shift(k), row_shift = shift - pre;
        m += recentre(moments(group + r.begin, count, row_shift), count, row_shift, pre, shift);
      });
    });
    return m;
  });
  finish(total, shift, slab.units, eps, *mean, *rstd);
}

// The moments of channels k, k + 1, ... over pixels, each around its own shift, added to their
// sums.
template <class T, class Count>
DX_INLINE void add_column(const Slab& slab, const T* __restrict x, Range pixels,
                          const float* __restrict shift, int64_t k, Count count,
                          ChannelSums<2>& sums) {
  for (int64_t begin = pixels.begin; begin < pixels.end; begin += kPixels) {
    const int64_t end = std::min(begin + kPixels, pixels.end);
    float first[kColumns] = {}, second[kColumns] = {};
    for (int64_t r = begin; r < end; ++r)
      for (int64_t i = 0; i < count; ++i) {
        const float d = to_float(x[r * slab.width + k + i]) - shift[k + i];
        first[i] += d;
        second[i] = fma(d, d, second[i]);
      }
    for (int64_t i = 0; i < count; ++i) {
      sums.at(0, k + i) += first[i];
      sums.at(1, k + i) += second[i];
    }
  }
}

// The groups of a channels_last slab: sums per channel over the pixels, then per group.
template <class T>
void channels_last_statistics(const Slab& slab, bool on_threads, const T* x, double eps,
                              double* mean, float* rstd) {
  const GroupNorm& g = slab.g;
  const int64_t size = g.group_channels(), count = size * g.spatial;
  const T* pixels = x + slab.element;
  const auto pre_shift = [&](int64_t c) { return g.pre_shift.at(slab.n, c); };
  const auto column_sums = [&](Range range, const float* shift) {
    ChannelSums<2> sums(slab.width);
    on_best_isa([&]() DX_KERNEL {
      slab.for_each_column([&](int64_t k, auto columns) DX_KERNEL {
        add_column(slab, pixels, range, shift, k, columns, sums);
      });
    });
    return sums;
  };

  std::vector<float> group_shift(g.groups), shift(g.channels);
  const Range head{0, std::min(g.spatial, std::max<int64_t>(elements_for_shift(count) / size, 1))};
  ChannelSums<2> heads = column_sums(head, shift.data());
  for (int64_t group = 0; group < g.groups; ++group) {
    double sum = 0;
    for (int64_t c = group * size; c < (group + 1) * size; ++c)
      sum += heads.at(0, c) + double(head.end) * pre_shift(c);
    group_shift[group] = float(sum / double(size * head.end));
    for (int64_t c = group * size; c < (group + 1) * size; ++c)
      shift[c] = group_shift[group] - pre_shift(c);
  }

  ChannelSums<2> sums = sum_chunks(slab, on_threads, [&](int64_t chunk) {
    return column_sums(slab.chunk(chunk), shift.data());
  });
  for (int64_t group = 0; group < g.groups; ++group) {
    Moments m;
    for (int64_t c = group * size; c < (group + 1) * size; ++c)
      m += recentre({sums.at(0, c), sums.at(1, c)}, g.spatial, shift[c], pre_shift(c),
                    group_shift[group]);
    finish(m, group_shift[group], count, eps, mean[group], rstd[group]);
  }
}

// y of an element. `post`: there is a modulation after the activation.
template <Act act, bool post, class T>
DX_INLINE void apply(float centre, float slope, float intercept, float scale, float shift, T x,
                     T& y) {
  float derivative;
  const float a = activate<act>(fma(to_float(x) - centre, slope, intercept), derivative);
  round_to(post ? fma(a, scale, shift) : a, y);
}

template <Act act, bool post, class T>
DX_INLINE void apply_chunk(const Slab& slab, const Channels& ch, Range range, const T* x, T* y) {
  const T* __restrict from = x + slab.element;
  T* __restrict to = y + slab.element;
  if (slab.g.layout == Layout::contiguous) {
    slab.for_each_channel(range, [&](int64_t k, Range r) DX_KERNEL {
      const float centre = ch.centre[k], slope = ch.slope[k], intercept = ch.intercept[k];
      const float scale = ch.post_scale[k], shift = ch.post_shift[k];
#pragma omp simd
      for (int64_t i = r.begin; i < r.end; ++i)
        apply<act, post>(centre, slope, intercept, scale, shift, from[i], to[i]);
    });
    return;
  }
  slab.for_each_column([&](int64_t k, auto count) DX_KERNEL {
    for (int64_t r = range.begin; r < range.end; ++r)
#pragma omp simd
      for (int64_t i = 0; i < count; ++i)
        apply<act, post>(ch.centre[k + i], ch.slope[k + i], ch.intercept[k + i],
                         ch.post_scale[k + i], ch.post_shift[k + i], from[r * slab.width + k + i],
                         to[r * slab.width + k + i]);
  });
}

// y, mean and rstd of the whole problem.
template <class T>
void run(const GroupNorm& g, double eps, const T* x, T* y, double* mean, float* rstd) {
  const bool modulated = g.post_scale.given() || g.post_shift.given();
  for_each_slab(g, [&](const Slab& slab, bool on_threads) {
    const int64_t group = slab.n * g.groups + slab.first / g.group_channels();
    if (g.layout == Layout::contiguous)
      contiguous_statistics(slab, on_threads, x, eps, mean + group, rstd + group);
    else
      channels_last_statistics(slab, on_threads, x, eps, mean + group, rstd + group);
    const Channels channels(slab, mean, rstd);
    for_each_chunk(slab, on_threads, [&](int64_t chunk) {
      on_best_isa([&]() DX_KERNEL {
        dispatch_act(g.act, [&](auto act) DX_KERNEL {
          with_constants(
              [&](auto post) DX_KERNEL {
                apply_chunk<decltype(act)::value, post>(slab, channels, slab.chunk(chunk), x, y);
              },
              modulated);
        });
      });
    });
  });
}

extern template void run(const GroupNorm&, double, const float*, float*, double*, float*);
extern template void run(const GroupNorm&, double, const Half*, Half*, double*, float*);
extern template void run(const GroupNorm&, double, const BFloat16*, BFloat16*, double*, float*);

}  // namespace dx::norm_forward
