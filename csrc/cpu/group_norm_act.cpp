// group_norm_act, forward: the statistics of a slab, then its normalisation and activation while
// the slab may still be in cache.
#include <cmath>
#include <limits>

#include "group_norm.h"

namespace dx {
namespace {

// Sums of (x - shift) and (x - shift)^2. Around a shift near the mean float32 loses nothing; the
// sums of 4096 go on in float64.
struct Moments {
  double first = 0, second = 0;
  Moments& operator+=(const Moments& m) {
    first += m.first;
    second += m.second;
    return *this;
  }
};

template <class T>
DX_INLINE void add_run(const T* __restrict x, int64_t count, float shift, Moments& m) {
  for (int64_t begin = 0; begin < count; begin += 4096) {
    const int64_t end = std::min<int64_t>(begin + 4096, count);
    float first = 0, second = 0;
#pragma omp simd reduction(+ : first, second)
    for (int64_t i = begin; i < end; ++i) {
      const float d = to_float(x[i]) - shift;
      first += d;
      second += d * d;
    }
    m.first += first;
    m.second += second;
  }
}

// Moments around row_shift, of elements to which pre_shift is still to be added, as moments around
// shift: row_shift is shift - pre_shift rounded to float32, and this puts the rest back.
DX_INLINE Moments recentre(const Moments& m, int64_t count, float row_shift, float pre_shift,
                           float shift) {
  const double e = double(row_shift) + pre_shift - shift;
  return {m.first + double(count) * e, m.second + (2 * m.first + double(count) * e) * e};
}

void finish(const Moments& m, float shift, int64_t count, double eps, double& mean, float& rstd) {
  const double delta = m.first / double(count);
  const double variance = std::max(m.second / double(count) - delta * delta, 0.0);
  mean = shift + delta;
  rstd = float(1.0 / std::sqrt(variance + eps));
  // Neither a NaN, which max() hides, nor squares beyond float32 pass for a variance.
  if (!std::isfinite(m.second)) rstd = std::numeric_limits<float>::quiet_NaN();
}

// The mean of the first eighth of a group's elements, 512 at the most: a shift for its moments. One
// element would do but for an outlier: the error grows with (shift - mean)^2 / variance, which the
// mean of n elements of M bounds by M/n. x_at(r, k) is element k of row r.
template <class ElementAt>
float first_mean(int64_t count, int64_t rows, int64_t width, const ElementAt& x_at) {
  const int64_t enough = std::clamp<int64_t>(count / 8, 16, 512);
  width = std::min(width, enough);
  rows = std::min(rows, std::max<int64_t>(enough / width, 1));
  float sum = 0;
  for (int64_t r = 0; r < rows; ++r)
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < width; ++k) sum += x_at(r, k);
  return sum / float(rows * width);
}

// The group of a contiguous slab: whole blocks as runs, or row by row where each has its pre_shift.
template <class T>
void contiguous_statistics(const Slab& slab, const T* x, double eps, double* mean, float* rstd) {
  const GroupNorm& g = slab.g;
  const Block head = slab.block(0);
  const auto pre_shift = [&](int64_t k) { return g.pre_shift.at(slab.n, slab.first + k); };
  const int64_t count = slab.width * g.spatial;
  const float shift = first_mean(count, head.rows, head.width, [&](int64_t r, int64_t k) {
    return to_float(x[head.element + r * head.pitch + k]) + pre_shift(r);
  });
  std::vector<Moments> partial(slab.chunks());
  slab.for_each_chunk([&](int64_t chunk) {
    Moments m;
    on_best_isa([&]() DX_KERNEL {
      slab.for_each_block(chunk, [&](const Block& b) DX_KERNEL {
        if (!g.pre_shift.given()) return add_run(x + b.element, b.size(), shift, m);
        for (int64_t r = 0; r < b.rows; ++r) {
          const float pre = pre_shift(b.channel + r), row_shift = shift - pre;
          Moments row;
          add_run(x + b.element + r * b.pitch, b.width, row_shift, row);
          m += recentre(row, b.width, row_shift, pre, shift);
        }
      });
    });
    partial[chunk] = m;
  });
  Moments total;
  for (const Moments& m : partial) total += m;
  finish(total, shift, count, eps, *mean, *rstd);
}

// The groups of a channels_last slab: sums per channel over the pixels, then per group.
template <class T>
void channels_last_statistics(const Slab& slab, const T* x, double eps, double* mean, float* rstd) {
  const GroupNorm& g = slab.g;
  const int64_t size = g.group_channels(), count = size * g.spatial;
  const T* pixels = x + slab.n * g.spatial * g.channels;
  const auto pre_shift = [&](int64_t c) { return g.pre_shift.at(slab.n, c); };
  std::vector<float> group_shift(g.groups), shift(g.channels);
  for (int64_t c = 0; c < g.channels; ++c) {
    if (c % size == 0)
      group_shift[c / size] = first_mean(count, g.spatial, size, [&](int64_t r, int64_t k) {
        return to_float(pixels[r * g.channels + c + k]) + pre_shift(c + k);
      });
    shift[c] = group_shift[c / size] - pre_shift(c);
  }
  auto sums = sum_chunks<2>(slab, [&](int64_t chunk, ChannelSums<2>& s) DX_KERNEL {
    float* __restrict first = s.narrow(0), * __restrict second = s.narrow(1);
    slab.for_each_block(chunk, [&](const Block& b) DX_KERNEL {
      for (int64_t r = 0; r < b.rows; ++r) {
        const T* row = x + b.element + r * b.pitch;
#pragma omp simd
        for (int64_t k = 0; k < b.width; ++k) {
          const float d = to_float(row[k]) - shift[k];
          first[k] += d;
          second[k] += d * d;
        }
      }
      s.added(b.rows);
    });
  });
  for (int64_t group = 0; group < g.groups; ++group) {
    Moments m;
    for (int64_t c = group * size; c < (group + 1) * size; ++c)
      m += recentre({sums.total(0, c), sums.total(1, c)}, g.spatial, shift[c], pre_shift(c),
                    group_shift[group]);
    finish(m, group_shift[group], count, eps, mean[group], rstd[group]);
  }
}

// Normalises, modulates and activates a block.
template <Layout layout, Act act, class T>
DX_INLINE void apply_block(const Block& b, const Channels& ch, const T* x, T* y) {
  const float *centre = ch.centre, *slope = ch.slope, *intercept = ch.intercept,
              *scale = ch.post_scale, *shift = ch.post_shift;
  for (int64_t r = 0; r < b.rows; ++r) {
    const T* from = x + b.element + r * b.pitch;
    T* to = y + b.element + r * b.pitch;
#pragma omp simd
    for (int64_t k = 0; k < b.width; ++k) {
      const int64_t c = channel_at<layout>(b, r, k);
      float derivative;
      const float a = fma(to_float(from[k]) - centre[c], slope[c], intercept[c]);
      round_to(fma(activate<act>(a, derivative), scale[c], shift[c]), to[k]);
    }
  }
}

template <Layout layout, class T>
void run(const GroupNorm& g, double eps, const T* x, T* y, double* mean, float* rstd) {
  for_each_slab(g, [&](const Slab& slab) {
    const int64_t group = slab.n * g.groups + slab.first / g.group_channels();
    if constexpr (layout == Layout::contiguous)
      contiguous_statistics(slab, x, eps, mean + group, rstd + group);
    else
      channels_last_statistics(slab, x, eps, mean + group, rstd + group);
    const Channels channels(slab, mean, rstd);
    slab.for_each_chunk([&](int64_t chunk) {
      on_best_isa([&]() DX_KERNEL {
        dispatch_act(g.act, [&](auto act) DX_KERNEL {
          slab.for_each_block(chunk, [&](const Block& b) DX_KERNEL {
            apply_block<layout, decltype(act)::value>(b, channels, x, y);
          });
        });
      });
    });
  });
}

// A group without elements has mean 0 and variance 0.
void fill_empty(const GroupNorm& g, double eps, double* mean, float* rstd) {
  std::fill_n(mean, g.samples * g.groups, 0.0);
  std::fill_n(rstd, g.samples * g.groups, float(1.0 / std::sqrt(eps)));
}

struct Cpu {
  explicit Cpu(const Tensor&) {}
  static Layout layout(const Tensor& x, int64_t) { return layout_of(x); }

  template <class T>
  void forward(const GroupNorm& g, double eps, const T* x, T* y, double* mean, float* rstd) const {
    if (g.spatial == 0) fill_empty(g, eps, mean, rstd);
    if (g.layout == Layout::contiguous)
      run<Layout::contiguous>(g, eps, x, y, mean, rstd);
    else
      run<Layout::channels_last>(g, eps, x, y, mean, rstd);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(diffusion_ext, CPU, m) {
  m.impl("group_norm_act", TORCH_BOX(&group_norm_act<Cpu>));
}

}  // namespace dx
