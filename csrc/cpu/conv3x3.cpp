// 3x3 convolutions of stride 1 and padding 1, float32, channels_last, by Winograd's F(4x4, 3x3)
// (math/winograd.h): a quarter of the multiplications.
//
// A block of tiles is transformed into 36 matrices [tiles, C], each multiplied with its matrix of
// the filters [C, K], 32 columns at a time, and transformed back, all within the second-level
// cache.
#include "winograd.h"

namespace dx {
namespace {

// act(A^T m A + bias) of a tile, from m [36, kTiles, 32], to channels k, k + 1, ... of y.
template <Act act>
DX_INLINE void transform_output(const Inputs& in, const Outputs& out, const Tile& tile,
                                const float* m, int64_t k, const float* bias) {
  alignas(64) float sums[kTileOut][kTileOut][kColumns];
  transform<kTileIn, kTileOut, kColumns, float>(
      [](const auto& u, auto& y) DX_KERNEL { winograd_output(u, y); },
      [&](int i, int j, int lane)
          DX_KERNEL { return m[(i * kTileIn + j) * point_stride(kColumns) + lane]; },
      [&](int i, int j, int lane, float y) DX_KERNEL { sums[i][j][lane] = y; });
  const int64_t high = std::min<int64_t>(kTileOut, in.height - tile.row);
  const int64_t wide = std::min<int64_t>(kTileOut, in.width - tile.column);
  for (int64_t i = 0; i < high; ++i)
    for (int64_t j = 0; j < wide; ++j)
      write_columns<act>(out, (tile.b * in.height + tile.row + i) * in.width + tile.column + j, k,
                         sums[i][j], bias);
}

// scratch: v [36, kTiles, C], m [36, kTiles, 32] and C zeros.
constexpr int64_t scratch_size(int64_t in) {
  return kPoints * (point_stride(in) + point_stride(kColumns)) + in;
}

// The three parts are compiled apart, which leaves each the registers that it needs.
void convolve(const Inputs& in, const float* filters, const Outputs& out, const Grid& grid,
              int64_t task, float* v) {
  const int64_t channels = in.channels(), first = grid.first(task), count = grid.count(task);
  float *m = v + kPoints * point_stride(channels), *zeros = m + kPoints * point_stride(kColumns);
  std::fill_n(zeros, channels, 0.0f);
  float* of_part = v;
  for (int64_t p = 0; p < in.count(); ++p) {
    const Part& part = in.parts[p];
    const ChannelRange range{part.data, part.channels, 0, part.channels};
    transform_inputs(in, first, count, range, zeros, of_part, channels);
    of_part += part.channels;
  }
  const float* rows[kTiles];
  for (int64_t t = 0; t < count; ++t) rows[t] = v + t * channels;
  const Tiles tiles(in);
  for (int64_t block = grid.first_column(task); block < grid.end_column(task); ++block) {
    const float* u = filters + block * kPoints * channels * kColumns;
    const int64_t columns = std::min<int64_t>(kColumns, out.channels - block * kColumns);
    for (int64_t p = 0; p < kPoints; ++p)
      multiply({rows, 0, 1, 1, {channels}, p * point_stride(channels)}, count, columns,
               u + p * channels * kColumns, m + p * point_stride(kColumns));
    on_best_isa([&]() DX_KERNEL {
      dispatch_act(out.act, [&](auto act) DX_KERNEL {
        float bias[kColumns];
        copy_columns(out.bias, out.channels, block * kColumns, bias);
        for (int64_t t = 0; t < count; ++t)
          transform_output<decltype(act)::value>(in, out, Tile(tiles, first + t), m + t * kColumns,
                                                 block * kColumns, bias);
      });
    });
  }
}

// A weight [K, C, 3, 3] of any strides. `transposed`: as the gradient with respect to x wants it,
// [C, K, 3, 3] with the filters upside down.
struct Weight {
  const float* data;
  int64_t out, in, out_stride, in_stride, row_stride, column_stride;

  Weight(const Tensor& t, bool transposed) : data(data_of<float>(t)) {
    const int64_t to = transposed ? 1 : 0, from = 1 - to;
    out = t.size(to), in = t.size(from), out_stride = t.stride(to), in_stride = t.stride(from);
    row_stride = t.stride(2), column_stride = t.stride(3);
    if (!transposed) return;
    data += (kFilterSide - 1) * (row_stride + column_stride);
    row_stride = -row_stride, column_stride = -column_stride;
  }
};

// G g G^T of the filters g from input channel c to output channels k, k + 1, ..., zeros beyond the
// last one, to u [36, panels of [C, 32]].
DX_INLINE void transform_filters(const Weight& w, int64_t c, int64_t k, int64_t panel, float* u) {
  double filters[kFilterSide][kFilterSide][kColumns] = {};
  const int64_t columns = std::min<int64_t>(kColumns, w.out - k);
  for (int64_t lane = 0; lane < columns; ++lane)
    for (int i = 0; i < kFilterSide; ++i)
      for (int j = 0; j < kFilterSide; ++j)
        filters[i][j][lane] = w.data[(k + lane) * w.out_stride + c * w.in_stride +
                                     i * w.row_stride + j * w.column_stride];
  transform<kFilterSide, kTileIn, kColumns, double>(
      [](const auto& g, auto& t) DX_KERNEL { winograd_filter(g, t); },
      [&](int i, int j, int lane) DX_KERNEL { return filters[i][j][lane]; },
      [&](int i, int j, int lane, double number) DX_KERNEL {
        u[(i * kTileIn + j) * w.in * kColumns + in_panels(panel, w.in, c, lane)] = float(number);
      });
}

// All of them.
void transform_all(const Weight& w, float* u) {
  const int64_t panel = dx::panel();
  share_work(column_blocks(w.out) * w.in, 16, [&](int64_t begin, int64_t end) {
    on_best_isa([&]() DX_KERNEL {
      for (int64_t n = begin; n < end; ++n) {
        const int64_t k = n / w.in * kColumns;
        transform_filters(w, n % w.in, k, panel, u + k * kPoints * w.in);
      }
    });
  });
}

void check_weight(const Tensor& weight) {
  check_float32("weight", weight);
  STD_TORCH_CHECK(
      weight.dim() == 4 && weight.size(2) == kFilterSide && weight.size(3) == kFilterSide,
      "weight: wanted shape [K, C, 3, 3]");
}

// The filters of weight [K, C, 3, 3] as `conv2d` multiplies with them by Winograd's algorithm,
// [K / 32 rounded up, 36, C, 32].
Tensor conv3x3_filters(const Tensor& weight) {
  check_weight(weight);
  const Weight w(weight, false);
  const Tensor filters = fresh(weight, {column_blocks(w.out), kPoints, w.in, kColumns});
  transform_all(w, static_cast<float*>(filters.mutable_data_ptr()));
  return filters;
}

// conv2d of a weight [K, C, 3, 3] that serves once. `transposed`: the gradient with respect to the
// input, from x, that of the output. y is made before the filters, so that these, which are four
// times the weight, leave no hole below it in the heap when they go.
Tensor conv3x3_once(const Tensor& x_, const Tensor& weight, const MaybeTensor& bias_,
                    bool transposed) {
  const Tensor x = pixels_of("x", x_);
  check_lanes("x", x);
  check_weight(weight);
  const Weight w(weight, transposed);
  STD_TORCH_CHECK(w.in == x.size(1), "weight: wanted x's ", x.size(1), " channels, got ", w.in);
  const Tensor y = new_images(x, x.size(0), w.out, x.size(2), x.size(3));
  const MaybeTensor bias = checked_bias(bias_, w.out);
  const std::unique_ptr<float[]> filters(
      new float[column_blocks(w.out) * kPoints * w.in * kColumns]);
  transform_all(w, filters.get());
  convolve_by_winograd(Inputs(x), filters.get(),
                       {static_cast<float*>(y.mutable_data_ptr()), w.out, data_of<float>(bias),
                        nullptr, 1.0f, Act::identity});
  return y;
}

}  // namespace

void convolve_by_winograd(const Inputs& in, const float* filters, const Outputs& out) {
  const int64_t tiles = Tiles(in).count;
  if (tiles == 0 || out.channels == 0) return;
  const Grid grid(tiles, kTiles, column_blocks(out.channels));
  for_each_with_scratch(grid.tasks, scratch_size(in.channels()), [&](int64_t task, float* scratch) {
    convolve(in, filters, out, grid, task, scratch);
  });
}

STABLE_TORCH_LIBRARY_IMPL(diffusion_ext, CPU, m) {
  m.impl("conv3x3_filters", TORCH_BOX(&conv3x3_filters));
  m.impl("conv3x3_once", TORCH_BOX(&conv3x3_once));
}

}  // namespace dx
