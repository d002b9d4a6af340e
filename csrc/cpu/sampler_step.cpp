// sampler_step: a row of a sampler's table applied to x [B, *], in one pass over memory.
#include "../ops/sampler_step.h"

#include "elementwise.h"

namespace dx {
namespace {

template <class T, class Noise>
DX_INLINE void step_tile(const Step& step, const Samples<T>& s, const StepCoefficients& c,
                         int64_t offset, int64_t begin, int64_t end, const Noise& noise) {
  for_each_block(begin, end, [&](int64_t i, int64_t count) DX_KERNEL {
    const int64_t at = offset + i;
    float x[kBlock], m[kBlock], x0[kBlock], h[kBlock] = {}, z[kBlock] = {};
    load(s.x + at, x, count);
    load(s.m + at, m, count);
    if (s.m_cond != nullptr) {
      float cond[kBlock];
      load(s.m_cond + at, cond, count);
      for (int64_t k = 0; k < count; ++k) m[k] = guide(m[k], cond[k], step.guidance);
    }
    if (s.history != nullptr) load(s.history + at, h, count);
    noise(i, count, z);
    for (int64_t k = 0; k < count; ++k) x0[k] = predict_x0(c, x[k], m[k], step.limit);
    for (int64_t k = 0; k < count; ++k) x[k] = step_sample(c, x[k], m[k], x0[k], h[k], z[k]);
    store(x, s.out + at, count);
    if (s.x0 != nullptr) store(x0, s.x0 + at, count);
  });
}

struct Cpu {
  explicit Cpu(const Tensor&) {}

  template <class T>
  void run(const Step& step, const Samples<T>& s) const {
    for (int64_t i = 0; i < (step.row_per_sample ? step.batch.samples : 1); ++i)
      STD_TORCH_CHECK(step.rows[i] >= 0 && step.rows[i] < step.table_rows, "row: wanted from 0 to ",
                      step.table_rows - 1, ", got ", step.rows[i]);
    for_each_tile(step.batch, [=](int64_t b, int64_t begin, int64_t end, float* scratch) DX_KERNEL {
      const int64_t row = step.rows[step.row_per_sample ? b : 0];
      const StepCoefficients c = step.table[row];
      const int64_t offset = b * step.batch.per_sample();
      if (c.az == 0.0f || (step.seeds == nullptr && s.noise == nullptr)) {
        step_tile(step, s, c, offset, begin, end, [](int64_t, int64_t, float*) DX_KERNEL {});
      } else if (s.noise != nullptr) {
        step_tile(step, s, c, offset, begin, end,
                  [&](int64_t i, int64_t count, float* z)
                      DX_KERNEL { load(s.noise + offset + i, z, count); });
      } else {
        const NormalKey key{uint64_t(step.seeds[b]), uint32_t(step.timesteps[row]), kSamplerStream};
        const float* tile = tile_normals(key, step.batch, begin, end, scratch);
        step_tile(step, s, c, offset, begin, end,
                  [&](int64_t i, int64_t count, float* z)
                      DX_KERNEL { load(tile + (i - begin), z, count); });
      }
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(diffusion_ext, CPU, m) {
  m.impl("sampler_step", TORCH_BOX(&sampler_step<Cpu>));
  m.impl("sampler_step_", TORCH_BOX(&sampler_step_<Cpu>));
}

}  // namespace dx
