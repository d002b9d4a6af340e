// group_norm_act, backward. With a the activation's input and da = dy post_scale act'(a), each
// channel of each sample needs five sums over its elements; every gradient follows from them, and
//   dx = rstd (gain da - S1/M - xhat S2/M),  S1 = sum gain da,  S2 = sum gain da xhat
// over the M elements of a group.
#include "group_norm.h"

namespace dx {
namespace {

// The sums over the elements of a channel, by index in ChannelSums.
enum { kDa, kDaXhat, kDy, kDyAct, kXhat, kSums };
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

// The gradients by channel of each sample, float32 [N, C]; those of weight and bias are still to be
// summed over the samples.
struct Gradients {
  std::vector<float> weight, bias, scale, shift, post_scale, post_shift, pre_shift;
  explicit Gradients(int64_t count) {
    for (auto* v : {&weight, &bias, &scale, &shift, &post_scale, &post_shift, &pre_shift})
      v->resize(count);
  }
};

// Per channel of a slab: dx = slope da - xhat second - first. Made from the channels' sums, with
// the gradients of the parameters.
struct Correction {
  std::vector<float> first, second;

  Correction(const Slab& slab, const Channels& ch, Sums& sums, Gradients& out)
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
      for (int64_t k = group; k < group + size; ++k) {
        const int64_t n = slab.n, c = slab.first + k, at = n * g.channels + c;
        const double da = sums.total(kDa, k), da_xhat = sums.total(kDaXhat, k);
        first[k] = float(ch.rstd[k] * s1 / count);
        second[k] = float(ch.rstd[k] * s2 / count);
        const float one_scale = 1.0f + g.scale.at(n, c);
        out.weight[at] = float(one_scale * da_xhat);
        out.bias[at] = float(one_scale * da);
        out.scale[at] = float(g.weight.at(n, c) * da_xhat + g.bias.at(n, c) * da);
        out.shift[at] = float(da);
        out.post_scale[at] = float(sums.total(kDyAct, k));
        out.post_shift[at] = float(sums.total(kDy, k));
        out.pre_shift[at] =
            float(ch.rstd[k] *
                  (ch.gain[k] * da - (double(g.spatial) * s1 + sums.total(kXhat, k) * s2) / count));
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
         Gradients& gradients) {
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

// Writes values [samples, channels] as the gradient of `parameter`, summing over the samples where
// it is [C]. No parameter, no gradient: an empty tensor.
Tensor gradient_of(const MaybeTensor& parameter, const Tensor& x,
                   const std::vector<float>& values) {
  if (!parameter) return torch::stable::new_empty(x, {0});
  const Tensor out = torch::stable::new_empty(x, parameter->sizes(), parameter->scalar_type());
  const int64_t count = out.numel(), samples = count == 0 ? 0 : int64_t(values.size()) / count;
  const auto write = [&](auto* to) {
    for (int64_t i = 0; i < count; ++i) {
      double sum = 0;
      for (int64_t n = 0; n < samples; ++n) sum += values[n * count + i];
      if constexpr (std::is_same_v<decltype(to), double*>)
        to[i] = sum;
      else
        round_to(float(sum), to[i]);
    }
  };
  if (out.scalar_type() == ScalarType::Double)
    write(static_cast<double*>(out.mutable_data_ptr()));
  else
    dispatch_floating(out.scalar_type(), "group_norm_act_backward", [&](auto* tag) {
      write(static_cast<decltype(tag)>(out.mutable_data_ptr()));
    });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> group_norm_act_backward(
    const Tensor& dy_, const Tensor& x_, const Tensor& mean, const Tensor& rstd, int64_t num_groups,
    const MaybeTensor& weight, const MaybeTensor& bias, int64_t act, const MaybeTensor& scale,
    const MaybeTensor& shift, const MaybeTensor& post_scale, const MaybeTensor& post_shift,
    const MaybeTensor& pre_shift) {
  STD_TORCH_CHECK(x_.dim() >= 2, "x: wanted shape [N, C, *spatial]");
  check_like("dy", dy_, x_);
  Output dx(new_like(x_));
  const Tensor x = in_layout(x_, dx.dense(), dx.layout());
  const Tensor dy = in_layout(dy_, dx.dense(), dx.layout());
  const GroupNorm g(x, dx.layout(), num_groups, act, weight, bias, scale, shift, post_scale,
                    post_shift, pre_shift);
  STD_TORCH_CHECK(mean.numel() == g.samples * g.groups &&
                      mean.scalar_type() == ScalarType::Double && rstd.numel() == mean.numel() &&
                      rstd.scalar_type() == ScalarType::Float && mean.is_contiguous() &&
                      rstd.is_contiguous(),
                  "mean, rstd: wanted what group_norm_act returned");
  Gradients gradients(g.samples * g.channels);
  dispatch_floating(x.scalar_type(), "group_norm_act_backward", [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const auto backward = [&](auto layout) {
      run<decltype(layout)::value>(g, data_of<T>(dy), data_of<T>(x), data_of<double>(mean),
                                   data_of<float>(rstd), dx.data<T>(), gradients);
    };
    if (g.layout == Layout::contiguous)
      backward(std::integral_constant<Layout, Layout::contiguous>());
    else
      backward(std::integral_constant<Layout, Layout::channels_last>());
  });
  return {dx.finish(),
          gradient_of(weight, x, gradients.weight),
          gradient_of(bias, x, gradients.bias),
          gradient_of(scale, x, gradients.scale),
          gradient_of(shift, x, gradients.shift),
          gradient_of(post_scale, x, gradients.post_scale),
          gradient_of(post_shift, x, gradients.post_shift),
          gradient_of(pre_shift, x, gradients.pre_shift)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(diffusion_ext, CPU, m) {
  m.impl("group_norm_act_backward", TORCH_BOX(&group_norm_act_backward));
}

}  // namespace dx
