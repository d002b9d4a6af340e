// group_norm_act, backward: the sums over each channel's elements, then dx and the gradients of the
// parameters that follow from them.
#include "group_norm_act_backward.h"

namespace dx {
namespace {

using namespace norm_backward;

// The wanted gradients of a call's parameters by channel of each sample, float32 [N, C] each; those
// of parameters [C] are still to be summed over the samples.
class ParameterGradients {
 public:
  ParameterGradients(const GroupNorm& g, const Gradients& out) : g_(g) {
    using P = ChannelParameters;
    int i = 0;
    for (const auto member : {&P::weight, &P::bias, &P::scale, &P::shift, &P::post_scale,
                              &P::post_shift, &P::pre_shift}) {
      const Gradient& gradient = out.of[i++];
      if (gradient.wanted())
        wanted_.push_back({gradient, member, std::vector<float>(g.samples * g.channels)});
    }
  }

  bool wanted() const { return !wanted_.empty(); }

  void set(int64_t n, int64_t c, const ChannelParameters& gradients) {
    for (Wanted& w : wanted_) w.values[n * g_.channels + c] = gradients.*w.member;
  }

  void finish() const {
    for (const Wanted& w : wanted_) write(w);
  }

 private:
  struct Wanted {
    Gradient out;
    float ChannelParameters::* member;
    std::vector<float> values;
  };

  void write(const Wanted& w) const {
    const int64_t rows = w.out.per_sample ? g_.samples : 1, count = rows * g_.channels;
    std::vector<double> sums(count);
    for (int64_t n = 0; n < g_.samples; n += rows)
      for (int64_t i = 0; i < count; ++i) sums[i] += w.values[n * g_.channels + i];
    for (int64_t i = 0; i < count; ++i) w.out.set(i, sums[i]);
  }

  const GroupNorm& g_;
  std::vector<Wanted> wanted_;
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
      if (!gradients.wanted()) continue;
      double channel[kSums];
      for (int i = 0; i < kSums; ++i) channel[i] = sums.at(i, k);
      gradients.set(
          slab.n, slab.first + k,
          parameter_gradients(ch.parameters(k), ch.rstd[k], means, double(g.spatial), channel));
    }
  }
  return out;
}

void run(const GroupNorm& g, const Tensors& t, const double* mean, const float* rstd,
         ParameterGradients& gradients) {
  const bool modulated = g.post_scale.given() || g.post_shift.given() || g.pre_shift.given();
  for_each_slab(g, [&](const Slab& slab, bool on_threads) {
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
    run(g, {Source(x), Source(dy), Target(dx)}, mean, rstd, gradients);
    gradients.finish();
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(diffusion_ext, CPU, m) {
  m.impl("group_norm_act_backward", TORCH_BOX(&group_norm_act_backward<Cpu>));
}

}  // namespace dx
