// sampler_step: a row of a sampler's table applied to x [B, *], in one pass over memory.
#include "../math/sampler_step.h"

#include <limits>

#include "elementwise.h"

namespace dx {
namespace {

constexpr uint32_t kSamplerStream = 1;

struct Step {
  Batch batch;
  const StepCoefficients* table;  // [n]
  const int64_t* timesteps;       // [n]
  const int64_t* rows;            // [B], or [1] for all samples
  bool row_per_sample;
  const int64_t* seeds;  // [B] or null
  float limit;           // x0 is clipped to [-limit, limit]
  float guidance;
};

// Every pointer but x, m and out may be null. out may be x.
template <class T>
struct Samples {
  const T *x, *m, *m_cond, *noise, *history;
  T *out, *x0;
};

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

template <class T>
void run(const Step& step, const Samples<T>& s) {
  for_each_tile(step.batch, [=](int64_t b, int64_t begin, int64_t end, float* scratch) DX_KERNEL {
    const int64_t row = step.rows[step.row_per_sample ? b : 0];
    const StepCoefficients c = step.table[row];
    const int64_t offset = b * step.batch.per_sample();
    if (c.az == 0.0f || (step.seeds == nullptr && s.noise == nullptr)) {
      step_tile(step, s, c, offset, begin, end, [](int64_t, int64_t, float*) DX_KERNEL {});
    } else if (s.noise != nullptr) {
      step_tile(step, s, c, offset, begin, end, [&](int64_t i, int64_t count, float* z) DX_KERNEL {
        load(s.noise + offset + i, z, count);
      });
    } else {
      const NormalKey key{uint64_t(step.seeds[b]), uint32_t(step.timesteps[row]), kSamplerStream};
      const float* tile = tile_normals(key, step.batch, begin, end, scratch);
      step_tile(step, s, c, offset, begin, end, [&](int64_t i, int64_t count, float* z) DX_KERNEL {
        load(tile + (i - begin), z, count);
      });
    }
  });
}

// The two halves of model_output [2B, *], or [B, *] and nothing.
std::pair<Tensor, MaybeTensor> halves(const Tensor& model_output, const Tensor& x) {
  check_same_kind("model_output", model_output, x);
  const int64_t samples = x.size(0);
  if (same_sizes(model_output, x)) return {model_output, std::nullopt};
  STD_TORCH_CHECK(model_output.dim() == x.dim() && model_output.size(0) == 2 * samples,
                  "model_output: wanted x's shape, or [2B, *]");
  Tensor both = model_output;
  Tensor uncond = torch::stable::narrow(both, 0, 0, samples);
  Tensor cond = torch::stable::narrow(both, 0, samples, samples);
  STD_TORCH_CHECK(same_sizes(cond, x), "model_output: wanted x's shape, or [2B, *]");
  return {uncond, cond};
}

// Writes x' to out (a tensor of x's shape, or x itself) and the data prediction to x0 if given.
void apply(const Tensor& x_, const Tensor& model_output, const Tensor& coefficients_,
           const Tensor& timesteps_, const Tensor& row_, const MaybeTensor& noise_,
           const MaybeTensor& seeds_, const MaybeTensor& history_, std::optional<double> clip,
           double guidance, Output& out, Output* x0) {
  STD_TORCH_CHECK(x_.dim() >= 1, "x: wanted shape [B, *]");
  const Tensor coefficients = torch::stable::contiguous(coefficients_);
  STD_TORCH_CHECK(coefficients.scalar_type() == ScalarType::Float && coefficients.dim() == 2 &&
                      coefficients.size(1) == kStepColumns,
                  "coefficients: wanted float32 [n, 7]");
  STD_TORCH_CHECK(!noise_ || !seeds_, "noise, seeds: wanted one of them");
  if (noise_) check_like("noise", *noise_, x_);
  if (history_) check_like("history", *history_, x_);
  const int64_t samples = x_.size(0), rows = coefficients.size(0);
  const Tensor timesteps = index_vector("timesteps", timesteps_, rows);
  const Tensor row = index_vector("row", row_, row_.dim() == 0 ? 1 : samples);
  const int64_t* row_values = data_of<int64_t>(row);
  for (int64_t i = 0; i < row.numel(); ++i)
    STD_TORCH_CHECK(row_values[i] >= 0 && row_values[i] < rows, "row: wanted from 0 to ", rows - 1,
                    ", got ", row_values[i]);
  const MaybeTensor seeds =
      map(seeds_, [&](const Tensor& s) { return index_vector("seeds", s, samples); });

  const Layout layout = out.layout();
  const auto laid = [&](const Tensor& t) { return in_layout(t, out.dense(), layout); };
  const Tensor x = laid(x_);
  const auto [uncond, cond] = halves(model_output, x_);
  const Tensor m = laid(uncond);
  const MaybeTensor m_cond = map(cond, laid), noise = map(noise_, laid),
                    history = map(history_, laid);
  const Step step{Batch(x, layout),
                  reinterpret_cast<const StepCoefficients*>(data_of<float>(coefficients)),
                  data_of<int64_t>(timesteps),
                  row_values,
                  row_.dim() != 0,
                  data_of<int64_t>(seeds),
                  clip ? float(*clip) : std::numeric_limits<float>::infinity(),
                  float(guidance)};
  dispatch_floating(x.scalar_type(), "sampler_step", [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    run<T>(step, {data_of<T>(x), data_of<T>(m), data_of<T>(m_cond), data_of<T>(noise),
                  data_of<T>(history), out.data<T>(), x0 ? x0->data<T>() : nullptr});
  });
}

std::tuple<Tensor, Tensor> sampler_step(const Tensor& x, const Tensor& model_output,
                                        const Tensor& coefficients, const Tensor& timesteps,
                                        const Tensor& row, const MaybeTensor& noise,
                                        const MaybeTensor& seeds, const MaybeTensor& history,
                                        std::optional<double> clip, double guidance,
                                        bool return_x0) {
  Output out(new_like(x));
  Output x0(return_x0 ? new_like(x) : torch::stable::new_empty(x, {0}));
  apply(x, model_output, coefficients, timesteps, row, noise, seeds, history, clip, guidance, out,
        return_x0 ? &x0 : nullptr);
  return {out.finish(), x0.finish()};
}

void sampler_step_(const Tensor& x, const Tensor& model_output, const Tensor& coefficients,
                   const Tensor& timesteps, const Tensor& row, const MaybeTensor& noise,
                   const MaybeTensor& seeds, const MaybeTensor& history, std::optional<double> clip,
                   double guidance) {
  Output out(x);
  apply(x, model_output, coefficients, timesteps, row, noise, seeds, history, clip, guidance, out,
        nullptr);
  out.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(diffusion_ext, CPU, m) {
  m.impl("sampler_step", TORCH_BOX(&sampler_step));
  m.impl("sampler_step_", TORCH_BOX(&sampler_step_));
}

}  // namespace dx
