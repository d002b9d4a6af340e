// group_norm_act as every device sees it, forward and backward: a call is checked, its tensors are
// laid out alike, its results made, and all handed to the device's
//   Kernel(x).forward<T>(g, eps, x, y, mean, rstd)
//   Kernel(x).backward<T>(g, dy, x, mean, rstd, dx, gradients)
#pragma once

#include "../common.h"
#include "../math/group_norm_act.h"

namespace dx {

enum class Floating : int32_t { float32, float16, bfloat16, float64 };

inline Floating floating_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Floating::float32;
    case ScalarType::Half: return Floating::float16;
    case ScalarType::BFloat16: return Floating::bfloat16;
    case ScalarType::Double: return Floating::float64;
    default: STD_TORCH_CHECK(false, name, ": wanted a floating dtype"); std::abort();
  }
}

// A parameter [C] or [N, C], of any floating dtype and strides; where there is none, a constant.
struct Parameter {
  const void* data;
  Floating dtype;
  int64_t sample_stride, channel_stride;
  float absent;

  DX_INLINE bool given() const { return data != nullptr; }

  DX_INLINE float at(int64_t n, int64_t c) const {
    if (data == nullptr) return absent;
    const int64_t i = n * sample_stride + c * channel_stride;
    switch (dtype) {
      case Floating::float32: return static_cast<const float*>(data)[i];
      case Floating::float16: return to_float(static_cast<const Half*>(data)[i]);
      case Floating::bfloat16: return to_float(static_cast<const BFloat16*>(data)[i]);
      default: return float(static_cast<const double*>(data)[i]);
    }
  }

  // Of channels c, c + 1, ... .
  DX_INLINE void row(int64_t n, int64_t c, int64_t count, float* out) const {
    if (data != nullptr && dtype == Floating::float32 && channel_stride == 1) {
      const float* from = static_cast<const float*>(data) + n * sample_stride + c;
      for (int64_t k = 0; k < count; ++k) out[k] = from[k];
    } else if (data == nullptr) {
      for (int64_t k = 0; k < count; ++k) out[k] = absent;
    } else {
      for (int64_t k = 0; k < count; ++k) out[k] = at(n, c + k);
    }
  }
};

inline Parameter parameter_of(const char* name, const MaybeTensor& t, const Tensor& x,
                              float absent) {
  if (!t) return {nullptr, Floating::float32, 0, 0, absent};
  const int64_t samples = x.size(0), channels = x.size(1), dims = t->dim();
  const int64_t rows = dims == 2 ? samples : 1;
  STD_TORCH_CHECK(
      (dims == 1 || dims == 2) && t->numel() == rows * channels && t->size(dims - 1) == channels,
      name, ": wanted shape [", channels, "] or [", samples, ", ", channels, "]");
  check_same_device(name, *t, x);
  return {t->const_data_ptr(), floating_of(name, *t), dims == 2 ? t->stride(0) : 0,
          t->stride(dims - 1), absent};
}

// The problem: x [N, C, *spatial] in G groups.
struct GroupNorm {
  int64_t samples, channels, spatial, groups;
  Layout layout;
  Act act;
  Parameter weight, bias, scale, shift, post_scale, post_shift, pre_shift;

  DX_INLINE int64_t group_channels() const { return channels / groups; }
  DX_INLINE int64_t elements() const { return samples * channels * spatial; }

  DX_INLINE float gain(int64_t n, int64_t c) const {
    return weight.at(n, c) * (1.0f + scale.at(n, c));
  }

  DX_INLINE ChannelParameters parameters(int64_t n, int64_t c) const {
    return {weight.at(n, c),     bias.at(n, c),       scale.at(n, c),    shift.at(n, c),
            post_scale.at(n, c), post_shift.at(n, c), pre_shift.at(n, c)};
  }
};

inline GroupNorm group_norm_of(const Tensor& x, Layout layout, int64_t groups, int64_t act,
                               const MaybeTensor& weight, const MaybeTensor& bias,
                               const MaybeTensor& scale, const MaybeTensor& shift,
                               const MaybeTensor& post_scale, const MaybeTensor& post_shift,
                               const MaybeTensor& pre_shift) {
  const int64_t samples = x.size(0), channels = x.size(1);
  STD_TORCH_CHECK(groups > 0 && channels % groups == 0,
                  "num_groups: wanted a divisor of the channels");
  STD_TORCH_CHECK(act >= 0 && act < kActs, "act: unknown");
  return {samples,
          channels,
          samples * channels == 0 ? 0 : x.numel() / (samples * channels),
          groups,
          layout,
          Act(act),
          parameter_of("weight", weight, x, 1.0f),
          parameter_of("bias", bias, x, 0.0f),
          parameter_of("scale", scale, x, 0.0f),
          parameter_of("shift", shift, x, 0.0f),
          parameter_of("post_scale", post_scale, x, 1.0f),
          parameter_of("post_shift", post_shift, x, 0.0f),
          parameter_of("pre_shift", pre_shift, x, 0.0f)};
}

// What the normalised x is written to, as torch lays out that of its own norm on a CPU.
inline Tensor new_norm(const Tensor& x, bool activated) {
  const Strides strides = strides_of_norm(x.sizes(), x.strides(), activated);
  return in_huge_pages(fresh_strided(x, x.sizes(), strides, dtype_of(x)));
}

template <class Kernel>
std::tuple<Tensor, Tensor, Tensor> group_norm_act(
    const Tensor& x_, int64_t num_groups, const MaybeTensor& weight, const MaybeTensor& bias,
    double eps, int64_t act, const MaybeTensor& scale, const MaybeTensor& shift,
    const MaybeTensor& post_scale, const MaybeTensor& post_shift, const MaybeTensor& pre_shift) {
  STD_TORCH_CHECK(x_.dim() >= 2, "x: wanted shape [N, C, *spatial]");
  const Tensor made = new_norm(x_, Act(act) != Act::identity);
  Output y(made, Kernel::layout(made, num_groups));
  const Tensor x = in_layout(x_, y.dense(), y.layout());
  const GroupNorm g = group_norm_of(x, y.layout(), num_groups, act, weight, bias, scale, shift,
                                    post_scale, post_shift, pre_shift);
  const Tensor mean = fresh(x, {g.samples, g.groups}, aoti_torch_dtype_float64());
  const Tensor rstd = fresh(x, {g.samples, g.groups}, aoti_torch_dtype_float32());
  const Kernel kernel(x);
  dispatch_floating(x.scalar_type(), "group_norm_act", [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    kernel.template forward<T>(g, eps, data_of<T>(x), y.data<T>(),
                               static_cast<double*>(mean.mutable_data_ptr()),
                               static_cast<float*>(rstd.mutable_data_ptr()));
  });
  return {y.finish(), mean, rstd};
}

// The gradient of a parameter: contiguous [C] or [N, C] in its dtype; data is null where there is
// no such parameter.
struct Gradient {
  void* data;
  Floating dtype;
  bool per_sample;

  DX_INLINE bool wanted() const { return data != nullptr; }

  DX_INLINE void set(int64_t i, double value) const {
    switch (dtype) {
      case Floating::float32: return round_to(float(value), static_cast<float*>(data)[i]);
      case Floating::float16: return round_to(float(value), static_cast<Half*>(data)[i]);
      case Floating::bfloat16: return round_to(float(value), static_cast<BFloat16*>(data)[i]);
      default: static_cast<double*>(data)[i] = value;
    }
  }
};

// One for each parameter, in the order of ChannelParameters.
constexpr int kParameters = 7;
struct Gradients {
  Gradient of[kParameters];
};

template <class Kernel>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> group_norm_act_backward(
    const Tensor& dy_, const Tensor& x_, const Tensor& mean, const Tensor& rstd, int64_t num_groups,
    const MaybeTensor& weight, const MaybeTensor& bias, int64_t act, const MaybeTensor& scale,
    const MaybeTensor& shift, const MaybeTensor& post_scale, const MaybeTensor& post_shift,
    const MaybeTensor& pre_shift) {
  STD_TORCH_CHECK(x_.dim() >= 2, "x: wanted shape [N, C, *spatial]");
  check_like("dy", dy_, x_);
  const Tensor made = new_norm(x_, false);
  Output dx(made, Kernel::layout(made, num_groups));
  const Tensor x = in_layout(x_, dx.dense(), dx.layout());
  const Tensor dy = in_layout(dy_, dx.dense(), dx.layout());
  const GroupNorm g = group_norm_of(x, dx.layout(), num_groups, act, weight, bias, scale, shift,
                                    post_scale, post_shift, pre_shift);
  check_same_device("mean", mean, x);
  check_same_device("rstd", rstd, x);
  STD_TORCH_CHECK(mean.numel() == g.samples * g.groups &&
                      mean.scalar_type() == ScalarType::Double && rstd.numel() == mean.numel() &&
                      rstd.scalar_type() == ScalarType::Float && mean.is_contiguous() &&
                      rstd.is_contiguous(),
                  "mean, rstd: wanted what group_norm_act returned");
  Gradients gradients = {};
  // Undefined, which is None in Python, where there is no such parameter: the empty tensors of a
  // call without modulations took a microsecond of a small one's nine.
  const auto make = [&](int i, const MaybeTensor& parameter) {
    if (!parameter) return Tensor();
    const Tensor out = fresh(*parameter, parameter->sizes());
    gradients.of[i] = {out.mutable_data_ptr(), floating_of("", out), out.dim() == 2};
    return out;
  };
  const Tensor dweight = make(0, weight), dbias = make(1, bias), dscale = make(2, scale),
               dshift = make(3, shift), dpost_scale = make(4, post_scale),
               dpost_shift = make(5, post_shift), dpre_shift = make(6, pre_shift);
  const Kernel kernel(x);
  dispatch_floating(x.scalar_type(), "group_norm_act_backward", [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    kernel.template backward<T>(g, data_of<T>(dy), data_of<T>(x), data_of<double>(mean),
                                data_of<float>(rstd), dx.data<T>(), gradients);
  });
  return {dx.finish(), dweight, dbias, dscale, dshift, dpost_scale, dpost_shift, dpre_shift};
}

}  // namespace dx
