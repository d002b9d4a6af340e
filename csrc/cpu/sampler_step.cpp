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

// A term of a combination beyond x and m, with its weight.
struct Term {
  float weight;
  const float* values;
};
constexpr int kMostTerms = 2 + kMostSlots;  // x0, the slots and the noise, added in this order

struct Terms {
  Term at[kMostTerms];
  int count = 0;

  // A weight of 0 reads nothing, nor does a term that is not there.
  DX_INLINE void add(float weight, const float* values) {
    if (weight != 0.0f && values != nullptr) at[count++] = {weight, values};
  }
};

// out = ax x + am m + the n terms, in one pass.
template <int n = 0>
DX_INLINE void sum_terms(float ax, float am, const float* x, const float* m, const Terms& terms,
                         float* out, int64_t count) {
  if constexpr (n < kMostTerms)
    if (n < terms.count) return sum_terms<n + 1>(ax, am, x, m, terms, out, count);
  float weights[n + 1];
  const float* values[n + 1];
  for (int j = 0; j < n; ++j) weights[j] = terms.at[j].weight, values[j] = terms.at[j].values;
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) {
    float sum = fma(ax, x[k], am * m[k]);
    for (int j = 0; j < n; ++j) sum = fma(weights[j], values[j][k], sum);
    out[k] = sum;
  }
}

// A block of a row with slots or writes. The writes wait until all that they may overwrite is read.
// Apart from the loop over the blocks: inside it its buffers made steps without slots 5 % slower.
template <class T>
DX_APART void step_slots(const Step& step, const Samples<T>& s, const StepRow& row,
                         const StepBlock& b, int64_t at, int64_t count) {
  on_best_isa([&]() DX_KERNEL {
    float x0_buffer[kBlock], buffers[kMostSlots][kBlock], written[kMostWrites][kBlock];
    float* x0 = b.x0 != nullptr ? b.x0 : x0_buffer;
    const float limit = step.limit, kx = row.kx(), km = row.km();
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) x0[k] = clip_x0(predict_x0(kx, km, b.x[k], b.m[k]), limit);
    const float* slots[kMostSlots] = {};
    const auto put = [&](const Combination& a, float* out) DX_KERNEL {
      Terms terms;
      terms.add(a.x0, x0);
      for (int j = 0; j < row.shape.slots; ++j) {
        if (a.slots[j] != 0.0f && s.slots[j] != nullptr && slots[j] == nullptr)
          slots[j] = view(s.slots[j] + at, buffers[j], count);
        terms.add(a.slots[j], slots[j]);
      }
      terms.add(a.z, b.noise);
      sum_terms(a.x, a.m, b.x, b.m, terms, out, count);
    };
    for (int i = 0; i < row.shape.writes; ++i)
      if (s.target(row, i) != nullptr) put(row.write(i), written[i]);
    put(row.next(), b.out);
    for (int i = 0; i < row.shape.writes; ++i)
      if (T* to = s.target(row, i); to != nullptr) store(written[i], to + at, count);
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
  const bool keeps_x0 = step.shape.keeps_x0(), looks_back = s.slots[0] != nullptr && w.ah != 0.0f;
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
      if (looks_back) b.history = view(s.slots[0] + at, buffers[2], count);
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
    const int64_t index = step.index(i);
    STD_TORCH_CHECK(index >= 0 && index < step.table_rows, "row: wanted from 0 to ",
                    step.table_rows - 1, ", got ", index);
    for (int write = 0; write < step.shape.writes; ++write)
      STD_TORCH_CHECK(step.row(index).slot(write) < step.shape.slots, "coefficients: row ", index,
                      " writes to a slot beyond the ", step.shape.slots, " that are there");
  }
}

struct Cpu {
  explicit Cpu(const Tensor&) {}

  template <class T>
  void run(const Step& step, const Samples<T>& s) const {
    check_rows(step);
    for_each_tile(step.batch, [=](int64_t b, int64_t begin, int64_t end, float* scratch) DX_KERNEL {
      const int64_t index = step.index(b);
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
        const NormalKey key{uint64_t(step.seeds[b]), step.timestep_of(index), kSamplerStream};
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
  m.impl("sampler_step_of_row", TORCH_BOX(&sampler_step_of_row<Cpu>));
  m.impl("sampler_step_with_slots", TORCH_BOX(&sampler_step_with_slots<Cpu>));
  m.impl("sampler_step_", TORCH_BOX(&sampler_step_<Cpu>));
}

}  // namespace dx
