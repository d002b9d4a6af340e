// group_norm_act, backward: the sums over each channel's elements, then dx and the gradients of the
// parameters that follow from them.
#include "group_norm_act_backward.h"

namespace dx {
namespace {

using namespace norm_backward;

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

// From the channels' sums, with the gradients of the parameters.
Correction correct(const Slab& slab, const Channels& ch, Sums& sums,
                   ParameterGradients& gradients) {
  Correction out{std::vector<float>(slab.width), std::vector<float>(slab.width)};
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
      out.first[k] = ch.rstd[k] * (means.da + ch.residual[k] * means.da_xhat);
      out.second[k] = ch.rstd[k] * ch.rstd[k] * means.da_xhat;
      double channel[kSums];
      for (int i = 0; i < kSums; ++i) channel[i] = sums.at(i, k);
      const int64_t c = slab.first + k;
      gradients.at(slab.n, c) = parameter_gradients(g.parameters(slab.n, c), ch.rstd[k], means,
                                                    double(g.spatial), channel);
    }
  }
  return out;
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
      if (modulated)
        add<kSums>(slab, channels, t, chunk, of_chunk);
      else
        add<kFewSums>(slab, channels, t, chunk, of_chunk);
      return of_chunk;
    });
    const Correction correction = correct(slab, channels, sums, gradients);
    for_each_chunk(slab, on_threads,
                   [&](int64_t chunk) { write(slab, channels, correction, t, chunk); });
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
