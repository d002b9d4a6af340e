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

// The weights that a block's loop keeps in registers.
struct BlockWeights {
  float kx, km, ax, am, a0, ah, az;
};

// By value: floats that `out` might overwrite would be loaded anew for each element, which took
// four times as long.
template <bool clipped, bool of_x0, bool history, bool noise, bool keeps_x0>
DX_INLINE void step_elements(const BlockWeights w, float limit, const StepBlock b, int64_t count) {
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) {
    const float x = b.x[k], m = b.m[k];
    const float unclipped = predict_x0(w.kx, w.km, x, m);
    const float x0 = clipped ? clip_x0(unclipped, limit) : unclipped;
    float out = combine({w.ax, w.am, w.a0, w.az, nullptr}, of_x0, x, m, x0);
    if (history) out = fma(w.ah, b.history[k], out);
    if (noise) out = fma(w.az, b.noise[k], out);
    b.out[k] = out;
    if constexpr (keeps_x0) b.x0[k] = x0;
  }
}

// A loop for each combination of terms, once for every dtype and source of noise.
void step_block(const BlockWeights& w, float limit, const StepBlock& b, int64_t count) {
  on_best_isa([&]() DX_KERNEL {
    with_constants(
        [&](auto clipped, auto of_x0, auto history, auto noise, auto keeps_x0) DX_KERNEL {
          step_elements<clipped, of_x0, history, noise, keeps_x0>(w, limit, b, count);
        },
        limit < std::numeric_limits<float>::infinity(), w.a0 != 0.0f, b.history != nullptr,
        b.noise != nullptr, b.x0 != nullptr);
  });
}

// sum += weight term
DX_INLINE void add_term(float weight, const float* term, float* sum, int64_t count) {
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) sum[k] = fma(weight, term[k], sum[k]);
}

// Puts a combination of a block's terms in b.out: the first in one pass over memory, the slots,
// which then lie in the first-level cache, in one each.
template <class T>
DX_INLINE void combine_block(const Step& step, const Samples<T>& s, const StepRow& row,
                             const Combination& a, StepBlock b, int64_t at, int64_t count) {
  const float* noise = a.z != 0.0f ? b.noise : nullptr;
  b.history = b.noise = nullptr;
  step_block({row.kx(), row.km(), a.x, a.m, a.x0, 0.0f, 0.0f}, step.limit, b, count);
  float buffer[kBlock];
  for (int j = 0; s.slots != nullptr && j < row.shape.slots; ++j)
    if (a.slots[j] != 0.0f)
      add_term(a.slots[j], view(s.slots + j * s.slot_stride + at, buffer, count), b.out, count);
  if (noise != nullptr) add_term(a.z, noise, b.out, count);
}

// A block of a row with writes, which wait until all that they may overwrite is read. Apart from
// the loop over the blocks: inside it its buffers made steps without slots 5 % slower.
template <class T>
DX_APART void step_slots(const Step& step, const Samples<T>& s, const StepRow& row,
                         const StepBlock& b, int64_t at, int64_t count) {
  on_best_isa([&]() DX_KERNEL {
    float written[kMostWrites][kBlock];
    for (int i = 0; i < row.shape.writes; ++i)
      if (row.slot(i) >= 0)
        combine_block(step, s, row, row.write(i), {b.x, b.m, nullptr, b.noise, written[i], nullptr},
                      at, count);
    combine_block(step, s, row, row.next(), b, at, count);
    for (int i = 0; i < row.shape.writes; ++i)
      if (s.kept != nullptr && row.slot(i) >= 0)
        store(written[i], s.kept + row.slot(i) * s.slot_stride + at, count);
  });
}

// Steps elements [begin, end) of a sample; noise_at(i, count, buffer) is the noise of a block, or
// null.
template <class T, class Noise>
DX_INLINE void step_tile(const Step& step, const Samples<T>& s, const StepRow& row, int64_t offset,
                         int64_t begin, int64_t end, const Noise& noise_at) {
  const Combination next = row.next();
  const BlockWeights w{row.kx(), row.km(), next.x, next.m, next.x0, next.slots[0], next.z};
  const float guidance = row.guidance(step.guidance);
  const bool keeps_x0 = step.shape.keeps_x0(), looks_back = s.slots != nullptr && w.ah != 0.0f;
  for_each_block(begin, end, [&](int64_t i, int64_t count) DX_KERNEL {
    const int64_t at = offset + i;
    float buffers[7][kBlock];
    StepBlock b{view(s.x + at, buffers[0], count),
                view(s.m + at, buffers[1], count),
                nullptr,
                noise_at(i, count, buffers[3]),
                place(s.out + at, buffers[4]),
                s.x0 ? place(s.x0 + at, buffers[5]) : nullptr};
    if (s.m_cond != nullptr) {
      const float* cond = view(s.m_cond + at, buffers[6], count);
      float* guided = buffers[1];
      for (int64_t k = 0; k < count; ++k) guided[k] = guide(b.m[k], cond[k], guidance);
      b.m = guided;
    }
    if (keeps_x0) {
      if (looks_back) b.history = view(s.slots + at, buffers[2], count);
      step_block(w, step.limit, b, count);
    } else {
      step_slots(step, s, row, b, at, count);
    }
    keep(b.out, s.out + at, count);
    if (s.x0 != nullptr) keep(b.x0, s.x0 + at, count);
  });
}

// Throws where a row that is used, or a slot that it writes, is not there.
void check_rows(const Step& step) {
  for (int64_t i = 0; i < (step.row_per_sample ? step.batch.samples : 1); ++i) {
    STD_TORCH_CHECK(step.rows[i] >= 0 && step.rows[i] < step.table_rows, "row: wanted from 0 to ",
                    step.table_rows - 1, ", got ", step.rows[i]);
    for (int write = 0; write < step.shape.writes; ++write)
      STD_TORCH_CHECK(step.row(step.rows[i]).slot(write) < step.shape.slots, "coefficients: row ",
                      step.rows[i], " writes to a slot beyond the ", step.shape.slots,
                      " that are there");
  }
}

struct Cpu {
  explicit Cpu(const Tensor&) {}

  template <class T>
  void run(const Step& step, const Samples<T>& s) const {
    check_rows(step);
    for_each_tile(step.batch, [=](int64_t b, int64_t begin, int64_t end, float* scratch) DX_KERNEL {
      const int64_t index = step.rows[step.row_per_sample ? b : 0];
      const StepRow row = step.row(index);
      const int64_t offset = b * step.batch.per_sample();
      if (!row.noisy() || (step.seeds == nullptr && s.noise == nullptr)) {
        step_tile(step, s, row, offset, begin, end,
                  [](int64_t, int64_t, float*) DX_KERNEL -> const float* { return nullptr; });
      } else if (s.noise != nullptr) {
        step_tile(step, s, row, offset, begin, end,
                  [&](int64_t i, int64_t count, float* z)
                      DX_KERNEL { return view(s.noise + offset + i, z, count); });
      } else {
        const NormalKey key{uint64_t(step.seeds[b]), uint32_t(step.timesteps[index]),
                            kSamplerStream};
        prefetch(s.x + offset + begin, end - begin);
        prefetch(s.m + offset + begin, end - begin);
        const float* tile = tile_normals(key, step.batch, begin, end, scratch);
        step_tile(step, s, row, offset, begin, end,
                  [&](int64_t i, int64_t, float*) DX_KERNEL { return tile + (i - begin); });
      }
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(diffusion_ext, CPU, m) {
  m.impl("sampler_step", TORCH_BOX(&sampler_step<Cpu>));
  m.impl("sampler_step_with_slots", TORCH_BOX(&sampler_step_with_slots<Cpu>));
  m.impl("sampler_step_", TORCH_BOX(&sampler_step_<Cpu>));
}

}  // namespace dx
