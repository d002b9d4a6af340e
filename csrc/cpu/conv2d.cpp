// conv2d: convolutions with what precedes and follows them, channels_last, of filters that were
// laid out before. Here the direct one of any filter and stride, an implicit product of matrices:
// the rows of the inputs are multiplied where they lie or, of half precision, where a task has
// widened them, once for all of its filters. conv3x3.cpp has the other way.
#include "../math/winograd.h"
#include "convolution.h"

namespace dx {
namespace {

constexpr int64_t kPixels = 192;  // of a task at the most: their table and inputs stay in cache

// To y [B, T, H·side, W·side, K]. side > 1: a transposed convolution whose stride is the filter's
// side, of which each pixel's column blocks are those of its side x side outputs, one after the
// other.
struct Direct : Convolution {
  int64_t side, frames, height, width;  // of what the filters pass over

  Direct(const Convolution& c, int64_t side)
      : Convolution(c),
        side(side),
        frames(filter.time.outputs()),
        height(filter.high.outputs()),
        width(filter.wide.outputs()) {
    if (is_of_single_pixels()) {
      height = filter.high.size = in.height *= in.width;
      width = filter.wide.size = in.width = 1;
    }
  }
  int64_t pixels() const { return in.batch * frames * height * width; }
  // Of a row of the tensors.
  int64_t row() const { return in.width / in.repeat; }
  int64_t columns() const { return side * side * column_blocks(out.channels); }

  // Where in y the outputs of a pixel lie that the column block belongs to.
  DX_INLINE int64_t output(int64_t pixel, int64_t block) const {
    if (side == 1) return pixel;
    const int64_t place = block / column_blocks(out.channels);
    const int64_t row = pixel / width * side + place / side, column = pixel % width * side;
    return row * width * side + column + place % side;
  }

  // The rows of the tensors, counted through all frames, from the first that `count` outputs from
  // `first` on see in frame `tap` of their filters to beyond the last.
  std::pair<int64_t, int64_t> rows_seen(int64_t first, int64_t count, int64_t tap) const {
    return {row_seen(first, tap, 0, 0),
            row_seen(first + count - 1, tap, filter.high.taps - 1, in.height - 1) + 1};
  }

 private:
  // Then images are one column of pixels, so that of no row more is widened than a task sees.
  bool is_of_single_pixels() const {
    const auto single = [](const Axis& a) {
      return a.taps == 1 && a.stride == 1 && a.padding == 0;
    };
    return side == 1 && in.repeat == 1 && single(filter.time) && single(filter.high) &&
           single(filter.wide);
  }

  // The row under place (tap, tap_row) of an output's filter, or the nearest one: of a frame that
  // is outside, row `outside` of the nearest frame.
  int64_t row_seen(int64_t output, int64_t tap, int64_t tap_row, int64_t outside) const {
    const int64_t frame = output / (height * width);
    const int64_t t = filter.time.first(frame % frames) + tap;
    const int64_t h = filter.high.first(output / width % height) + tap_row;
    const int64_t near_t = std::clamp<int64_t>(t, 0, in.frames - 1);
    const int64_t near_h = t == near_t ? std::clamp<int64_t>(h, 0, in.height - 1) : outside;
    return ((frame / frames * in.frames + near_t) * in.height + near_h) / in.repeat;
  }
};

// table [taps, parts, kPixels]: where the inputs of `count` outputs from `first` on begin. wide:
// room for the rows that they are in, of each frame of the filters, where they are widened.
void find_inputs(const Direct& c, int64_t first, int64_t count, const float* zeros, float* wide,
                 const float** table) {
  const Filter& f = c.filter;
  const int64_t parts = c.in.count();
  for (int64_t t = 0; t < f.time.taps; ++t, table += f.high.taps * f.wide.taps * parts * kPixels) {
    const auto [row, end] = c.rows_seen(first, count, t);
    const int64_t seen = row * c.row();
    const float* views[2];
    for (int64_t p = 0; p < parts; ++p) {
      views[p] = c.in.parts[p].view(seen, (end - row) * c.row(), wide);
      wide += (end - row) * c.row() * c.in.parts[p].channels;
    }
    for (int64_t n = 0; n < count; ++n) {
      const int64_t pixel = first + n, frame = pixel / (c.height * c.width), b = frame / c.frames;
      const int64_t time = f.time.first(frame % c.frames) + t;
      const int64_t top = f.high.first(pixel / c.width % c.height);
      const int64_t left = f.wide.first(pixel % c.width);
      const float** of_tap = table + n;
      for (int64_t i = 0; i < f.high.taps; ++i) {
        const int64_t in_row = c.in.row(b, time, top + i);
        for (int64_t j = 0; j < f.wide.taps; ++j) {
          const int64_t column = c.in.column(left + j), from = in_row + column - seen;
          const bool outside = in_row < 0 || column < 0;
          for (int64_t p = 0; p < parts; ++p, of_tap += kPixels)
            *of_tap = outside ? zeros : views[p] + from * c.in.parts[p].channels;
        }
      }
    }
  }
}

// Numbers that a task widens, at the most.
int64_t wide_size(const Direct& c, const Grid& grid) {
  if (c.in.in_place()) return 0;
  int64_t most = 0;
  for (int64_t task = 0; task < grid.tasks; task += grid.groups) {
    int64_t rows = 0;
    for (int64_t t = 0; t < c.filter.time.taps; ++t) {
      const auto [row, end] = c.rows_seen(grid.first(task), grid.count(task), t);
      rows += end - row;
    }
    most = std::max(most, rows);
  }
  return most * c.row() * c.in.channels();
}

// scratch: the table, sums [kPixels, 32], C zeros, and what is widened.
int64_t table_size(const Direct& c) {
  return c.filter.taps() * c.in.count() * kPixels * (sizeof(const float*) / sizeof(float));
}
int64_t scratch_size(const Direct& c) {
  return table_size(c) + c.in.channels() + kPixels * kColumns;
}

void convolve(const Direct& c, const Grid& grid, int64_t task, float* scratch) {
  const float** table = reinterpret_cast<const float**>(scratch);
  float *sums = scratch + table_size(c), *zeros = sums + kPixels * kColumns;
  const int64_t first = grid.first(task), count = grid.count(task), parts = c.in.count();
  std::fill_n(zeros, c.in.channels(), 0.0f);
  find_inputs(c, first, count, zeros, zeros + c.in.channels(), table);
  const Products products{table,
                          kPixels,
                          c.filter.taps() * parts,
                          parts,
                          {c.in.parts[0].channels, c.in.parts[1].channels},
                          0};
  for (int64_t block = grid.first_column(task); block < grid.end_column(task); ++block) {
    const int64_t k = block % column_blocks(c.out.channels) * kColumns;
    multiply(products, count, std::min<int64_t>(kColumns, c.out.channels - k), c.filters,
             block * c.filter.taps() * c.in.channels() * kColumns, sums);
    on_best_isa([&]() DX_KERNEL {
      dispatch_act(c.out.act, [&](auto act) DX_KERNEL {
        float bias[kColumns];
        copy_columns(c.out.bias, c.out.channels, k, bias);
        const int64_t together = c.side == 1 ? count : 1;  // pixels of y
        for (int64_t n = 0; n < count; n += together)
          write_pixels<decltype(act)::value>(c.out, c.output(first + n, block), together, k,
                                             sums + n * kColumns, bias);
      });
    });
  }
}

// --- the ops -------------------------------------------------------------------------------------

// Filters as the direct convolution multiplies with them, of the weight's dtype. weight [K, C, R,
// S] to [K / 32 rounded up, R, S, C, 32], and [K, C, T, R, S] to [K / 32 rounded up, T, R, S, C,
// 32]; transposed, weight [C, K, R, S] to [R S (K / 32 rounded up), 1, 1, C, 32].
Tensor conv2d_filters(const Tensor& weight, bool transposed) {
  check_floating("weight", weight);
  const bool moving = weight.dim() == 5;
  STD_TORCH_CHECK(weight.dim() == 4 || (moving && !transposed),
                  "weight: wanted shape [K, C, R, S] or [K, C, T, R, S]");
  const auto of = transposed ? std::pair(1, 0) : std::pair(0, 1);
  const int64_t out = weight.size(of.first), in = weight.size(of.second);
  const int64_t rows = moving ? 3 : 2, frames = moving ? weight.size(2) : 1;
  const int64_t high = weight.size(rows), wide = weight.size(rows + 1);
  const int64_t taps = frames * high * wide, blocks = column_blocks(out);
  Strides sizes{blocks, frames, high, wide, in, kColumns};
  if (!moving) sizes.erase(sizes.begin() + 1);
  if (transposed) sizes = {taps * blocks, 1, 1, in, kColumns};
  const Tensor filters = in_huge_pages(fresh(weight, sizes));
  const int64_t of_out = weight.stride(of.first), of_in = weight.stride(of.second);
  const int64_t of_frame = moving ? weight.stride(2) : 0;
  const int64_t of_row = weight.stride(rows), of_column = weight.stride(rows + 1);
  const int64_t panel = dx::panel(), taps_of_block = transposed ? 1 : taps;
  dispatch_floating(weight.scalar_type(), "conv2d_filters", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* from = data_of<T>(weight);
    T* to = static_cast<T*>(filters.mutable_data_ptr());
    share_work(blocks * taps, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const int64_t k = (transposed ? n % blocks : n / taps) * kColumns;
        const int64_t tap = transposed ? n / blocks : n % taps;
        const T* of_tap = from + tap / (high * wide) * of_frame + tap / wide % high * of_row +
                          tap % wide * of_column;
        const int64_t numbers = taps_of_block * in, first = n % taps_of_block * in;
        T* block = to + n / taps_of_block * numbers * kColumns;
        T columns[kColumns] = {};
        for (int64_t c = 0; c < in; ++c) {
          load_columns(of_tap + k * of_out + c * of_in, of_out,
                       std::min<int64_t>(kColumns, out - k), columns);
          lay_columns(columns, panel, numbers, first + c, block);
        }
      }
    });
  });
  return filters;
}

void check_images(const char* name, const MaybeTensor& t, int64_t batch, int64_t height,
                  int64_t width) {
  STD_TORCH_CHECK(!t || (t->size(0) == batch && t->size(2) == height && t->size(3) == width), name,
                  ": wanted ", batch, " images of ", height, "x", width);
}

}  // namespace

void convolve_directly(const Convolution& convolution, int64_t side) {
  const Direct c(convolution, side);
  if (c.pixels() == 0 || c.out.channels == 0) return;
  const Grid grid(c.pixels(), kPixels, c.columns());
  for_each_with_scratch(grid.tasks, scratch_size(c) + wide_size(c, grid),
                        [&](int64_t task, float* scratch) { convolve(c, grid, task, scratch); });
}

Tensor conv2d(const Tensor& x_, const MaybeTensor& skip_, const Tensor& filters_,
              const MaybeTensor& bias_, const MaybeTensor& residual_, int64_t channels,
              int64_t stride_high, int64_t stride_wide, int64_t padding_high, int64_t padding_wide,
              int64_t repeat, int64_t side, int64_t act, double scale) {
  const Tensor x = pixels_of("x", x_);
  const auto pixels = [](const char* name) {
    return [name](const Tensor& t) { return pixels_of(name, t); };
  };
  const MaybeTensor skip = map(skip_, pixels("skip")),
                    residual = map(residual_, pixels("residual"));
  STD_TORCH_CHECK(act >= 0 && act < kActs, "act: unknown");
  STD_TORCH_CHECK(stride_high > 0 && stride_wide > 0 && padding_high >= 0 && padding_wide >= 0 &&
                      repeat > 0 && side > 0 && channels >= 0,
                  "conv2d: wanted positive numbers");
  check_images("skip", skip, x.size(0), x.size(2), x.size(3));
  if (skip) check_same_kind("skip", *skip, x);
  if (residual) check_same_kind("residual", *residual, x);
  const Inputs in(x, skip, repeat);
  const bool winograd = filters_.dim() == 4;
  check_filters(filters_, winograd, x);
  STD_TORCH_CHECK(winograd || filters_.dim() == 5, "filters: wanted what conv2d_filters made");
  const int64_t rows = winograd ? kFilterSide : filters_.size(1);
  const int64_t columns = winograd ? kFilterSide : filters_.size(2);
  const Filter filter{{1},
                      {in.height, rows, stride_high, padding_high},
                      {in.width, columns, stride_wide, padding_wide}};
  const int64_t taps = winograd ? kPoints : filter.taps();
  STD_TORCH_CHECK(filters_.size(0) == side * side * column_blocks(channels) &&
                      filters_.numel() == filters_.size(0) * taps * in.channels() * kColumns,
                  "filters: wanted those of ", in.channels(), " channels to ", channels);
  STD_TORCH_CHECK(!winograd || (stride_high == 1 && stride_wide == 1 && padding_high == 1 &&
                                padding_wide == 1 && side == 1),
                  "filters: those of Winograd's algorithm have stride 1 and padding 1");
  STD_TORCH_CHECK(filter.high.fits() && filter.wide.fits(),
                  "x: wanted images at least as large as the filters");
  const int64_t height = filter.high.outputs(), width = filter.wide.outputs();
  check_images("residual", residual, x.size(0), height * side, width * side);
  STD_TORCH_CHECK(!residual || residual->size(1) == channels, "residual: wanted ", channels,
                  " channels");
  const Tensor filters = as_contiguous(filters_);
  const Tensor y = new_images(x, x.size(0), channels, height * side, width * side);
  const MaybeTensor bias = checked_bias(bias_, channels, x);
  const Outputs out{Target(y),           channels,     data_of<float>(bias),
                    source_of(residual), float(scale), Act(act)};
  const Convolution c{in, filter, LaidOut(filters), out};
  if (winograd) {
    check_lanes("x", x);
    if (skip) check_lanes("skip", *skip);
    convolve_by_winograd(c);
  } else {
    convolve_directly(c, side);
  }
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(diffusion_ext, CPU, m) {
  m.impl("conv2d", TORCH_BOX(&conv2d));
  m.impl("conv2d_filters", TORCH_BOX(&conv2d_filters));
}

}  // namespace dx
