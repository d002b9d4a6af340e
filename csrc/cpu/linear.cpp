// linear: act(x W^T + b) of rows that are read where they lie, with the step of a network that
// would read the result next: a residual that is added, or a feed-forward's gate. Of filters that
// conv2d_filters laid out. Rows of half precision are widened by each task, once for all filters.
#include "convolution.h"

namespace dx {
namespace {

// Rows of a task at the most: each task reads all filters of its columns.
constexpr int64_t kMostRows = 192;
// Rows that are multiplied and then written, whose sums stay in the first level's cache: a multiple
// of what each instruction set multiplies at once. All of a task at once take as long.
constexpr int64_t kChunk = 24;

// x [*, C] of any strides, of which the last is 1.
struct Rows {
  Source data;
  int64_t count, channels;
  std::vector<int64_t> sizes, strides;  // of all dimensions but the last

  explicit Rows(const Tensor& x)
      : data(x),
        count(1),
        channels(x.size(-1)),
        sizes(x.sizes().begin(), x.sizes().end() - 1),
        strides(x.strides().begin(), x.strides().end() - 1) {
    for (const int64_t size : sizes) count *= size;
  }

  // As float32: where it lies or, of half precision, widened in the buffer.
  const float* row(int64_t n, float* buffer) const {
    int64_t at = 0;
    for (size_t d = sizes.size(); d-- > 0; n /= sizes[d]) at += n % sizes[d] * strides[d];
    return data.view({at, 0, 1, channels}, buffer).at;
  }
  int64_t wide_size() const { return data.in_place() ? 0 : kMostRows * channels; }
};

// To [rows, out.channels]. Gated: of the filters' halves the first gives values, the second what
// the activation makes their gates of.
struct Linear {
  Rows rows;
  LaidOut filters;
  Outputs out;
  bool gated;

  int64_t columns() const { return column_blocks(out.channels); }
  int64_t block(int64_t n) const { return n * rows.channels * kColumns; }
};

// (values + bias) act(gates + gate_bias)
template <Act act, class Count>
DX_INLINE void write_gated(float* __restrict y, Count count, const float* __restrict values,
                           const float* __restrict gates, const float* __restrict bias,
                           const float* __restrict gate_bias) {
  float derivative;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    y[i] = (values[i] + bias[i]) * activate<act>(gates[i] + gate_bias[i], derivative);
}

// Outputs k, k + 1, ... of up to kChunk rows from `first` on, from their sums [count, 32].
template <Act act>
DX_INLINE void write_rows(const Linear& c, int64_t first, int64_t count, int64_t k,
                          const float* sums, const float* gates) {
  const Outputs& out = c.out;
  float bias[kColumns], gate_bias[kColumns];
  copy_columns(out.bias, out.channels, k, bias);
  if (!c.gated) return write_pixels<act>(out, first, count, k, sums, bias);
  copy_columns(out.bias == nullptr ? nullptr : out.bias + out.channels, out.channels, k, gate_bias);
  TileBuffer buffer;
  const int64_t columns = std::min<int64_t>(kColumns, out.channels - k);
  const Place place{first * out.channels + k, out.channels, count, columns};
  const Tile<float> y = out.y.place(place, buffer);
  for (int64_t n = 0; n < count; ++n, sums += kColumns, gates += kColumns) {
    float* to = y.at + n * y.stride;
    if (columns == kColumns)
      write_gated<act>(to, std::integral_constant<int64_t, kColumns>(), sums, gates, bias,
                       gate_bias);
    else
      write_gated<act>(to, columns, sums, gates, bias, gate_bias);
  }
  out.y.keep(y, place);
}

// A task's rows times the filters of its columns. To ask the memory for the next task's rows
// meanwhile gained nothing. wide: room for the rows where they are widened.
void multiply(const Linear& c, const Grid& grid, int64_t task, float* wide) {
  const float* table[kMostRows];
  alignas(64) float sums[kChunk * kColumns], gates[kChunk * kColumns];
  const int64_t first = grid.first(task), count = grid.count(task);
  for (int64_t n = 0; n < count; ++n) table[n] = c.rows.row(first + n, wide + n * c.rows.channels);
  for (int64_t block = grid.first_column(task); block < grid.end_column(task); ++block) {
    const int64_t k = block * kColumns, columns = std::min<int64_t>(kColumns, c.out.channels - k);
    for (int64_t n = 0; n < count; n += kChunk) {
      const int64_t rows = std::min(kChunk, count - n);
      const Products products{table + n, kMostRows, 1, 1, {c.rows.channels, 0}, 0};
      multiply(products, rows, columns, c.filters, c.block(block), sums);
      if (c.gated)
        multiply(products, rows, columns, c.filters, c.block(c.columns() + block), gates);
      on_best_isa([&]() DX_KERNEL {
        dispatch_act(c.out.act, [&](auto act) DX_KERNEL {
          write_rows<decltype(act)::value>(c, first + n, rows, k, sums, gates);
        });
      });
    }
  }
}

Tensor linear(const Tensor& x_, const Tensor& filters_, const MaybeTensor& bias_,
              const MaybeTensor& residual_, int64_t channels, int64_t act, bool gated) {
  check_floating("x", x_);
  STD_TORCH_CHECK(x_.dim() > 0, "x: wanted shape [*, C]");
  STD_TORCH_CHECK(act >= 0 && act < kActs, "act: unknown");
  STD_TORCH_CHECK(channels >= 0, "out_channels: wanted how many there are");
  check_same_kind("filters", filters_, x_);
  const Tensor x = x_.size(-1) > 1 && x_.stride(-1) != 1 ? torch::stable::contiguous(x_) : x_;
  const int64_t halves = gated ? 2 : 1;
  STD_TORCH_CHECK(filters_.numel() == halves * column_blocks(channels) * x.size(-1) * kColumns,
                  "filters: wanted those of ", x.size(-1), " channels to ", halves, " times ",
                  channels);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = channels;
  if (residual_) {
    check_same_kind("residual", *residual_, x);
    STD_TORCH_CHECK(!gated, "residual: wanted none where there is a gate");
    STD_TORCH_CHECK(same_sizes(residual_->sizes(), sizes), "residual: wanted the outputs' shape");
  }
  const Tensor filters = as_contiguous(filters_), y = in_huge_pages(fresh(x, sizes));
  const MaybeTensor bias = checked_bias(bias_, halves * channels, x);
  const MaybeTensor residual = map(residual_, as_contiguous);
  const Linear c{Rows(x),
                 LaidOut(filters),
                 {Target(y), channels, data_of<float>(bias), source_of(residual), 1, Act(act)},
                 gated};
  if (c.rows.count == 0 || channels == 0) return y;
  const Grid grid(c.rows.count, kMostRows, c.columns());
  for_each_with_scratch(grid.tasks, c.rows.wide_size(),
                        [&](int64_t task, float* wide) { multiply(c, grid, task, wide); });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(diffusion_ext, CPU, m) { m.impl("linear", TORCH_BOX(&linear)); }

}  // namespace dx
