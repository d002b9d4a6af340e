// perturb: x_t = signal[t] x0 + sigma[t] z and the training target, in one launch that gathers the
// tables by each sample's t.
#include "../ops/perturb.h"

#include "elementwise.cuh"

namespace dx {
namespace {

template <class T>
struct Perturb {
  Perturbation p;
  const T *x0, *noise;
  T *x_t, *target;

  struct Sample {
    float signal, sigma;
    NoiseKey key;
    bool noisy;
  };
  template <int n>
  struct Inputs {
    Vec<T, n> x0, noise;
  };

  DX_DEVICE Sample sample(int64_t b) const {
    const int64_t t = p.t[b];
    require(t >= 0 && t < p.table_size, "perturb: t out of range");
    Sample sample{p.signal[t], p.sigma[t], {}, noise == nullptr};
    if (sample.noisy) sample.key = {uint64_t(p.seeds[b]), uint32_t(t), kTrainingStream};
    return sample;
  }

  template <int n, bool full>
  DX_DEVICE Inputs<n> read(int64_t at, int count) const {
    Inputs<n> in = {};
    in.x0 = load_pack<n, full>(x0 + at, count);
    if (noise != nullptr) in.noise = load_pack<n, full>(noise + at, count);
    return in;
  }

  template <int n, bool full>
  DX_DEVICE void write(int64_t at, int count, const Sample& sample, const Inputs<n>& in,
                       const float (&made)[n]) const {
    float out[n], learned[n];
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const float x = to_float(in.x0.at[k]);
      const float z = noise != nullptr ? to_float(in.noise.at[k]) : made[k];
      out[k] = perturb_sample(sample.signal, sample.sigma, x, z);
      learned[k] = p.learned == Learned::velocity ? velocity(sample.signal, sample.sigma, x, z) : z;
    }
    store_pack<n, full>(x_t + at, count, out);
    if (target != nullptr) store_pack<n, full>(target + at, count, learned);
  }
};

struct Cuda {
  OnDevice device;
  explicit Cuda(const Tensor& x0) : device(x0) {}

  template <class T>
  void run(const Perturbation& p, const T* x0, const T* noise, T* x_t, T* target) const {
    launch_elementwise<T>("perturb", device, p.batch, Perturb<T>{p, x0, noise, x_t, target},
                          p.seeds != nullptr, x0, noise, x_t, target);
  }
};

}  // namespace

DX_REGISTER_KERNELS(m) { m.impl("perturb", TORCH_BOX(&perturb<Cuda>)); }

}  // namespace dx
