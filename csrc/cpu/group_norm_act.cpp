// group_norm_act, forward: the statistics of a slab, then its normalisation and activation while
// the slab may still be in cache.
#include <cmath>
#include <limits>

#include "group_norm.h"
#include "normalise.h"

namespace dx {
namespace {

constexpr int64_t kShortChannel = 16;  // elements of a contiguous channel, below which it is short

// Sums of (x - shift) and (x - shift)^2. Around a shift near the mean float32 loses nothing.
struct Moments {
  double first = 0, second = 0;
  Moments& operator+=(const Moments& m) {
    first += m.first;
    second += m.second;
    return *this;
  }
};

// Of a tile's neighbours.
DX_INLINE Moments moments(const float* __restrict x, int64_t count, float shift) {
  const auto [first, second] =
      sum_lanes<2>(count, [&](int64_t i, Lanes<2>& lanes, int64_t lane) DX_KERNEL {
        const float d = x[i] - shift;
        lanes[0][lane] += d;
        lanes[1][lane] = multiply_add(d, d, lanes[1][lane]);
      });
  return {first, second};
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

// How many of a group's elements to take the mean of as a shift for its moments: the first eighth,
// 512 at the most. One would do but for an outlier: the error grows with (shift - mean)^2 /
// variance, which the mean of n elements of M bounds by M/n.
DX_INLINE int64_t elements_for_shift(int64_t count) {
  return std::min(count, std::clamp<int64_t>(count / 8, 16, 512));
}

// The group of a contiguous slab: in one run, or channel by channel where each has its pre_shift.
void contiguous_statistics(const Slab& slab, bool on_threads, const Source& x, double eps,
                           double* mean, float* rstd) {
  const GroupNorm& g = slab.g;
  const auto pre_shift = [&](int64_t k) { return g.pre_shift.at(slab.n, slab.first + k); };
  const auto for_each_tile = [&](Range range, const auto& body) DX_KERNEL {
    for_each_part(range, tile_run(x.in_place()), [&](Range part) DX_KERNEL {
      TileBuffer buffer;
      body(part, x.view(slab.place(part), buffer).at);
    });
  };
  const Range head{0, elements_for_shift(slab.units)};
  double sum = 0;
  on_best_isa([&]() DX_KERNEL {
    for_each_tile(head, [&](Range part, const float* tile) DX_KERNEL {
      if (!g.pre_shift.given()) {
        sum += moments(tile, part.size(), 0.0f).first;
        return;
      }
      slab.for_each_channel(part, [&](int64_t k, Range r) DX_KERNEL {
        sum += moments(tile + (r.begin - part.begin), r.size(), 0.0f).first +
               double(r.size()) * pre_shift(k);
      });
    });
  });
  const float shift = float(sum / double(head.end));
  const Moments total = sum_chunks(slab, on_threads, [&](int64_t chunk) {
    Moments m;
    on_best_isa([&]() DX_KERNEL {
      for_each_tile(slab.chunk(chunk), [&](Range part, const float* tile) DX_KERNEL {
        if (!g.pre_shift.given()) {
          m += moments(tile, part.size(), shift);
          return;
        }
        slab.for_each_channel(part, [&](int64_t k, Range r) DX_KERNEL {
          const float pre = pre_shift(k), row_shift = shift - pre;
          const Moments row = moments(tile + (r.begin - part.begin), r.size(), row_shift);
          m += recentre(row, r.size(), row_shift, pre, shift);
        });
      });
    });
    return m;
  });
  finish(total, shift, slab.units, eps, *mean, *rstd);
}

// Adds pixels' channels, `count` from one on, to their moments around the shifts.
template <class Count>
DX_INLINE void add_column(const float* __restrict x, int64_t stride, int64_t pixels,
                          const float* __restrict shift, float* __restrict first,
                          float* __restrict second, Count count) {
  float one[kColumns], two[kColumns];
  for (int64_t i = 0; i < count; ++i) one[i] = first[i], two[i] = second[i];
  for (int64_t r = 0; r < pixels; ++r)
    for (int64_t i = 0; i < count; ++i) {
      const float d = x[r * stride + i] - shift[i];
      one[i] += d;
      two[i] = multiply_add(d, d, two[i]);
    }
  for (int64_t i = 0; i < count; ++i) first[i] = one[i], second[i] = two[i];
}

// The moments of a panel's channels over pixels, each around its own shift, added to their sums.
DX_INLINE void add_panel(const Slab& slab, const Source& x, Range pixels, Range panel,
                         const float* shift, ChannelSums<2>& sums) {
  for_each_part(pixels, kPixels, [&](Range run) DX_KERNEL {
    float first[kPanel], second[kPanel];
    for (int64_t i = 0; i < panel.size(); ++i) first[i] = second[i] = 0;
    for_each_part(run, tile_pixels(panel, x.in_place()), [&](Range part) DX_KERNEL {
      TileBuffer buffer;
      const Tile<const float> tile = x.view(slab.place(part, panel), buffer);
      for_each_column(panel, [&](int64_t k, auto count) DX_KERNEL {
        const int64_t i = k - panel.begin;
        add_column(tile.at + i, tile.stride, part.size(), shift + k, first + i, second + i, count);
      });
    });
    sums.add(0, panel.begin, panel.size(), first);
    sums.add(1, panel.begin, panel.size(), second);
  });
}

// The groups of a channels_last slab: sums per channel over the pixels, then per group.
void channels_last_statistics(const Slab& slab, bool on_threads, const Source& x, double eps,
                              double* mean, float* rstd) {
  const GroupNorm& g = slab.g;
  const int64_t size = g.group_channels(), count = size * g.spatial;
  const auto pre_shift = [&](int64_t c) { return g.pre_shift.at(slab.n, c); };
  const auto column_sums = [&](Range range, const float* shift) {
    ChannelSums<2> sums(slab.width);
    on_best_isa([&]() DX_KERNEL {
      slab.for_each_panel([&](Range panel)
                              DX_KERNEL { add_panel(slab, x, range, panel, shift, sums); });
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
template <Act act, bool post>
DX_INLINE float apply(float centre, float slope, float intercept, float scale, float shift,
                      float x) {
  float derivative;
  const float a = activate<act>(multiply_add(x - centre, slope, intercept), derivative);
  return post ? multiply_add(a, scale, shift) : a;
}

// y of pixels' channels k, k + 1, ... .
template <Act act, bool post, class Count>
DX_INLINE void apply_column(const Channels& ch, int64_t k, const float* __restrict x,
                            int64_t x_stride, float* __restrict y, int64_t y_stride, int64_t pixels,
                            Count count) {
  for (int64_t r = 0; r < pixels; ++r)
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      y[r * y_stride + i] =
          apply<act, post>(ch.centre[k + i], ch.slope[k + i], ch.intercept[k + i],
                           ch.post_scale[k + i], ch.post_shift[k + i], x[r * x_stride + i]);
}

// y of a part of a contiguous slab, channel by channel.
template <Act act, bool post>
DX_INLINE void apply_channels(const Slab& slab, const Channels& ch, Range part,
                              const float* __restrict from, float* __restrict to) {
  slab.for_each_channel(part, [&](int64_t k, Range r) DX_KERNEL {
    const float centre = ch.centre[k], slope = ch.slope[k], intercept = ch.intercept[k];
    const float scale = ch.post_scale[k], shift = ch.post_shift[k];
#pragma omp simd
    for (int64_t i = r.begin - part.begin; i < r.end - part.begin; ++i)
      to[i] = apply<act, post>(centre, slope, intercept, scale, shift, from[i]);
  });
}

// The same where a channel has fewer than kShortChannel elements: whole vectors, each element with
// its own channel's numbers. Channel by channel, Mish of 4 elements took twice as long (Zen 4);
// without a costly activation this way is slower. An element's channel is its place divided by the
// channel's size; the product with the inverse is exact, since a part has at most kRun elements.
template <Act act, bool post>
DX_INLINE void apply_elements(const Slab& slab, const Channels& ch, Range part,
                              const float* __restrict from, float* __restrict to) {
  const int32_t size = int32_t(slab.g.spatial), count = int32_t(part.size());
  const int32_t rest = int32_t(part.begin % size);
  const int64_t first = part.begin / size;
  const float* __restrict centre = ch.centre + first;
  const float* __restrict slope = ch.slope + first;
  const float* __restrict intercept = ch.intercept + first;
  const float* __restrict scale = ch.post_scale + first;
  const float* __restrict shift = ch.post_shift + first;
  const float inverse = 1.0f / float(size);
#pragma omp simd
  for (int32_t i = 0; i < count; ++i) {
    const int32_t k = int32_t((float(rest + i) + 0.5f) * inverse);
    to[i] = apply<act, post>(centre[k], slope[k], intercept[k], scale[k], shift[k], from[i]);
  }
}

// Calls body(x's tile, y's) for the one at a place, and keeps y's.
template <class Body>
DX_INLINE void on_tile(const Place& place, const Source& x, const Target& y, const Body& body) {
  TileBuffer buffers[2];
  const Tile<float> to = y.place(place, buffers[1]);
  body(x.view(place, buffers[0]), to);
  y.keep(to, place);
}

template <Act act, bool post>
DX_INLINE void apply_chunk(const Slab& slab, const Channels& ch, Range range, const Source& x,
                           const Target& y) {
  if (slab.g.layout == Layout::contiguous) {
    for_each_part(range, tile_run(x.in_place()), [&](Range part) DX_KERNEL {
      on_tile(slab.place(part), x, y, [&](const auto& from_tile, const auto& to_tile) DX_KERNEL {
        constexpr bool costly = act != Act::identity && act != Act::relu;
        if (costly && slab.g.spatial < kShortChannel)
          apply_elements<act, post>(slab, ch, part, from_tile.at, to_tile.at);
        else
          apply_channels<act, post>(slab, ch, part, from_tile.at, to_tile.at);
      });
    });
    return;
  }
  slab.for_each_panel([&](Range panel) DX_KERNEL {
    for_each_part(range, tile_pixels(panel, x.in_place()), [&](Range part) DX_KERNEL {
      on_tile(slab.place(part, panel), x, y, [&](const auto& from, const auto& to) DX_KERNEL {
        for_each_column(panel, [&](int64_t k, auto count) DX_KERNEL {
          apply_column<act, post>(ch, k, from.at + (k - panel.begin), from.stride,
                                  to.at + (k - panel.begin), to.stride, part.size(), count);
        });
      });
    });
  });
}

// y, mean and rstd of the whole problem.
void run(const GroupNorm& g, double eps, const Source& x, const Target& y, double* mean,
         float* rstd) {
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
    run(g, eps, Source(x), Target(y), mean, rstd);
  }
};

}  // namespace

void normalise(const GroupNorm& g, double eps, const float* x, float* y, double* mean,
               float* rstd) {
  run(g, eps, Source(x), Target(y), mean, rstd);
}

STABLE_TORCH_LIBRARY_IMPL(diffusion_ext, CPU, m) {
  m.impl("group_norm_act", TORCH_BOX(&group_norm_act<Cpu>));
}

}  // namespace dx
