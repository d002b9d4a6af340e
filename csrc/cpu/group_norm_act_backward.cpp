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

// A block in float32, its rows packed: xhat, act(a), da and dy.
class BlockValues {
 public:
  explicit BlockValues(const Slab& slab)
      // The padding keeps the four from lying a multiple of 4096 bytes apart, where a load waits
      // for the store to the other's same offset.
      : size_(slab.block_elements() + 80), values_(new float[4 * size_]) {}
  float* xhat() { return values_.get(); }
  float* act() { return values_.get() + size_; }
  float* da() { return values_.get() + 2 * size_; }
  float* dy() { return values_.get() + 3 * size_; }

 private:
  int64_t size_;
  std::unique_ptr<float[]> values_;
};

template <Layout layout, Act activation, class T>
DX_INLINE void differentiate_block(const Block& b, const Channels& ch, const T* __restrict x,
                                   const T* __restrict dy, BlockValues& v) {
  const float *centre = ch.centre, *rstd = ch.rstd, *residual = ch.residual, *gain = ch.gain,
              *offset = ch.offset, *post_scale = ch.post_scale;
  for (int64_t r = 0; r < b.rows; ++r) {
    const T* __restrict row = x + b.element + r * b.pitch;
    float* __restrict xhat = v.xhat() + r * b.width, * __restrict a = v.act() + r * b.width;
#pragma omp simd
    for (int64_t k = 0; k < b.width; ++k) {
      const int64_t c = channel_at<layout>(b, r, k);
      xhat[k] = fma(to_float(row[k]) - centre[c], rstd[c], residual[c]);
      a[k] = fma(gain[c], xhat[k], offset[c]);
    }
  }
  differentiate_all<activation>(v.act(), v.da(), b.size());
  for (int64_t r = 0; r < b.rows; ++r) {
    const T* __restrict row = dy + b.element + r * b.pitch;
    float* __restrict from = v.dy() + r * b.width, * __restrict da = v.da() + r * b.width;
#pragma omp simd
    for (int64_t k = 0; k < b.width; ++k) {
      from[k] = to_float(row[k]);
      da[k] *= from[k] * post_scale[channel_at<layout>(b, r, k)];
    }
  }
}

// Adds the rows of a contiguous block, each to its channel.
DX_INLINE void add_channels(const Block& b, BlockValues& v, Sums& sums) {
  for (int64_t r = 0; r < b.rows; ++r) {
    const int64_t at = r * b.width;
    const float *a_xhat = v.xhat() + at, *a_act = v.act() + at, *a_da = v.da() + at,
                *a_dy = v.dy() + at;
    float da = 0, da_xhat = 0, dy = 0, dy_act = 0, xhat = 0;
#pragma omp simd reduction(+ : da, da_xhat, dy, dy_act, xhat)
    for (int64_t k = 0; k < b.width; ++k) {
      da += a_da[k];
      da_xhat += a_da[k] * a_xhat[k];
      dy += a_dy[k];
      dy_act += a_dy[k] * a_act[k];
      xhat += a_xhat[k];
    }
    const int64_t c = b.channel + r;
    sums.total(kDa, c) += da;
    sums.total(kDaXhat, c) += da_xhat;
    sums.total(kDy, c) += dy;
    sums.total(kDyAct, c) += dy_act;
    sums.total(kXhat, c) += xhat;
  }
}

// Adds the rows of a channels_last block, channel by channel.
DX_INLINE void add_pixels(const Block& b, BlockValues& v, Sums& sums) {
  float *da = sums.narrow(kDa), *da_xhat = sums.narrow(kDaXhat), *dy = sums.narrow(kDy),
        *dy_act = sums.narrow(kDyAct), *xhat = sums.narrow(kXhat);
  for (int64_t r = 0; r < b.rows; ++r) {
    const int64_t at = r * b.width;
    const float *a_xhat = v.xhat() + at, *a_act = v.act() + at, *a_da = v.da() + at,
                *a_dy = v.dy() + at;
#pragma omp simd
    for (int64_t k = 0; k < b.width; ++k) {
      da[k] += a_da[k];
      da_xhat[k] += a_da[k] * a_xhat[k];
      dy[k] += a_dy[k];
      dy_act[k] += a_dy[k] * a_act[k];
      xhat[k] += a_xhat[k];
    }
  }
  sums.added(b.rows);
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
  std::vector<float> slope, first, second;

  Correction(const Slab& slab, const Channels& ch, Sums& sums, Gradients& out)
      : slope(slab.width), first(slab.width), second(slab.width) {
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
        slope[k] = ch.rstd[k] * ch.gain[k];
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
                           const T* x, const T* dy, T* dx, BlockValues& v) {
  differentiate_block<layout, activation>(b, ch, x, dy, v);
  const float *slope = correction.slope.data(), *first = correction.first.data(),
              *second = correction.second.data();
  for (int64_t r = 0; r < b.rows; ++r) {
    const float* __restrict xhat = v.xhat() + r * b.width, * __restrict da = v.da() + r * b.width;
    T* __restrict row = dx + b.element + r * b.pitch;
#pragma omp simd
    for (int64_t k = 0; k < b.width; ++k) {
      const int64_t c = channel_at<layout>(b, r, k);
      round_to(fma(slope[c], da[k], fma(-xhat[k], second[c], -first[c])), row[k]);
    }
  }
}

template <Layout layout, class T>
Sums channel_sums(const Slab& slab, const Channels& channels, const T* x, const T* dy) {
  return sum_chunks<kSums>(slab, [&](int64_t chunk, Sums& sums) DX_KERNEL {
    BlockValues v(slab);
    dispatch_act(slab.g.act, [&](auto act) DX_KERNEL {
      slab.for_each_block(chunk, [&](const Block& b) DX_KERNEL {
        differentiate_block<layout, decltype(act)::value>(b, channels, x, dy, v);
        if constexpr (layout == Layout::contiguous)
          add_channels(b, v, sums);
        else
          add_pixels(b, v, sums);
      });
    });
  });
}

template <Layout layout, class T>
void run(const GroupNorm& g, const T* dy, const T* x, const double* mean, const float* rstd, T* dx,
         Gradients& gradients) {
  for_each_slab(g, [&](const Slab& slab) {
    const Channels channels(slab, mean, rstd);
    Sums sums = channel_sums<layout>(slab, channels, x, dy);
    const Correction correction(slab, channels, sums, gradients);
    slab.for_each_chunk([&](int64_t chunk) {
      BlockValues v(slab);
      on_best_isa([&]() DX_KERNEL {
        dispatch_act(g.act, [&](auto act) DX_KERNEL {
          slab.for_each_block(chunk, [&](const Block& b) DX_KERNEL {
            write_block<layout, decltype(act)::value>(b, channels, correction, x, dy, dx, v);
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
#pragma omp simd
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
