// sampler_step as every device sees it: a call is checked, its tensors are laid out alike and
// handed to the device's Kernel(x).run<T>(step, samples).
#pragma once

#include "../math/sampler_step.h"

#include <limits>

#include "../common.h"

namespace dx {

constexpr uint32_t kSamplerStream = 1;

struct Step {
  Batch batch;
  const StepCoefficients* table;  // [n]
  const int64_t* timesteps;       // [n]
  int64_t table_rows;             // n
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

// The two halves of model_output [2B, *], or [B, *] and nothing.
inline std::pair<Tensor, MaybeTensor> halves(const Tensor& model_output, const Tensor& x) {
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
template <class Kernel>
void apply_step(const Tensor& x_, const Tensor& model_output, const Tensor& coefficients_,
                const Tensor& timesteps_, const Tensor& row_, const MaybeTensor& noise_,
                const MaybeTensor& seeds_, const MaybeTensor& history_, std::optional<double> clip,
                double guidance, Output& out, Output* x0) {
  STD_TORCH_CHECK(x_.dim() >= 1, "x: wanted shape [B, *]");
  check_same_device("coefficients", coefficients_, x_);
  const Tensor coefficients = as_contiguous(coefficients_);
  STD_TORCH_CHECK(coefficients.scalar_type() == ScalarType::Float && coefficients.dim() == 2 &&
                      coefficients.size(1) == kStepColumns,
                  "coefficients: wanted float32 [n, 7]");
  STD_TORCH_CHECK(!noise_ || !seeds_, "noise, seeds: wanted one of them");
  if (noise_) check_like("noise", *noise_, x_);
  if (history_) check_like("history", *history_, x_);
  const int64_t samples = x_.size(0), rows = coefficients.size(0);
  const Tensor timesteps = index_vector("timesteps", timesteps_, rows, x_);
  const Tensor row = index_vector("row", row_, row_.dim() == 0 ? 1 : samples, x_);
  const MaybeTensor seeds =
      map(seeds_, [&](const Tensor& s) { return index_vector("seeds", s, samples, x_); });

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
                  rows,
                  data_of<int64_t>(row),
                  row_.dim() != 0,
                  data_of<int64_t>(seeds),
                  clip ? float(*clip) : std::numeric_limits<float>::infinity(),
                  float(guidance)};
  const Kernel kernel(x);
  dispatch_floating(x.scalar_type(), "sampler_step", [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    kernel.template run<T>(step,
                           {data_of<T>(x), data_of<T>(m), data_of<T>(m_cond), data_of<T>(noise),
                            data_of<T>(history), out.data<T>(), x0 ? x0->data<T>() : nullptr});
  });
}

template <class Kernel>
std::tuple<Tensor, Tensor> sampler_step(const Tensor& x, const Tensor& model_output,
                                        const Tensor& coefficients, const Tensor& timesteps,
                                        const Tensor& row, const MaybeTensor& noise,
                                        const MaybeTensor& seeds, const MaybeTensor& history,
                                        std::optional<double> clip, double guidance,
                                        bool return_x0) {
  Output out(new_like(x));
  Output x0(return_x0 ? new_like(x) : fresh(x, {0}));
  apply_step<Kernel>(x, model_output, coefficients, timesteps, row, noise, seeds, history, clip,
                     guidance, out, return_x0 ? &x0 : nullptr);
  return {out.finish(), x0.finish()};
}

// In place; history, read as the data prediction of the step before, becomes that of this one.
template <class Kernel>
void sampler_step_(const Tensor& x, const Tensor& model_output, const Tensor& coefficients,
                   const Tensor& timesteps, const Tensor& row, const MaybeTensor& noise,
                   const MaybeTensor& seeds, const MaybeTensor& history, std::optional<double> clip,
                   double guidance) {
  Output out(x);
  std::optional<Output> x0;
  if (history) {
    STD_TORCH_CHECK(fits(*history, out.layout()), "history: wanted x's memory layout");
    x0.emplace(*history, out.layout());
  }
  apply_step<Kernel>(x, model_output, coefficients, timesteps, row, noise, seeds, history, clip,
                     guidance, out, x0 ? &*x0 : nullptr);
  out.finish();
}

}  // namespace dx
