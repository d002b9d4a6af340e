// perturb as every device sees it: a call is checked, its tensors are laid out alike and handed to
// the device's Kernel(x).run<T>(perturbation, x0, noise, x_t, target).
#pragma once

#include "../math/perturb.h"

#include "../common.h"
#include "noising.h"

namespace dx {

// What is written beside x_t: the noise only where it was made, since the caller has his own.
enum class Learned : int64_t { nothing, noise, velocity };

struct Perturbation {
  Batch batch;
  const int64_t* t;      // [B]
  const int64_t* seeds;  // [B], or null where noise is given
  int64_t table_size;    // T+1
  const float* signal;   // [T+1]
  const float* sigma;    // [T+1]
  Learned learned;
};

template <class Kernel>
std::tuple<Tensor, Tensor> perturb(const Tensor& x0_, const Tensor& t_, const Tensor& signal,
                                   const Tensor& sigma, const MaybeTensor& noise_,
                                   const MaybeTensor& seeds_, int64_t learned_) {
  STD_TORCH_CHECK(x0_.dim() >= 1, "x0: wanted shape [B, *]");
  STD_TORCH_CHECK(learned_ >= 0 && learned_ <= 2, "learned: wanted 0, 1 or 2");
  const Learned learned{learned_};
  STD_TORCH_CHECK(noise_.has_value() != seeds_.has_value(), "noise, seeds: wanted one of them");
  if (noise_) check_like("noise", *noise_, x0_);
  const int64_t samples = x0_.size(0);
  const Tensor t = index_vector("t", t_, samples, x0_);
  const MaybeTensor seeds =
      map(seeds_, [&](const Tensor& s) { return index_vector("seeds", s, samples, x0_); });
  STD_TORCH_CHECK(signal.numel() == sigma.numel(), "sigma: wanted signal's size");

  Output x_t(new_like(x0_));
  const bool written = learned == Learned::velocity || (learned == Learned::noise && !noise_);
  Output target(written ? new_like(x0_) : fresh(x0_, {0}));
  const Layout layout = x_t.layout();
  const Tensor x0 = in_layout(x0_, x_t.dense(), layout);
  const MaybeTensor noise =
      map(noise_, [&](const Tensor& z) { return in_layout(z, x_t.dense(), layout); });
  const Perturbation p{Batch(x0, layout),
                       data_of<int64_t>(t),
                       data_of<int64_t>(seeds),
                       signal.numel(),
                       noising_table("signal", signal, x0),
                       noising_table("sigma", sigma, x0),
                       learned};
  const Kernel kernel(x0);
  dispatch_floating(x0.scalar_type(), "perturb", [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    kernel.template run<T>(p, data_of<T>(x0), data_of<T>(noise), x_t.data<T>(),
                           written ? target.data<T>() : nullptr);
  });
  return {x_t.finish(), target.finish()};
}

}  // namespace dx
