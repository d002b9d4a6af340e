// sampler_step: a row of a sampler's table applied to x [B, *] in one launch, which reads every
// input once. The row's index and the table stay on the device.
#include "../ops/sampler_step.h"

#include "elementwise.cuh"

namespace dx {
namespace {

template <class T>
struct SamplerStep {
  Step step;
  Samples<T> s;

  struct Sample {
    StepCoefficients c;
    NoiseKey key;
    bool noisy;  // noise is made here
  };
  template <int n>
  struct Inputs {
    Vec<T, n> x, m, cond, noise, history;
  };

  DX_DEVICE Sample sample(int64_t b) const {
    const int64_t row = step.rows[step.row_per_sample ? b : 0];
    require(row >= 0 && row < step.table_rows, "sampler_step: row out of range");
    Sample sample{step.table[row], {}, false};
    if (step.seeds != nullptr && sample.c.az != 0.0f) {
      sample.key = {uint64_t(step.seeds[b]), uint32_t(step.timesteps[row]), kSamplerStream};
      sample.noisy = true;
    }
    return sample;
  }

  template <int n, bool full>
  DX_DEVICE Inputs<n> read(int64_t at, int count) const {
    Inputs<n> in = {};
    in.x = load_pack<n, full>(s.x + at, count);
    in.m = load_pack<n, full>(s.m + at, count);
    if (s.m_cond != nullptr) in.cond = load_pack<n, full>(s.m_cond + at, count);
    if (s.noise != nullptr) in.noise = load_pack<n, full>(s.noise + at, count);
    if (s.history != nullptr) in.history = load_pack<n, full>(s.history + at, count);
    return in;
  }

  template <int n, bool full>
  DX_DEVICE void write(int64_t at, int count, const Sample& sample, const Inputs<n>& in,
                       const float (&made)[n]) const {
    const StepCoefficients& c = sample.c;
    const bool given = s.noise != nullptr && c.az != 0.0f;  // where az is 0, z does not matter
    const StepTerms terms{c.a0 != 0.0f, s.history != nullptr, given || sample.noisy};
    float out[n], x0[n];
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const float x = to_float(in.x.at[k]);
      float m = to_float(in.m.at[k]);
      if (s.m_cond != nullptr) m = guide(m, to_float(in.cond.at[k]), step.guidance);
      x0[k] = clip_x0(predict_x0(c, x, m), step.limit);
      const float z = given ? to_float(in.noise.at[k]) : made[k];
      out[k] = step_sample(c, terms, x, m, x0[k], to_float(in.history.at[k]), z);
    }
    store_pack<n, full>(s.out + at, count, out);
    if (s.x0 != nullptr) store_pack<n, full>(s.x0 + at, count, x0);
  }
};

struct Cuda {
  OnDevice device;
  explicit Cuda(const Tensor& x) : device(x) {}

  template <class T>
  void run(const Step& step, const Samples<T>& s) const {
    launch_elementwise<T>("sampler_step", device, step.batch, SamplerStep<T>{step, s},
                          step.seeds != nullptr,
                          {s.x, s.m, s.m_cond, s.noise, s.history, s.out, s.x0});
  }
};

}  // namespace

DX_REGISTER_KERNELS(m) {
  m.impl("sampler_step", TORCH_BOX(&sampler_step<Cuda>));
  m.impl("sampler_step_", TORCH_BOX(&sampler_step_<Cuda>));
}

}  // namespace dx
