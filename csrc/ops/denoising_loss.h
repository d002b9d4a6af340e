// denoising_loss as every device sees it: a call is checked, its tensors are laid out alike and
// handed to the device's Kernel(output).run<T, X>(loss, model_output, x0, noise, gradient): T is
// the dtype of the model's output and the gradient, X that of x0 and the noise.
#pragma once

#include "../math/denoising_loss.h"

#include "../common.h"
#include "noising.h"

namespace dx {

struct DenoisingLoss {
  Batch batch;
  const int64_t* t;      // [B]
  const int64_t* seeds;  // [B], or null where noise is given, or none is in the target
  int64_t table_size;
  const float* of_x0;     // [table_size]
  const float* of_noise;  // [table_size]
  const float* upstream;  // [B], the gradients of the losses; null where none is wanted
  float delta;            // of Huber's penalty; 0 for the square
  float* losses;          // [B]
};

template <class Kernel>
std::tuple<Tensor, Tensor> denoising_loss(const Tensor& output_, const Tensor& t_,
                                          const Tensor& of_x0, const Tensor& of_noise,
                                          const MaybeTensor& x0_, const MaybeTensor& noise_,
                                          const MaybeTensor& seeds_, const MaybeTensor& upstream_,
                                          std::optional<double> delta) {
  STD_TORCH_CHECK(output_.dim() >= 1, "model_output: wanted shape [B, *]");
  STD_TORCH_CHECK(!noise_ || !seeds_, "noise, seeds: wanted one of them at most");
  STD_TORCH_CHECK(x0_ || noise_ || seeds_, "x0, noise, seeds: wanted one of them at least");
  STD_TORCH_CHECK(!delta || *delta > 0, "delta: wanted a number above 0");
  const int64_t samples = output_.size(0);
  const auto dtype = output_.scalar_type();
  const auto data_dtype = x0_ ? x0_->scalar_type() : noise_ ? noise_->scalar_type() : dtype;
  STD_TORCH_CHECK(data_dtype == dtype || data_dtype == ScalarType::Float,
                  "x0, noise: wanted the model output's dtype or float32");
  const auto check = [&](const char* name, const MaybeTensor& data) {
    if (!data) return;
    STD_TORCH_CHECK(same_sizes(*data, output_), name, ": wanted the model output's shape");
    STD_TORCH_CHECK(data->scalar_type() == data_dtype, name, ": wanted x0's dtype");
    check_same_device(name, *data, output_);
  };
  check("x0", x0_), check("noise", noise_);
  const Tensor t = index_vector("t", t_, samples, output_);
  const MaybeTensor seeds =
      map(seeds_, [&](const Tensor& s) { return index_vector("seeds", s, samples, output_); });
  STD_TORCH_CHECK(of_x0.numel() == of_noise.numel(), "of_noise: wanted of_x0's size");
  const MaybeTensor upstream = map(upstream_, [&](const Tensor& u) {
    check_same_device("upstream", u, output_);
    STD_TORCH_CHECK(u.scalar_type() == ScalarType::Float && u.dim() == 1 && u.numel() == samples,
                    "upstream: wanted float32 [", samples, "]");
    return as_contiguous(u);
  });

  const Layout layout = layout_of(output_);
  const Tensor output = fits(output_, layout) ? output_ : torch::stable::contiguous(output_);
  Output gradient(upstream ? new_like(output_) : fresh(output_, {0}));
  const auto laid = [&](const Tensor& data) { return in_layout(data, output, layout); };
  const MaybeTensor x0 = map(x0_, laid), noise = map(noise_, laid);
  Tensor losses = fresh(output_, {samples}, int32_t(ScalarType::Float));
  const DenoisingLoss loss{Batch(output, layout),
                           data_of<int64_t>(t),
                           data_of<int64_t>(seeds),
                           of_x0.numel(),
                           noising_table("of_x0", of_x0, output_),
                           noising_table("of_noise", of_noise, output_),
                           data_of<float>(upstream),
                           float(delta.value_or(0)),
                           static_cast<float*>(losses.mutable_data_ptr())};
  const Kernel kernel(output);
  dispatch_floating(dtype, "denoising_loss", [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const auto run = [&](auto* data_tag) {
      using X = std::remove_pointer_t<decltype(data_tag)>;
      kernel.template run<T, X>(loss, data_of<T>(output), data_of<X>(x0), data_of<X>(noise),
                                upstream ? gradient.data<T>() : nullptr);
    };
    if (data_dtype == dtype) return run(tag);
    run(static_cast<float*>(nullptr));
  });
  return {losses, gradient.finish()};
}

}  // namespace dx
