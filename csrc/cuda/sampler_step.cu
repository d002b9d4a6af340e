// sampler_step: a row of a sampler's table applied to x [B, *] in one launch, which reads every
// input once, a slot once for each combination that wants it. The row's index and the table stay on
// the device.
#include "../ops/sampler_step.h"

#include "elementwise.cuh"

namespace dx {
namespace {

// `with_slots`: rows of several slots or of writes; else a row's one slot is read with x, and x0
// may go where it lies.
template <class T, bool with_slots>
struct SamplerStep {
  Step step;
  Samples<T> s;

  struct Sample {
    StepRow row;
    NoiseKey key;
    bool noisy;  // noise is made here
  };
  template <int n>
  struct Inputs {
    Vec<T, n> x, m, cond, noise, history;
  };

  DX_DEVICE Sample sample(int64_t b) const {
    const int64_t index = step.index(b);
    require(index >= 0 && index < step.table_rows, "sampler_step: row out of range");
    Sample sample{step.row(index), {}, false};
    if (step.seeds != nullptr && sample.row.noisy()) {
      sample.key = {uint64_t(step.seeds[b]), step.timestep_of(index), kSamplerStream};
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
    if (!with_slots && s.slots[0] != nullptr)
      in.history = load_pack<n, full>(s.slots[0] + at, count);
    return in;
  }

  template <int n, bool full>
  DX_DEVICE void write(int64_t at, int count, const Sample& sample, const Inputs<n>& in,
                       const float (&made)[n]) const {
    const StepRow& row = sample.row;
    const float kx = row.kx(), km = row.km(), guidance = row.guidance(step.guidance);
    float x[n], m[n], x0[n], z[n];
#pragma unroll
    for (int k = 0; k < n; ++k) {
      x[k] = to_float(in.x.at[k]);
      m[k] = to_float(in.m.at[k]);
      if (s.m_cond != nullptr) m[k] = guide(m[k], to_float(in.cond.at[k]), guidance);
      x0[k] = clip_x0(predict_x0(kx, km, x[k], m[k]), step.limit);
      z[k] = s.noise != nullptr ? to_float(in.noise.at[k]) : made[k];
    }
    const bool noisy = s.noise != nullptr || sample.noisy;
    float out[n];
    if constexpr (with_slots) {
      float written[kMostWrites][n];
#pragma unroll
      for (int i = 0; i < kMostWrites; ++i)
        if (i < row.shape.writes && s.target(row, i) != nullptr)
          sum<n, full>(at, count, row.write(i), x, m, x0, z, noisy, written[i]);
      sum<n, full>(at, count, row.next(), x, m, x0, z, noisy, out);
#pragma unroll
      for (int i = 0; i < kMostWrites; ++i)
        if (i < row.shape.writes && s.target(row, i) != nullptr) {
          require(row.slot(i) < row.shape.slots, "sampler_step: slot out of range");
          store_pack<n, full>(s.target(row, i) + at, count, written[i]);
        }
    } else {
      const Combination a = row.next();
      const float history = a.slots[0];
#pragma unroll
      for (int k = 0; k < n; ++k) {
        out[k] = combine(a, a.x0 != 0.0f, x[k], m[k], x0[k]);
        if (s.slots[0] != nullptr && history != 0.0f)
          out[k] = fma(history, to_float(in.history.at[k]), out[k]);
        if (noisy && a.z != 0.0f) out[k] = fma(a.z, z[k], out[k]);
      }
    }
    store_pack<n, full>(s.out + at, count, out);
    if (s.x0 != nullptr) store_pack<n, full>(s.x0 + at, count, x0);
  }

 private:
  // A combination of a pack's terms; the slots with a weight are read anew, from the first cache.
  template <int n, bool full>
  DX_DEVICE void sum(int64_t at, int count, const Combination& a, const float (&x)[n],
                     const float (&m)[n], const float (&x0)[n], const float (&z)[n], bool noisy,
                     float (&out)[n]) const {
#pragma unroll
    for (int k = 0; k < n; ++k) out[k] = combine(a, a.x0 != 0.0f, x[k], m[k], x0[k]);
#pragma unroll
    for (int j = 0; j < kMostSlots; ++j) {
      if (j >= step.shape.slots || s.slots[j] == nullptr || a.slots[j] == 0.0f) continue;
      const float weight = a.slots[j];
      const Vec<T, n> slot = load_pack<n, full>(s.slots[j] + at, count);
#pragma unroll
      for (int k = 0; k < n; ++k) out[k] = fma(weight, to_float(slot.at[k]), out[k]);
    }
    if (noisy && a.z != 0.0f)
#pragma unroll
      for (int k = 0; k < n; ++k) out[k] = fma(a.z, z[k], out[k]);
  }
};

struct Cuda {
  OnDevice device;
  explicit Cuda(const Tensor& x) : device(x) {}

  template <class T>
  void run(const Step& step, const Samples<T>& s) const {
    if (step.shape.keeps_x0())
      launch_step(step, s, SamplerStep<T, false>{step, s});
    else
      launch_step(step, s, SamplerStep<T, true>{step, s});
  }

  template <class T, class Op>
  void launch_step(const Step& step, const Samples<T>& s, const Op& op) const {
    static_assert(kMostSlots == 6 && kMostWrites == 2);
    launch_elementwise<T>("sampler_step", device, step.batch, op, step.seeds != nullptr, s.x, s.m,
                          s.m_cond, s.noise, s.out, s.x0, s.slots[0], s.slots[1], s.slots[2],
                          s.slots[3], s.slots[4], s.slots[5], s.written[0], s.written[1]);
  }
};

}  // namespace

DX_REGISTER_KERNELS(m) {
  m.impl("sampler_step", TORCH_BOX(&sampler_step<Cuda>));
  m.impl("sampler_step_of_row", TORCH_BOX(&sampler_step_of_row<Cuda>));
  m.impl("sampler_step_with_slots", TORCH_BOX(&sampler_step_with_slots<Cuda>));
  m.impl("sampler_step_", TORCH_BOX(&sampler_step_<Cuda>));
}

}  // namespace dx
