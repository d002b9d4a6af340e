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
  int64_t table_rows;        // n
  const int64_t* timesteps;  // [n], or null: all of them are `timestep`
  int64_t timestep;
  const int64_t* rows;  // [B], or [1] for all samples, or null: the first for all
  bool row_per_sample;
  const int64_t* seeds;  // [B] or null
  float limit;           // x0 is clipped to [-limit, limit]
  float guidance;        // of rows that have none of their own

  DX_INLINE StepRow row(int64_t index) const { return {table + index * shape.width(), shape}; }
  DX_INLINE int64_t index(int64_t sample) const {
    return rows == nullptr ? 0 : rows[row_per_sample ? sample : 0];
  }
  DX_INLINE uint32_t timestep_of(int64_t index) const {
    return uint32_t(timesteps == nullptr ? timestep : timesteps[index]);
  }
};

// Every pointer but x, m and out may be null. out may be x. Each write of a row has a tensor of its
// own, or goes into a slot; these are then slot_stride elements apart, from `kept` on.
template <class T>
struct Samples {
  const T *x, *m, *m_cond, *noise;
  T *out, *x0;
  const T* slots[kMostSlots];
  T* written[kMostWrites];
  T* kept;
  int64_t slot_stride;

  // Where write i of a row goes, or null.
  DX_INLINE T* target(const StepRow& row, int i) const {
    if (written[i] != nullptr) return written[i];
    const int slot = row.slot(i);
    return kept != nullptr && slot >= 0 ? kept + slot * slot_stride : nullptr;
  }
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

// The shape of a table's rows by its columns and the slots.
inline RowShape shape_of(int64_t columns, int slots) {
  const int64_t of_writes = columns - RowShape{slots, 0, false}.width(), of_write = 5 + slots;
  const RowShape shape{slots, int(of_writes / of_write), of_writes % of_write == 1};
  STD_TORCH_CHECK(of_writes >= 0 && shape.writes <= kMostWrites && shape.width() == columns,
                  "coefficients: no row of ", slots, " slots has ", columns, " columns");
  return shape;
}

// What a call remembers in one tensor: slots [S, B, *], each laid out as its samples, or the one
// slot [B, *]. A kernel writes to them, or to a copy that is written back.
class Slots {
 public:
  Slots(const MaybeTensor& slots, const Tensor& x, const Output& out)
      : slots_(slots), dense_(slots) {
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

  RowShape row_shape(int64_t columns) const { return shape_of(columns, int(count_)); }
  template <class T>
  void place(Samples<T>& s) const {
    if (!dense_) return;
    s.kept = static_cast<T*>(dense_->mutable_data_ptr());
    s.slot_stride = stride_;
    for (int64_t j = 0; j < count_; ++j) s.slots[j] = s.kept + j * stride_;
  }
  // Writes back; x0 [B, *] goes to the slot first, where that has not been written.
  void finish(const Tensor* x0) {
    if (!dense_) return;
    if (x0 != nullptr) torch::stable::copy_(*dense_, *x0);
    if (!direct_) torch::stable::copy_(*slots_, *dense_);
  }

 private:
  MaybeTensor slots_, dense_;
  int64_t count_ = 1, stride_ = 0;
  bool direct_ = true;
};

// What a call remembers in a tensor [B, *] for each slot, which are read; what its row writes goes
// into new ones.
class SlotsApart {
 public:
  SlotsApart(const char* name, const std::vector<Tensor>& slots, const Tensor& x, const Output& out)
      : x_(x) {
    STD_TORCH_CHECK(slots.size() <= size_t(kMostSlots), name, ": wanted at most ", kMostSlots);
    dense_.reserve(slots.size());
    for (const Tensor& slot : slots) {
      check_like(name, slot, x);
      dense_.push_back(in_layout(slot, out.dense(), out.layout()));
    }
  }

  RowShape row_shape(int64_t columns) {
    const RowShape shape = shape_of(columns, std::max(1, int(dense_.size())));
    for (int i = 0; i < shape.writes; ++i) written_.emplace_back(new_like(x_));
    return shape;
  }
  template <class T>
  void place(Samples<T>& s) const {
    for (size_t j = 0; j < dense_.size(); ++j) s.slots[j] = data_of<T>(dense_[j]);
    for (size_t i = 0; i < written_.size(); ++i) s.written[i] = written_[i].data<T>();
  }
  void finish(const Tensor*) {
    for (Output& output : written_) output.finish();
  }
  const std::vector<Output>& written() const { return written_; }

 private:
  Tensor x_;
  std::vector<Tensor> dense_;
  std::vector<Output> written_;  // each lies as x' does
};

// The rows of a step as tensors: a table [n, columns] with its timesteps [n] and the index of each
// sample's row, or one row [columns] for all samples and its timestep.
struct Rows {
  Tensor coefficients;
  MaybeTensor timesteps, row;
  int64_t timestep = 0;

  void check(const Tensor& x) {
    check_same_device("coefficients", coefficients, x);
    coefficients = as_contiguous(coefficients);
    STD_TORCH_CHECK(
        coefficients.scalar_type() == ScalarType::Float && coefficients.dim() == (row ? 2 : 1),
        "coefficients: wanted float32 [n, columns], or [columns] for one row");
    if (!row) return;
    const bool per_sample = row->dim() != 0;
    timesteps = index_vector("timesteps", *timesteps, coefficients.size(0), x);
    row = index_vector("row", *row, per_sample ? x.size(0) : 1, x);
  }
};

// Writes x' to out (a tensor of x's shape, or x itself) and the data prediction to x0 if given.
template <class Kernel, class Remembered>
void apply_step(const Tensor& x_, const Tensor& model_output, Rows rows, const MaybeTensor& noise_,
                const MaybeTensor& seeds_, Remembered& slots, std::optional<double> clip,
                double guidance, Output& out, Output* x0) {
  STD_TORCH_CHECK(x_.dim() >= 1, "x: wanted shape [B, *]");
  const bool row_per_sample = rows.row && rows.row->dim() != 0;
  rows.check(x_);
  const RowShape shape = slots.row_shape(rows.coefficients.size(rows.coefficients.dim() - 1));
  STD_TORCH_CHECK(!noise_ || !seeds_, "noise, seeds: wanted one of them");
  if (noise_) check_like("noise", *noise_, x_);
  const int64_t samples = x_.size(0);
  const MaybeTensor seeds =
      map(seeds_, [&](const Tensor& s) { return index_vector("seeds", s, samples, x_); });

  const Layout layout = out.layout();
  const auto laid = [&](const Tensor& t) { return in_layout(t, out.dense(), layout); };
  const Tensor x = laid(x_);
  const auto [uncond, cond] = halves(model_output, x_);
  const Tensor m = laid(uncond);
  const MaybeTensor m_cond = map(cond, laid), noise = map(noise_, laid);
  const Step step{Batch(x, layout),
                  data_of<float>(rows.coefficients),
                  shape,
                  rows.row ? rows.coefficients.size(0) : 1,
                  data_of<int64_t>(rows.timesteps),
                  rows.timestep,
                  data_of<int64_t>(rows.row),
                  row_per_sample,
                  data_of<int64_t>(seeds),
                  clip ? float(*clip) : std::numeric_limits<float>::infinity(),
                  float(guidance)};
  const Kernel kernel(x);
  bool x0_to_slot = false;
  dispatch_floating(x.scalar_type(), "sampler_step", [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    Samples<T> samples = {};
    samples.x = data_of<T>(x), samples.m = data_of<T>(m), samples.m_cond = data_of<T>(m_cond);
    samples.noise = data_of<T>(noise), samples.out = out.data<T>();
    if (x0 != nullptr) samples.x0 = x0->data<T>();
    slots.place(samples);
    if (samples.kept != nullptr && shape.keeps_x0()) {  // the slot receives x0
      x0_to_slot = x0 != nullptr;
      if (!x0_to_slot) samples.x0 = samples.kept;
    }
    kernel.template run<T>(step, samples);
  });
  slots.finish(x0_to_slot ? &x0->dense() : nullptr);
}

using StepAndX0 = std::tuple<Tensor, Tensor>;

// x' in a tensor of its own.
template <class Kernel, class MakeSlots>
auto step_apart(const Tensor& x, const Tensor& model_output, const Rows& rows,
                const MaybeTensor& noise, const MaybeTensor& seeds, const MakeSlots& make_slots,
                std::optional<double> clip, double guidance, bool return_x0) {
  Output out(new_like(x));
  std::optional<Output> x0;
  if (return_x0) x0.emplace(new_like(x));
  auto slots = make_slots(out);
  apply_step<Kernel>(x, model_output, rows, noise, seeds, slots, clip, guidance, out,
                     x0 ? &*x0 : nullptr);
  return std::tuple(out.finish(), x0 ? MaybeTensor(x0->finish()) : std::nullopt, std::move(slots));
}

// history [B, *], the one slot, is read.
template <class Kernel>
StepAndX0 sampler_step(const Tensor& x, const Tensor& model_output, const Tensor& coefficients,
                       const Tensor& timesteps, const Tensor& row, const MaybeTensor& noise,
                       const MaybeTensor& seeds, const MaybeTensor& history,
                       std::optional<double> clip, double guidance, bool return_x0) {
  const auto slots = [&](const Output& out) {
    return SlotsApart("history", history ? std::vector{*history} : std::vector<Tensor>(), x, out);
  };
  auto [next, x0, _] = step_apart<Kernel>(x, model_output, {coefficients, timesteps, row}, noise,
                                          seeds, slots, clip, guidance, return_x0);
  return {next, x0 ? *x0 : fresh(x, {0})};
}

// slots [S, B, *] are updated in place.
template <class Kernel>
StepAndX0 sampler_step_with_slots(const Tensor& x, const Tensor& model_output,
                                  const Tensor& coefficients, const Tensor& timesteps,
                                  const Tensor& row, const MaybeTensor& noise,
                                  const MaybeTensor& seeds, const Tensor& slots_,
                                  std::optional<double> clip, double guidance, bool return_x0) {
  STD_TORCH_CHECK(slots_.dim() == x.dim() + 1, "slots: wanted shape [S, *x.shape]");
  const auto slots = [&](const Output& out) { return Slots(slots_, x, out); };
  auto [next, x0, _] = step_apart<Kernel>(x, model_output, {coefficients, timesteps, row}, noise,
                                          seeds, slots, clip, guidance, return_x0);
  return {next, x0 ? *x0 : fresh(x, {0})};
}

// One row for all samples; the slots, a tensor each, are read. Returns x', x0 where it is asked
// for, and what the row writes.
template <class Kernel>
std::vector<Tensor> sampler_step_of_row(const Tensor& x, const Tensor& model_output,
                                        const Tensor& row, int64_t timestep,
                                        const MaybeTensor& noise, const MaybeTensor& seeds,
                                        const std::vector<Tensor>& slots_,
                                        std::optional<double> clip, bool return_x0) {
  STD_TORCH_CHECK(same_sizes(model_output, x), "model_output: wanted x's shape");
  const auto slots = [&](const Output& out) { return SlotsApart("slots", slots_, x, out); };
  auto [next, x0, after] =
      step_apart<Kernel>(x, model_output, {row, std::nullopt, std::nullopt, timestep}, noise, seeds,
                         slots, clip, 1.0, return_x0);
  std::vector<Tensor> results;
  results.reserve(2 + kMostWrites);
  results.push_back(next);
  if (x0) results.push_back(*x0);
  for (const Output& written : after.written()) results.push_back(written.tensor());
  return results;
}

// In place, the slots too.
template <class Kernel>
void sampler_step_(const Tensor& x, const Tensor& model_output, const Tensor& coefficients,
                   const Tensor& timesteps, const Tensor& row, const MaybeTensor& noise,
                   const MaybeTensor& seeds, const MaybeTensor& slots_, std::optional<double> clip,
                   double guidance) {
  Output out(x);
  Slots slots(slots_, x, out);
  apply_step<Kernel>(x, model_output, {coefficients, timesteps, row}, noise, seeds, slots, clip,
                     guidance, out, nullptr);
  out.finish();
}

}  // namespace dx
