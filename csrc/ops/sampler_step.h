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
  const float* table;  // [n, shape.width()]
  RowShape shape;
  const int64_t* timesteps;  // [n]
  int64_t table_rows;        // n
  const int64_t* rows;       // [B], or [1] for all samples
  bool row_per_sample;
  const int64_t* seeds;  // [B] or null
  float limit;           // x0 is clipped to [-limit, limit]
  float guidance;        // of rows that have none of their own

  DX_INLINE StepRow row(int64_t index) const { return {table + index * shape.width(), shape}; }
};

// Every pointer but x, m and out may be null. out may be x. The slots, which are read at `slots`
// and written at `kept`, are slot_stride elements apart.
template <class T>
struct Samples {
  const T *x, *m, *m_cond, *noise, *slots;
  T *out, *x0, *kept;
  int64_t slot_stride;
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

// What a call remembers: slots [S, B, *], each laid out as its samples, or the one slot [B, *]. A
// kernel writes to them, or to a copy that is written back. `history` [B, *] is a slot that is only
// read.
class Slots {
 public:
  Slots(const MaybeTensor& history, const MaybeTensor& slots, const Tensor& x, const Output& out)
      : slots_(slots), dense_(slots) {
    if (history) {
      check_like("history", *history, x);
      dense_ = in_layout(*history, out.dense(), out.layout());
    }
    if (!slots) return;
    const bool alone = slots->dim() == x.dim();
    const auto sizes = slots->sizes().slice(alone ? 0 : 1);
    const auto strides = slots->strides().slice(alone ? 0 : 1);
    if (!alone && slots->dim() > 0) count_ = slots->size(0);
    STD_TORCH_CHECK(same_sizes(sizes, x.sizes()) && count_ >= 1 && count_ <= kMostSlots,
                    "slots: wanted shape [S, *x.shape], S from 1 to ", kMostSlots);
    check_same_kind("slots", *slots, x);
    direct_ = fits(sizes, strides, out.layout());
    stride_ = direct_ && !alone ? slots->stride(0) : x.numel();
    if (direct_) return;
    std::vector<int64_t> dense(alone ? 0 : 1, stride_);
    for (const int64_t stride : out.dense().strides()) dense.push_back(stride);
    dense_ = fresh_strided(*slots, slots->sizes(), dense, dtype_of(*slots));
    torch::stable::copy_(*dense_, *slots);
  }

  int count() const { return int(count_); }
  int64_t stride() const { return stride_; }
  template <class T>
  const T* read() const {
    return data_of<T>(dense_);
  }
  template <class T>
  T* kept() const {
    return slots_ ? static_cast<T*>(dense_->mutable_data_ptr()) : nullptr;
  }
  // Writes back; x0 [B, *] goes to the slot first, where that has not been written.
  void finish(const Tensor* x0) {
    if (x0 != nullptr) torch::stable::copy_(*dense_, *x0);
    if (!direct_) torch::stable::copy_(*slots_, *dense_);
  }

 private:
  MaybeTensor slots_, dense_;
  int64_t count_ = 1, stride_ = 0;
  bool direct_ = true;
};

// The shape of a table's rows by its columns and the slots.
inline RowShape shape_of(int64_t columns, int slots) {
  const int64_t of_writes = columns - RowShape{slots, 0, false}.width(), of_write = 5 + slots;
  const RowShape shape{slots, int(of_writes / of_write), of_writes % of_write == 1};
  STD_TORCH_CHECK(of_writes >= 0 && shape.writes <= kMostWrites && shape.width() == columns,
                  "coefficients: no row of ", slots, " slots has ", columns, " columns");
  return shape;
}

// Writes x' to out (a tensor of x's shape, or x itself) and the data prediction to x0 if given.
template <class Kernel>
void apply_step(const Tensor& x_, const Tensor& model_output, const Tensor& coefficients_,
                const Tensor& timesteps_, const Tensor& row_, const MaybeTensor& noise_,
                const MaybeTensor& seeds_, Slots&& slots, std::optional<double> clip,
                double guidance, Output& out, Output* x0) {
  STD_TORCH_CHECK(x_.dim() >= 1, "x: wanted shape [B, *]");
  check_same_device("coefficients", coefficients_, x_);
  const Tensor coefficients = as_contiguous(coefficients_);
  STD_TORCH_CHECK(coefficients.scalar_type() == ScalarType::Float && coefficients.dim() == 2,
                  "coefficients: wanted float32 [n, columns]");
  const RowShape shape = shape_of(coefficients.size(1), slots.count());
  STD_TORCH_CHECK(!noise_ || !seeds_, "noise, seeds: wanted one of them");
  if (noise_) check_like("noise", *noise_, x_);
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
  const MaybeTensor m_cond = map(cond, laid), noise = map(noise_, laid);
  const Step step{Batch(x, layout),
                  data_of<float>(coefficients),
                  shape,
                  data_of<int64_t>(timesteps),
                  rows,
                  data_of<int64_t>(row),
                  row_.dim() != 0,
                  data_of<int64_t>(seeds),
                  clip ? float(*clip) : std::numeric_limits<float>::infinity(),
                  float(guidance)};
  const Kernel kernel(x);
  bool x0_to_slot = false;
  dispatch_floating(x.scalar_type(), "sampler_step", [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    T *kept = slots.template kept<T>(), *predicted = x0 ? x0->data<T>() : nullptr;
    if (kept != nullptr && shape.keeps_x0()) {  // the slot receives x0
      x0_to_slot = predicted != nullptr;
      predicted = x0_to_slot ? predicted : kept;
      kept = nullptr;
    }
    kernel.template run<T>(
        step, {data_of<T>(x), data_of<T>(m), data_of<T>(m_cond), data_of<T>(noise),
               slots.template read<T>(), out.data<T>(), predicted, kept, slots.stride()});
  });
  slots.finish(x0_to_slot ? &x0->dense() : nullptr);
}

using StepAndX0 = std::tuple<Tensor, Tensor>;

// x' in a tensor of its own. history is read; slots are updated in place.
template <class Kernel>
StepAndX0 step_apart(const Tensor& x, const Tensor& model_output, const Tensor& coefficients,
                     const Tensor& timesteps, const Tensor& row, const MaybeTensor& noise,
                     const MaybeTensor& seeds, const MaybeTensor& history, const MaybeTensor& slots,
                     std::optional<double> clip, double guidance, bool return_x0) {
  Output out(new_like(x));
  Output x0(return_x0 ? new_like(x) : fresh(x, {0}));
  apply_step<Kernel>(x, model_output, coefficients, timesteps, row, noise, seeds,
                     Slots(history, slots, x, out), clip, guidance, out, return_x0 ? &x0 : nullptr);
  return {out.finish(), x0.finish()};
}

template <class Kernel>
StepAndX0 sampler_step(const Tensor& x, const Tensor& model_output, const Tensor& coefficients,
                       const Tensor& timesteps, const Tensor& row, const MaybeTensor& noise,
                       const MaybeTensor& seeds, const MaybeTensor& history,
                       std::optional<double> clip, double guidance, bool return_x0) {
  return step_apart<Kernel>(x, model_output, coefficients, timesteps, row, noise, seeds, history,
                            std::nullopt, clip, guidance, return_x0);
}

template <class Kernel>
StepAndX0 sampler_step_with_slots(const Tensor& x, const Tensor& model_output,
                                  const Tensor& coefficients, const Tensor& timesteps,
                                  const Tensor& row, const MaybeTensor& noise,
                                  const MaybeTensor& seeds, const Tensor& slots,
                                  std::optional<double> clip, double guidance, bool return_x0) {
  STD_TORCH_CHECK(slots.dim() == x.dim() + 1, "slots: wanted shape [S, *x.shape]");
  return step_apart<Kernel>(x, model_output, coefficients, timesteps, row, noise, seeds,
                            std::nullopt, slots, clip, guidance, return_x0);
}

// In place, the slots too.
template <class Kernel>
void sampler_step_(const Tensor& x, const Tensor& model_output, const Tensor& coefficients,
                   const Tensor& timesteps, const Tensor& row, const MaybeTensor& noise,
                   const MaybeTensor& seeds, const MaybeTensor& slots, std::optional<double> clip,
                   double guidance) {
  Output out(x);
  apply_step<Kernel>(x, model_output, coefficients, timesteps, row, noise, seeds,
                     Slots(std::nullopt, slots, x, out), clip, guidance, out, nullptr);
  out.finish();
}

}  // namespace dx
