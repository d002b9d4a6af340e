// group_norm_act, backward: the sums over each channel's elements, then dx and the gradients of the
// parameters that follow from them.
#include "group_norm.h"

namespace dx {
namespace {

using Sums = ChannelSums<kSums>;

// What both passes need of an element: xhat, act(a), dy and da.
struct Element {
  float xhat, act, dy, da;
};

template <class T>
DX_INLINE float normalise(const Channels& ch, int64_t c, T x) {
  return fma(to_float(x) - ch.centre[c], ch.rstd[c], ch.residual[c]);
}

template <Act activation, class T>
DX_INLINE Element differentiate(const Channels& ch, int64_t c, T x, T dy) {
  Element e;
  float derivative;
  e.xhat = normalise(ch, c, x);
  e.act = activate<activation>(fma(ch.gain[c], e.xhat, ch.offset[c]), derivative);
  e.dy = to_float(dy);
  e.da = e.dy * ch.post_scale[c] * derivative;
  return e;
}

// Whether the first pass leaves da in dx for the second, which then need not differentiate again:
// it was a quarter of the backward with SiLU. Half precision would round it.
template <class T>
constexpr bool kKeepsDa = std::is_same_v<T, float>;

// Adds `count` neighbours, each to its own lane of the sums. Contiguous: all of channel c.
// channels_last: channels c, c + 1, ...
template <Layout layout, Act activation, class T>
DX_INLINE void add_row(const Channels& ch, int64_t c, const T* x, const T* dy, T* dx, int64_t count,
                       float* const* lanes) {
  float *da = lanes[kDa], *da_xhat = lanes[kDaXhat], *dys = lanes[kDy], *dy_act = lanes[kDyAct],
        *xhat = lanes[kXhat];
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) {
    const int64_t channel = layout == Layout::contiguous ? c : c + k;
    const Element e = differentiate<activation>(ch, channel, x[k], dy[k]);
    if constexpr (kKeepsDa<T>) dx[k] = e.da;
    da[k] += e.da;
    da_xhat[k] += e.da * e.xhat;
    dys[k] += e.dy;
    dy_act[k] += e.dy * e.act;
    xhat[k] += e.xhat;
  }
}

// Adds a block to its channels' sums.
template <Layout layout, Act activation, class T>
DX_INLINE void add_block(const Block& b, const Channels& ch, const T* x, const T* dy, T* dx,
                         Sums& sums) {
  constexpr int64_t width = 32;
  for (int64_t r = 0; r < b.rows; ++r) {
    const int64_t at = b.element + r * b.pitch;
    float* lanes[kSums];
    if constexpr (layout == Layout::channels_last) {
      for (int k = 0; k < kSums; ++k) lanes[k] = sums.narrow(k);
      add_row<layout, activation>(ch, 0, x + at, dy + at, dx + at, b.width, lanes);
      continue;
    }
    float partial[kSums][width] = {};
    for (int k = 0; k < kSums; ++k) lanes[k] = partial[k];
    for (int64_t k = 0; k < b.width; k += width)
      add_row<layout, activation>(ch, b.channel + r, x + at + k, dy + at + k, dx + at + k,
                                  std::min(width, b.width - k), lanes);
    for (int k = 0; k < kSums; ++k) {
      float total = 0;
#pragma omp simd reduction(+ : total)
      for (int64_t i = 0; i < width; ++i) total += partial[k][i];
      sums.total(k, b.channel + r) += total;
    }
  }
  if constexpr (layout == Layout::channels_last) sums.added(b.rows);
}

// The gradients of a call's parameters by channel of each sample, float32 [N, C] each; those of
// parameters [C] are still to be summed over the samples.
class ParameterGradients {
 public:
  ParameterGradients(const GroupNorm& g, const Gradients& out)
      : g_(g), out_(out), values_(g.samples * g.channels) {}

  ChannelParameters& at(int64_t n, int64_t c) { return values_[n * g_.channels + c]; }

  void finish() const {
    using P = ChannelParameters;
    int i = 0;
    for (const auto member : {&P::weight, &P::bias, &P::scale, &P::shift, &P::post_scale,
                              &P::post_shift, &P::pre_shift})
      write(out_.of[i++], member);
  }

 private:
  void write(const Gradient& out, float ChannelParameters::* member) const {
    if (!out.wanted()) return;
    const int64_t rows = out.per_sample ? g_.samples : 1, count = rows * g_.channels;
    for (int64_t i = 0; i < count; ++i) {
      double sum = 0;
      for (int64_t n = 0; n < g_.samples; n += rows) sum += values_[n * g_.channels + i].*member;
      out.set(i, sum);
    }
  }

  const GroupNorm& g_;
  const Gradients& out_;
  std::vector<ChannelParameters> values_;
};

// Per channel of a slab: dx = slope da - xhat second - first. Made from the channels' sums, with
// the gradients of the parameters.
struct Correction {
  std::vector<float> first, second;

  Correction(const Slab& slab, const Channels& ch, Sums& sums, ParameterGradients& gradients)
      : first(slab.width), second(slab.width) {
    const GroupNorm& g = slab.g;
    const int64_t size = g.group_channels();
    const double count = double(size * g.spatial);
    for (int64_t group = 0; group < slab.width; group += size) {
      double s1 = 0, s2 = 0;
      for (int64_t k = group; k < group + size; ++k) {
        s1 += ch.gain[k] * sums.total(kDa, k);
        s2 += ch.gain[k] * sums.total(kDaXhat, k);
      }
      const GroupMeans means{float(s1 / count), float(s2 / count)};
      for (int64_t k = group; k < group + size; ++k) {
        first[k] = ch.rstd[k] * means.da;
        second[k] = ch.rstd[k] * means.da_xhat;
        double channel[kSums];
        for (int i = 0; i < kSums; ++i) channel[i] = sums.total(i, k);
        const int64_t c = slab.first + k;
        gradients.at(slab.n, c) = parameter_gradients(g.parameters(slab.n, c), ch.rstd[k], means,
                                                      double(g.spatial), channel);
      }
    }
  }
};

template <Layout layout, Act activation, class T>
DX_INLINE void write_block(const Block& b, const Channels& ch, const Correction& correction,
                           const T* x, const T* dy, T* dx) {
  const float *first = correction.first.data(), *second = correction.second.data();
  for (int64_t r = 0; r < b.rows; ++r) {
    const int64_t at = b.element + r * b.pitch;
#pragma omp simd
    for (int64_t k = 0; k < b.width; ++k) {
      const int64_t c = channel_at<layout>(b, r, k);
      Element e;
      if constexpr (kKeepsDa<T>) {
        e.xhat = normalise(ch, c, x[at + k]);
        e.da = dx[at + k];
      } else {
        e = differentiate<activation>(ch, c, x[at + k], dy[at + k]);
      }
      round_to(fma(ch.slope[c], e.da, fma(-e.xhat, second[c], -first[c])), dx[at + k]);
    }
  }
}

template <Layout layout, class T>
Sums channel_sums(const Slab& slab, const Channels& channels, const T* x, const T* dy, T* dx) {
  return sum_chunks<kSums>(slab, [&](int64_t chunk, Sums& sums) DX_KERNEL {
    dispatch_act(slab.g.act, [&](auto act) DX_KERNEL {
      slab.for_each_block(chunk, [&](const Block& b) DX_KERNEL {
        add_block<layout, decltype(act)::value>(b, channels, x, dy, dx, sums);
      });
    });
  });
}

template <Layout layout, class T>
void run(const GroupNorm& g, const T* dy, const T* x, const double* mean, const float* rstd, T* dx,
         ParameterGradients& gradients) {
  for_each_slab(g, [&](const Slab& slab) {
    const Channels channels(slab, mean, rstd);
    Sums sums = channel_sums<layout>(slab, channels, x, dy, dx);
    const Correction correction(slab, channels, sums, gradients);
    slab.for_each_chunk([&](int64_t chunk) {
      on_best_isa([&]() DX_KERNEL {
        dispatch_act(g.act, [&](auto act) DX_KERNEL {
          slab.for_each_block(chunk, [&](const Block& b) DX_KERNEL {
            write_block<layout, decltype(act)::value>(b, channels, correction, x, dy, dx);
          });
        });
      });
    });
  });
}

struct Cpu {
  explicit Cpu(const Tensor&) {}
  static Layout layout(const Tensor& x, int64_t) { return layout_of(x); }

  template <class T>
  void backward(const GroupNorm& g, const T* dy, const T* x, const double* mean, const float* rstd,
                T* dx, const Gradients& out) const {
    ParameterGradients gradients(g, out);
    if (g.layout == Layout::contiguous)
      run<Layout::contiguous>(g, dy, x, mean, rstd, dx, gradients);
    else
      run<Layout::channels_last>(g, dy, x, mean, rstd, dx, gradients);
    gradients.finish();
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(diffusion_ext, CPU, m) {
  m.impl("group_norm_act_backward", TORCH_BOX(&group_norm_act_backward<Cpu>));
}

}  // namespace dx
