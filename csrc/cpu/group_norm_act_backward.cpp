// group_norm_act, backward: the sums over each channel's elements, then dx and the gradients of the
// parameters that follow from them.
#include "group_norm.h"

namespace dx {
namespace {

using Sums = ChannelSums<kSums>;

// What the first pass needs of an element: xhat, act(a), dy and da.
struct Element {
  float xhat, act, dy, da;
};

// The numbers that give it, of up to N channels.
template <int N>
struct Numbers {
  float centre[N], rstd[N], residual[N], gain[N], offset[N], post_scale[N];

  DX_INLINE Numbers(const Channels& ch, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t k = first + i;
      centre[i] = ch.centre[k], rstd[i] = ch.rstd[k], residual[i] = ch.residual[k];
      gain[i] = ch.gain[k], offset[i] = ch.offset[k], post_scale[i] = ch.post_scale[k];
    }
  }

  template <Act activation, class T>
  DX_INLINE Element differentiate(int64_t i, T x, T dy) const {
    Element e;
    float derivative;
    e.xhat = fma(to_float(x) - centre[i], rstd[i], residual[i]);
    e.act = activate<activation>(fma(gain[i], e.xhat, offset[i]), derivative);
    e.dy = to_float(dy);
    e.da = e.dy * post_scale[i] * derivative;
    return e;
  }
};

// Whether the first pass leaves da in dx for the second, which then need not differentiate again:
// it was a quarter of the backward with SiLU. Half precision would round it.
template <class T>
constexpr bool kKeepsDa = std::is_same_v<T, float>;

// How many of the sums are needed: those behind kDaXhat only for the gradients of modulations.
constexpr int kFewSums = kDaXhat + 1;

template <int K>
DX_INLINE void add(const Element& e, float (*sums)[kLanes], int64_t lane) {
  sums[kDa][lane] += e.da;
  sums[kDaXhat][lane] = fma(e.da, e.xhat, sums[kDaXhat][lane]);
  if constexpr (K == kSums) {
    sums[kDy][lane] += e.dy;
    sums[kDyAct][lane] = fma(e.dy, e.act, sums[kDyAct][lane]);
    sums[kXhat][lane] += e.xhat;
  }
}

template <class T>
struct Tensors {
  const T* __restrict x, * __restrict dy;
  T* __restrict dx;
};

// Adds elements of a channel to its sums.
template <Act activation, int K, class T>
DX_INLINE void add_run(const Channels& ch, const Tensors<T>& t, Range range, int64_t channel,
                       Sums& sums) {
  const Numbers<1> numbers(ch, channel, 1);
  const T* __restrict x = t.x, * __restrict dy = t.dy;
  T* __restrict dx = t.dx;
  for (int64_t begin = range.begin; begin < range.end; begin += kRun) {
    LaneSums<K> partial;
    for_each_lane({begin, std::min(begin + kRun, range.end)},
                  [&](int64_t i, int64_t lane) DX_KERNEL {
                    const Element e = numbers.template differentiate<activation>(0, x[i], dy[i]);
                    if constexpr (kKeepsDa<T>) dx[i] = e.da;
                    add<K>(e, partial.lanes, lane);
                  });
    for (int k = 0; k < K; ++k) sums.at(k, channel) += partial.total(k);
  }
}

// The same for channels k, k + 1, ... of channels_last.
template <Act activation, int K, class T, class Count>
DX_INLINE void add_column(const Channels& ch, const Tensors<T>& t, Range pixels, int64_t width,
                          int64_t k, Count count, Sums& sums) {
  const Numbers<kColumns> numbers(ch, k, count);
  const T* __restrict x = t.x, * __restrict dy = t.dy;
  T* __restrict dx = t.dx;
  for (int64_t begin = pixels.begin; begin < pixels.end; begin += kPixels) {
    const int64_t end = std::min(begin + kPixels, pixels.end);
    float partial[K][kLanes] = {};
    for (int64_t r = begin; r < end; ++r)
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = r * width + k + i;
        const Element e = numbers.template differentiate<activation>(i, x[at], dy[at]);
        if constexpr (kKeepsDa<T>) dx[at] = e.da;
        add<K>(e, partial, i);
      }
    for (int s = 0; s < K; ++s)
      for (int64_t i = 0; i < count; ++i) sums.at(s, k + i) += partial[s][i];
  }
}

template <Act activation, int K, class T>
DX_INLINE void add_chunk(const Slab& slab, const Channels& ch, const Tensors<T>& t, Range range,
                         Sums& sums) {
  if (slab.g.layout == Layout::contiguous)
    slab.for_each_channel(
        range, [&](int64_t k, Range r) DX_KERNEL { add_run<activation, K>(ch, t, r, k, sums); });
  else
    slab.for_each_column([&](int64_t k, auto count) DX_KERNEL {
      add_column<activation, K>(ch, t, range, slab.width, k, count, sums);
    });
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

// What the statistics have in dx, per channel of a slab: dx = slope da - ((x - centre) second +
// first). Made from the channels' sums, with the gradients of the parameters.
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
        s1 += ch.gain[k] * sums.at(kDa, k);
        s2 += ch.gain[k] * sums.at(kDaXhat, k);
      }
      const GroupMeans means{float(s1 / count), float(s2 / count)};
      for (int64_t k = group; k < group + size; ++k) {
        first[k] = ch.rstd[k] * (means.da + ch.residual[k] * means.da_xhat);
        second[k] = ch.rstd[k] * ch.rstd[k] * means.da_xhat;
        double channel[kSums];
        for (int i = 0; i < kSums; ++i) channel[i] = sums.at(i, k);
        const int64_t c = slab.first + k;
        gradients.at(slab.n, c) = parameter_gradients(g.parameters(slab.n, c), ch.rstd[k], means,
                                                      double(g.spatial), channel);
      }
    }
  }
};

// dx of elements of channel k.
template <Act activation, class T>
DX_INLINE void write(const Channels& ch, const Correction& correction, int64_t k,
                     const Tensors<T>& t, int64_t i) {
  float da;
  if constexpr (kKeepsDa<T>)
    da = t.dx[i];
  else
    da = Numbers<1>(ch, k, 1).template differentiate<activation>(0, t.x[i], t.dy[i]).da;
  const float of_statistics =
      fma(to_float(t.x[i]) - ch.centre[k], correction.second[k], correction.first[k]);
  round_to(fma(ch.slope[k], da, -of_statistics), t.dx[i]);
}

template <Act activation, class T>
DX_INLINE void write_chunk(const Slab& slab, const Channels& ch, const Correction& correction,
                           const Tensors<T>& t, Range range) {
  if (slab.g.layout == Layout::contiguous)
    slab.for_each_channel(range, [&](int64_t k, Range r) DX_KERNEL {
#pragma omp simd
      for (int64_t i = r.begin; i < r.end; ++i) write<activation>(ch, correction, k, t, i);
    });
  else
    slab.for_each_column([&](int64_t k, auto count) DX_KERNEL {
      for (int64_t r = range.begin; r < range.end; ++r)
#pragma omp simd
        for (int64_t i = 0; i < count; ++i)
          write<activation>(ch, correction, k + i, t, r * slab.width + k + i);
    });
}

template <class T>
void run(const GroupNorm& g, const T* dy, const T* x, const double* mean, const float* rstd, T* dx,
         ParameterGradients& gradients) {
  const bool modulated = g.post_scale.given() || g.post_shift.given() || g.pre_shift.given();
  for_each_slab(g, [&](const Slab& slab, bool on_threads) {
    const Tensors<T> t{x + slab.element, dy + slab.element, dx + slab.element};
    const Channels channels(slab, mean, rstd);
    Sums sums = sum_chunks(slab, on_threads, [&](int64_t chunk) {
      Sums of_chunk(slab.width);
      on_best_isa([&]() DX_KERNEL {
        dispatch_act(g.act, [&](auto act) DX_KERNEL {
          with_constants(
              [&](auto all) DX_KERNEL {
                constexpr int K = all ? int(kSums) : kFewSums;
                add_chunk<decltype(act)::value, K>(slab, channels, t, slab.chunk(chunk), of_chunk);
              },
              modulated);
        });
      });
      return of_chunk;
    });
    const Correction correction(slab, channels, sums, gradients);
    for_each_chunk(slab, on_threads, [&](int64_t chunk) {
      on_best_isa([&]() DX_KERNEL {
        dispatch_act(g.act, [&](auto act) DX_KERNEL {
          write_chunk<decltype(act)::value>(slab, channels, correction, t, slab.chunk(chunk));
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
    run(g, dy, x, mean, rstd, dx, gradients);
    gradients.finish();
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(diffusion_ext, CPU, m) {
  m.impl("group_norm_act_backward", TORCH_BOX(&group_norm_act_backward<Cpu>));
}

}  // namespace dx
