// sampler_step: a row of a sampler's table applied to x [B, *], in one pass over memory.
#include "../ops/sampler_step.h"

#include "elementwise.h"

namespace dx {
namespace {

// The float32 of a block. What is not there is null; out may be x, and x0 history.
struct StepBlock {
  const float *x, *m, *history, *noise;
  float *out, *x0;
};

// By value: floats that `out` might overwrite would be loaded anew for each element, which took
// four times as long.
template <bool clipped, bool of_x0, bool history, bool noise, bool keeps_x0>
DX_INLINE void step_elements(const StepCoefficients c, float limit, const StepBlock b,
                             int64_t count) {
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) {
    const float x = b.x[k], m = b.m[k];
    const float unclipped = predict_x0(c, x, m);
    const float x0 = clipped ? clip_x0(unclipped, limit) : unclipped;
    const float h = history ? b.history[k] : 0.0f, z = noise ? b.noise[k] : 0.0f;
    b.out[k] = step_sample(c, {of_x0, history, noise}, x, m, x0, h, z);
    if constexpr (keeps_x0) b.x0[k] = x0;
  }
}

// A loop for each combination of terms, once for every dtype and source of noise.
void step_block(const StepCoefficients& c, float limit, const StepBlock& b, int64_t count) {
  on_best_isa([&]() DX_KERNEL {
    with_constants(
        [&](auto clipped, auto of_x0, auto history, auto noise, auto keeps_x0) DX_KERNEL {
          step_elements<clipped, of_x0, history, noise, keeps_x0>(c, limit, b, count);
        },
        limit < std::numeric_limits<float>::infinity(), c.a0 != 0.0f, b.history != nullptr,
        b.noise != nullptr, b.x0 != nullptr);
  });
}

// Steps elements [begin, end) of a sample; noise_at(i, count, buffer) is the noise of a block, or
// null.
template <class T, class Noise>
DX_INLINE void step_tile(const Step& step, const Samples<T>& s, const StepCoefficients& c,
                         int64_t offset, int64_t begin, int64_t end, const Noise& noise_at) {
  for_each_block(begin, end, [&](int64_t i, int64_t count) DX_KERNEL {
    const int64_t at = offset + i;
    float buffers[7][kBlock];
    StepBlock b{view(s.x + at, buffers[0], count),
                view(s.m + at, buffers[1], count),
                s.history ? view(s.history + at, buffers[2], count) : nullptr,
                noise_at(i, count, buffers[3]),
                place(s.out + at, buffers[4]),
                s.x0 ? place(s.x0 + at, buffers[5]) : nullptr};
    if (s.m_cond != nullptr) {
      const float* cond = view(s.m_cond + at, buffers[6], count);
      float* guided = buffers[1];
      for (int64_t k = 0; k < count; ++k) guided[k] = guide(b.m[k], cond[k], step.guidance);
      b.m = guided;
    }
    step_block(c, step.limit, b, count);
    keep(b.out, s.out + at, count);
    if (s.x0 != nullptr) keep(b.x0, s.x0 + at, count);
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
        step_tile(step, s, c, offset, begin, end,
                  [](int64_t, int64_t, float*) DX_KERNEL -> const float* { return nullptr; });
      } else if (s.noise != nullptr) {
        step_tile(step, s, c, offset, begin, end,
                  [&](int64_t i, int64_t count, float* z)
                      DX_KERNEL { return view(s.noise + offset + i, z, count); });
      } else {
        const NormalKey key{uint64_t(step.seeds[b]), uint32_t(step.timesteps[row]), kSamplerStream};
        prefetch(s.x + offset + begin, end - begin);
        prefetch(s.m + offset + begin, end - begin);
        const float* tile = tile_normals(key, step.batch, begin, end, scratch);
        step_tile(step, s, c, offset, begin, end,
                  [&](int64_t i, int64_t, float*) DX_KERNEL { return tile + (i - begin); });
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
