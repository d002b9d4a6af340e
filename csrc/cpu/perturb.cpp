// perturb: x_t = signal[t] x0 + sigma[t] z and the training target, in one pass.
#include "../math/perturb.h"

#include "elementwise.h"

namespace dx {
namespace {

constexpr uint32_t kTrainingStream = 2;

struct Perturbation {
  Batch batch;
  const int64_t* t;      // [B]
  const int64_t* seeds;  // [B], or null where noise is given
  const float* signal;   // [T+1]
  const float* sigma;    // [T+1]
  bool velocity;
};

template <class T>
void run(const Perturbation& p, const T* x0, const T* noise, T* x_t, T* target) {
  for_each_tile(p.batch, [=](int64_t b, int64_t begin, int64_t end, float* scratch) DX_KERNEL {
    const float signal = p.signal[p.t[b]], sigma = p.sigma[p.t[b]];
    const int64_t offset = b * p.batch.per_sample();
    const auto blocks = [&](const auto& noise_block) DX_KERNEL {
      for_each_block(begin, end, [&](int64_t i, int64_t count) DX_KERNEL {
        float x[kBlock], z[kBlock], out[kBlock];
        load(x0 + offset + i, x, count);
        noise_block(i, count, z);
        for (int64_t k = 0; k < count; ++k) out[k] = perturb_sample(signal, sigma, x[k], z[k]);
        store(out, x_t + offset + i, count);
        if (target == nullptr) return;
        if (p.velocity)
          for (int64_t k = 0; k < count; ++k) z[k] = velocity(signal, sigma, x[k], z[k]);
        store(z, target + offset + i, count);
      });
    };
    if (noise != nullptr) {
      blocks([&](int64_t i, int64_t count, float* z)
                 DX_KERNEL { load(noise + offset + i, z, count); });
    } else {
      const NormalKey key{uint64_t(p.seeds[b]), uint32_t(p.t[b]), kTrainingStream};
      const float* tile = tile_normals(key, p.batch, begin, end, scratch);
      blocks([&](int64_t i, int64_t count, float* z)
                 DX_KERNEL { load(tile + (i - begin), z, count); });
    }
  });
}

const float* table(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 1 && t.is_contiguous(), name,
                  ": wanted a contiguous float32 table [T+1]");
  return data_of<float>(t);
}

std::tuple<Tensor, Tensor> perturb(const Tensor& x0_, const Tensor& t_, const Tensor& signal,
                                   const Tensor& sigma, const MaybeTensor& noise_,
                                   const MaybeTensor& seeds_, bool velocity) {
  STD_TORCH_CHECK(x0_.dim() >= 1, "x0: wanted shape [B, *]");
  STD_TORCH_CHECK(noise_.has_value() != seeds_.has_value(), "noise, seeds: wanted one of them");
  if (noise_) check_like("noise", *noise_, x0_);
  const int64_t samples = x0_.size(0);
  const Tensor t = index_vector("t", t_, samples);
  const auto* t_values = data_of<int64_t>(t);
  for (int64_t b = 0; b < samples; ++b)
    STD_TORCH_CHECK(t_values[b] >= 0 && t_values[b] < signal.numel(), "t: wanted from 0 to ",
                    signal.numel() - 1, ", got ", t_values[b]);
  const MaybeTensor seeds =
      map(seeds_, [&](const Tensor& s) { return index_vector("seeds", s, samples); });
  STD_TORCH_CHECK(signal.numel() == sigma.numel(), "sigma: wanted signal's size");

  Output x_t(new_like(x0_));
  const bool written = velocity || !noise_;
  Output target(written ? new_like(x0_) : torch::stable::new_empty(x0_, {0}));
  const Layout layout = x_t.layout();
  const Tensor x0 = in_layout(x0_, x_t.dense(), layout);
  const MaybeTensor noise =
      map(noise_, [&](const Tensor& z) { return in_layout(z, x_t.dense(), layout); });
  const Perturbation p{Batch(x0, layout),       t_values,
                       data_of<int64_t>(seeds), table("signal", signal),
                       table("sigma", sigma),   velocity};
  dispatch_floating(x0.scalar_type(), "perturb", [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    run<T>(p, data_of<T>(x0), data_of<T>(noise), x_t.data<T>(),
           written ? target.data<T>() : nullptr);
  });
  return {x_t.finish(), target.finish()};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(diffusion_ext, CPU, m) { m.impl("perturb", TORCH_BOX(&perturb)); }

}  // namespace dx
