// 3x3 convolutions of stride 1, and those of several frames of 3x3, channels_last, by Winograd's
// F(4x4, 3x3) (math/winograd.h): a quarter of the multiplications. Half precision is widened as it
// is read, and all sums are float32.
//
// A block of tiles is transformed into 36 matrices [tiles, C], each multiplied with its matrix of
// the filters [C, K], 32 columns at a time, and transformed back, all within the second-level
// cache. The frames under a filter are added up before they are transformed back, as if their
// channels followed one another. Of a place that several tiles of a block see in the same frame
// there is one transform.
#include "winograd.h"

namespace dx {
namespace {

struct Winograd : Convolution {
  int64_t frames, height, width;  // of the outputs
  Tiles tiles;
  int64_t channels, most;  // of the inputs; transforms of a block, at the most

  explicit Winograd(const Convolution& c)
      : Convolution(c),
        frames(filter.time.outputs()),
        height(filter.high.outputs()),
        width(filter.wide.outputs()),
        tiles(in.batch, frames, height, width),
        channels(in.channels()),
        most(most_transforms()) {}

  int64_t point() const { return point_stride(channels, most); }
  // v [36, most, C], m [36, kTiles, 32], C zeros, a tile's pixels where they are widened, and the
  // rows [frames, kTiles] of v.
  int64_t scratch_size() const {
    return kPoints * (point() + point_stride(kColumns)) + channels + wide_size() +
           filter.time.taps * kTiles * (sizeof(const float*) / sizeof(float));
  }
  int64_t wide_size() const { return in.in_place() ? 0 : kTileIn * kTileIn * channels; }

 private:
  // Each place whose tiles are in a block, two of them only in part, needs its tiles' frames and
  // those around them; and all frames that are outside share one transform.
  int64_t most_transforms() const {
    const Axis& t = filter.time;
    const int64_t places = ceil_div(kTiles, std::max<int64_t>(frames, 1)) + 1;
    const int64_t own = std::min(t.taps, t.stride) * kTiles;
    const int64_t around = places * std::max<int64_t>(t.taps - t.stride, 0);
    return std::min({own + around, kTiles * t.taps, places * in.frames}) + (t.padding > 0);
  }
};

// What the tiles from `first` on see, to v; rows [frames, kTiles]: where in v that is.
void transform_inputs(const Winograd& c, int64_t first, int64_t count, const float* zeros,
                      float* wide, float* v, const float** rows) {
  const Axis& time = c.filter.time;
  int64_t used = 0;
  if (time.padding > 0) {
    for (int64_t p = 0; p < kPoints; ++p) std::fill_n(v + p * c.point(), c.channels, 0.0f);
    used = 1;
  }
  on_best_isa([&]() DX_KERNEL {
    int64_t end = 0;  // of the frames of this place that are in v
    for (int64_t n = 0; n < count; ++n) {
      const ImageTile tile(c.tiles, first + n);
      if (tile.t == 0) end = 0;
      for (int64_t f = 0; f < time.taps; ++f) {
        const int64_t t = time.first(tile.t) + f;
        const float*& row = rows[f * kTiles + n];
        if (t < 0 || t >= c.in.frames) {
          row = v;
          continue;
        }
        if (t >= end) {
          float* of_part = v + used++ * c.channels;
          for (int64_t p = 0; p < c.in.count(); ++p) {
            const Part& part = c.in.parts[p];
            transform_input(c.in, c.filter, tile, t, {part, 0, part.channels}, zeros, wide, of_part,
                            c.point());
            of_part += part.channels;
          }
          end = t + 1;
        }
        row = v + (used - (end - t)) * c.channels;
      }
    }
  });
}

// act(A^T m A + bias) of a tile, from m [36, kTiles, 32], to channels k, k + 1, ... of y.
template <Act act>
DX_INLINE void transform_output(const Winograd& c, const ImageTile& tile, const float* m, int64_t k,
                                const float* bias) {
  alignas(64) float sums[kTileOut][kTileOut][kColumns];
  transform<kTileIn, kTileOut, kColumns, float>(
      [](const auto& u, auto& y) DX_KERNEL { winograd_output(u, y); },
      [&](int i, int j, int lane)
          DX_KERNEL { return m[(i * kTileIn + j) * point_stride(kColumns) + lane]; },
      [&](int i, int j, int lane, float y) DX_KERNEL { sums[i][j][lane] = y; });
  const int64_t high = std::min<int64_t>(kTileOut, c.height - tile.row);
  const int64_t wide = std::min<int64_t>(kTileOut, c.width - tile.column);
  const int64_t frame = tile.b * c.frames + tile.t;
  for (int64_t i = 0; i < high; ++i)
    write_pixels<act>(c.out, (frame * c.height + tile.row + i) * c.width + tile.column, wide, k,
                      sums[i][0], bias);
}

// The three parts are compiled apart, which leaves each the registers that it needs.
void convolve(const Winograd& c, const Grid& grid, int64_t task, float* v) {
  const int64_t first = grid.first(task), count = grid.count(task), frames = c.filter.time.taps;
  float *m = v + kPoints * c.point(), *zeros = m + kPoints * point_stride(kColumns);
  float* wide = zeros + c.channels;
  const float** rows = reinterpret_cast<const float**>(wide + c.wide_size());
  std::fill_n(zeros, c.channels, 0.0f);
  transform_inputs(c, first, count, zeros, wide, v, rows);
  const int64_t numbers = frames * c.channels;
  for (int64_t block = grid.first_column(task); block < grid.end_column(task); ++block) {
    const float* u = c.filters.as<float>() + block * kPoints * numbers * kColumns;
    const int64_t columns = std::min<int64_t>(kColumns, c.out.channels - block * kColumns);
    for (int64_t p = 0; p < kPoints; ++p)
      multiply({rows, kTiles, frames, 1, {c.channels}, p * c.point()}, count, columns,
               u + p * numbers * kColumns, m + p * point_stride(kColumns));
    on_best_isa([&]() DX_KERNEL {
      dispatch_act(c.out.act, [&](auto act) DX_KERNEL {
        float bias[kColumns];
        copy_columns(c.out.bias, c.out.channels, block * kColumns, bias);
        for (int64_t t = 0; t < count; ++t)
          transform_output<decltype(act)::value>(c, ImageTile(c.tiles, first + t), m + t * kColumns,
                                                 block * kColumns, bias);
      });
    });
  }
}

// A weight [K, C, 3, 3] or [K, C, T, 3, 3] of any strides. `transposed`: as the gradient with
// respect to x wants it, [C, K, 3, 3] with the filters upside down.
struct Weight {
  const float* data;
  int64_t out, in, frames, out_stride, in_stride, frame_stride, row_stride, column_stride;

  Weight(const Tensor& t, bool transposed) : data(data_of<float>(t)) {
    const int64_t to = transposed ? 1 : 0, from = 1 - to, dims = t.dim();
    out = t.size(to), in = t.size(from), out_stride = t.stride(to), in_stride = t.stride(from);
    frames = dims == 5 ? t.size(2) : 1, frame_stride = dims == 5 ? t.stride(2) : 0;
    row_stride = t.stride(dims - 2), column_stride = t.stride(dims - 1);
    if (!transposed) return;
    data += (kFilterSide - 1) * (row_stride + column_stride);
    row_stride = -row_stride, column_stride = -column_stride;
  }
  int64_t numbers() const { return frames * in; }
};

// G g G^T of the filters g from number n, of frame n / C and input channel n % C, to output
// channels k, k + 1, ..., zeros beyond the last one, to u [36, panels of [T C, 32]].
DX_INLINE void transform_filters(const Weight& w, int64_t n, int64_t k, int64_t panel, float* u) {
  double filters[kFilterSide][kFilterSide][kColumns] = {};
  const int64_t columns = std::min<int64_t>(kColumns, w.out - k), numbers = w.numbers();
  const float* from = w.data + n / w.in * w.frame_stride + n % w.in * w.in_stride;
  for (int i = 0; i < kFilterSide; ++i)
    for (int j = 0; j < kFilterSide; ++j)
      load_columns(from + k * w.out_stride + i * w.row_stride + j * w.column_stride, w.out_stride,
                   columns, filters[i][j]);
  alignas(64) float points[kPoints][kColumns];
  transform<kFilterSide, kTileIn, kColumns, double>(
      [](const auto& g, auto& t) DX_KERNEL { winograd_filter(g, t); },
      [&](int i, int j, int lane) DX_KERNEL { return filters[i][j][lane]; },
      [&](int i, int j, int lane, double number)
          DX_KERNEL { points[i * kTileIn + j][lane] = float(number); });
  for (int p = 0; p < kPoints; ++p)
    lay_columns(points[p], panel, numbers, n, u + p * numbers * kColumns);
}

// All of them.
void transform_all(const Weight& w, float* u) {
  const int64_t panel = dx::panel(), numbers = w.numbers();
  share_work(column_blocks(w.out) * numbers, 16, [&](int64_t begin, int64_t end) {
    on_best_isa([&]() DX_KERNEL {
      for (int64_t n = begin; n < end; ++n) {
        const int64_t k = n / numbers * kColumns;
        transform_filters(w, n % numbers, k, panel, u + k * kPoints * numbers);
      }
    });
  });
}

bool is_3x3(const Tensor& weight, int64_t dims) {
  check_float32("weight", weight);
  return weight.dim() == dims && weight.size(dims - 2) == kFilterSide &&
         weight.size(dims - 1) == kFilterSide;
}

// The filters of weight [K, C, 3, 3] as `conv2d` multiplies with them by Winograd's algorithm,
// [K / 32 rounded up, 36, C, 32], or of [K, C, T, 3, 3] for `conv3d`, [..., 36, T, C, 32].
Tensor conv3x3_filters(const Tensor& weight) {
  STD_TORCH_CHECK(is_3x3(weight, 4) || is_3x3(weight, 5),
                  "weight: wanted shape [K, C, 3, 3] or [K, C, T, 3, 3]");
  const Weight w(weight, false);
  Strides sizes{column_blocks(w.out), kPoints, w.frames, w.in, kColumns};
  if (weight.dim() == 4) sizes.erase(sizes.begin() + 2);
  const Tensor filters = in_huge_pages(fresh(weight, sizes));
  transform_all(w, static_cast<float*>(filters.mutable_data_ptr()));
  return filters;
}

// conv2d of a weight [K, C, 3, 3] that serves once. `transposed`: the gradient with respect to the
// input, from x, that of the output. y is made before the filters, so that these, which are four
// times the weight, leave no hole below it in the heap when they go.
Tensor conv3x3_once(const Tensor& x_, const Tensor& weight, const MaybeTensor& bias_,
                    bool transposed) {
  const Tensor x = pixels_of("x", x_);
  check_float32("x", x), check_lanes("x", x);
  STD_TORCH_CHECK(is_3x3(weight, 4), "weight: wanted shape [K, C, 3, 3]");
  const Weight w(weight, transposed);
  STD_TORCH_CHECK(w.in == x.size(1), "weight: wanted x's ", x.size(1), " channels, got ", w.in);
  const Tensor y = new_images(x, x.size(0), w.out, x.size(2), x.size(3));
  const MaybeTensor bias = checked_bias(bias_, w.out, x);
  const Scratch filters = new_scratch(column_blocks(w.out) * kPoints * w.in * kColumns);
  transform_all(w, filters.get());
  const Inputs in(x);
  convolve_by_winograd(
      {in,
       filter_3x3(in),
       filters.get(),
       {Target(y), w.out, data_of<float>(bias), std::nullopt, 1.0f, Act::identity}});
  return y;
}

}  // namespace

void convolve_by_winograd(const Convolution& convolution) {
  const Winograd c(convolution);
  if (c.tiles.count == 0 || c.out.channels == 0) return;
  const Grid grid(c.tiles.count, kTiles, column_blocks(c.out.channels));
  for_each_with_scratch(grid.tasks, c.scratch_size(),
                        [&](int64_t task, float* scratch) { convolve(c, grid, task, scratch); });
}

STABLE_TORCH_LIBRARY_IMPL(diffusion_ext, CPU, m) {
  m.impl("conv3x3_filters", TORCH_BOX(&conv3x3_filters));
  m.impl("conv3x3_once", TORCH_BOX(&conv3x3_once));
}

}  // namespace dx
