// conv3x3: 3x3 convolutions with padding 1 and the activation after them, float32, channels_last,
// by Winograd's F(4x4, 3x3) (math/winograd.h): a quarter of the multiplications.
//
// A block of tiles is transformed into 36 matrices [tiles, C], each multiplied with its matrix of
// the filters [C, K], 32 columns at a time, and transformed back, all within the second-level
// cache.
#include <memory>

#include "../math/activation.h"
#include "winograd.h"

namespace dx {
namespace {

// x [B, H, W, C] to y [B, H, W, K]; filters [K / 32 rounded up, 36, C, 32].
struct Convolution {
  Images images;
  int64_t in, out;
  const float *x, *filters, *bias;
  float* y;
};

// act(A^T m A + bias) of a tile, from m [36, kTiles, 32], to channels k, k + 1, ... of y.
template <Act act>
DX_INLINE void transform_output(const Convolution& c, const Tile& tile, const float* m, int64_t k) {
  float bias[kColumns] = {}, out[kTileOut][kTileOut][kColumns];
  const int64_t columns = std::min<int64_t>(kColumns, c.out - k);
  if (c.bias != nullptr) std::copy_n(c.bias + k, columns, bias);
  transform<kTileIn, kTileOut, kColumns, float>(
      [](const auto& u, auto& y) DX_KERNEL { winograd_output(u, y); },
      [&](int i, int j, int lane)
          DX_KERNEL { return m[(i * kTileIn + j) * kTiles * kColumns + lane]; },
      [&](int i, int j, int lane, float y) DX_KERNEL { out[i][j][lane] = y + bias[lane]; });
  for (int i = 0; i < kTileOut; ++i)
    for (int j = 0; j < kTileOut; ++j) {
      const int64_t p = tile.pixel(c.images, i, j);
      if (p < 0) continue;
      float derivative;
      for (int lane = 0; lane < kColumns; ++lane)
        out[i][j][lane] = activate<act>(out[i][j][lane], derivative);
      float* y = c.y + p * c.out + k;
      if (columns == kColumns)
        std::copy_n(out[i][j], kColumns, y);
      else
        std::copy_n(out[i][j], columns, y);
    }
}

// R rows and W columns of m [T, 32] = v [T, C] u [C, 32], whose sums stay in registers.
template <int R, int W>
DX_INLINE void multiply(const float* __restrict v, const float* __restrict u, float* __restrict m,
                        int64_t in) {
  float sums[R][W] = {};
  for (int64_t c = 0; c < in; ++c) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma omp simd
      for (int i = 0; i < W; ++i) sums[r][i] = fma(v[r * in + c], u[c * kColumns + i], sums[r][i]);
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < W; ++i) m[r * kColumns + i] = sums[r][i];
}

// The same, of any number of rows and every column.
template <int R, int W>
DX_INLINE void multiply_all(const float* v, const float* u, float* m, int64_t rows, int64_t in) {
  for (int64_t column = 0; column < kColumns; column += W) {
    int64_t r = 0;
    const auto take = [&](auto count) DX_KERNEL {
      for (; r + count <= rows; r += count)
        multiply<count, W>(v + r * in, u + column, m + r * kColumns + column, in);
    };
    take(std::integral_constant<int, R>());
    take(std::integral_constant<int, 4>());
    take(std::integral_constant<int, 1>());
  }
}

int64_t column_blocks(int64_t out) { return (out + kColumns - 1) / kColumns; }
int64_t filters_size(int64_t in, int64_t out) {
  return column_blocks(out) * kPoints * in * kColumns;
}

// scratch: v [36, kTiles, C], m [36, kTiles, 32] and C zeros.
constexpr int64_t scratch_size(int64_t in) { return kPoints * kTiles * (in + kColumns) + in; }

// The three parts are compiled apart, which leaves each the registers that it needs.
void convolve(const Convolution& c, int64_t first, int64_t tiles, Act act, float* v) {
  float *m = v + kPoints * kTiles * c.in, *zeros = m + kPoints * kTiles * kColumns;
  std::fill_n(zeros, c.in, 0.0f);
  transform_inputs(c.images, first, tiles, {c.x, c.in, 0, c.in}, zeros, v);
  for (int64_t k = 0; k < c.out; k += kColumns) {
    const float* u = c.filters + k * kPoints * c.in;
    on_best_isa([&]() DX_KERNEL {
      for (int64_t p = 0; p < kPoints; ++p) {
        const float *vp = v + p * kTiles * c.in, *up = u + p * c.in * kColumns;
        float* mp = m + p * kTiles * kColumns;
        if (best_isa() == Isa::avx512)  // 32 vector registers of 16 numbers, or 16 of 8
          multiply_all<8, 32>(vp, up, mp, tiles, c.in);
        else
          multiply_all<4, 16>(vp, up, mp, tiles, c.in);
      }
    });
    on_best_isa([&]() DX_KERNEL {
      dispatch_act(act, [&](auto a) DX_KERNEL {
        for (int64_t t = 0; t < tiles; ++t)
          transform_output<decltype(a)::value>(c, Tile(c.images, first + t), m + t * kColumns, k);
      });
    });
  }
}

void run(const Convolution& c, Act act) {
  const int64_t tiles = c.images.tiles(), threads = torch::stable::get_num_threads();
  if (tiles == 0 || c.out == 0) return;
  // Blocks of one size, as many for each thread.
  const int64_t rounds = (tiles + kTiles * threads - 1) / (kTiles * threads);
  const int64_t size = (tiles + rounds * threads - 1) / (rounds * threads);
  for_each_with_scratch((tiles + size - 1) / size, scratch_size(c.in), [&](int64_t i, float* v) {
    convolve(c, i * size, std::min(size, tiles - i * size), act, v);
  });
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
// last one, to u [36, C, 32].
DX_INLINE void transform_filters(const Weight& w, int64_t c, int64_t k, float* u) {
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
      [&](int i, int j, int lane, double number)
          DX_KERNEL { u[((i * kTileIn + j) * w.in + c) * kColumns + lane] = float(number); });
}

// All of them.
void transform_all(const Weight& w, float* u) {
  torch::stable::parallel_for(0, column_blocks(w.out) * w.in, 16, [&](int64_t begin, int64_t end) {
    on_best_isa([&]() DX_KERNEL {
      for (int64_t n = begin; n < end; ++n) {
        const int64_t k = n / w.in * kColumns;
        transform_filters(w, n % w.in, k, u + k * kPoints * w.in);
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

MaybeTensor checked_bias(const MaybeTensor& bias, int64_t out) {
  if (!bias) return bias;
  check_float32("bias", *bias);
  STD_TORCH_CHECK(bias->dim() == 1 && bias->numel() == out, "bias: wanted shape [", out, "]");
  return as_contiguous(*bias);
}

// [B, out, H, W], channels_last, for x [B, C, H, W].
Tensor output_for(const Tensor& x, int64_t out) {
  const int64_t height = x.size(2), width = x.size(3), row = width * out;
  return in_huge_pages(
      fresh_strided(x, {x.size(0), out, height, width}, {height * row, 1, row, out}, dtype_of(x)));
}

// The filters of weight [K, C, 3, 3] as conv3x3 multiplies with them, [K / 32 rounded up, 36, C,
// 32].
Tensor conv3x3_filters(const Tensor& weight) {
  check_weight(weight);
  const Weight w(weight, false);
  const Tensor filters = fresh(weight, {column_blocks(w.out), kPoints, w.in, kColumns});
  transform_all(w, static_cast<float*>(filters.mutable_data_ptr()));
  return filters;
}

Tensor conv3x3(const Tensor& x_, const Tensor& filters_, const MaybeTensor& bias_,
               int64_t out_channels, int64_t act) {
  const Tensor x = pixels_of("x", x_);
  check_float32("filters", filters_);
  STD_TORCH_CHECK(act >= 0 && act < kActs, "act: unknown");
  STD_TORCH_CHECK(out_channels >= 0 && filters_.numel() == filters_size(x.size(1), out_channels),
                  "filters: wanted what conv3x3_filters made for these channels");
  const Tensor filters = as_contiguous(filters_), y = output_for(x, out_channels);
  const MaybeTensor bias = checked_bias(bias_, out_channels);
  run({Images(x), x.size(1), out_channels, data_of<float>(x), data_of<float>(filters),
       data_of<float>(bias), static_cast<float*>(y.mutable_data_ptr())},
      Act(act));
  return y;
}

// The same of a weight [K, C, 3, 3] that serves once. `transposed`: the gradient with respect to
// the input, from x, that of the output. y is made before the filters, so that these, which are
// four times the weight, leave no hole below it in the heap when they go.
Tensor conv3x3_once(const Tensor& x_, const Tensor& weight, const MaybeTensor& bias_,
                    bool transposed) {
  const Tensor x = pixels_of("x", x_);
  check_weight(weight);
  const Weight w(weight, transposed);
  STD_TORCH_CHECK(w.in == x.size(1), "weight: wanted x's ", x.size(1), " channels, got ", w.in);
  const Tensor y = output_for(x, w.out);
  const MaybeTensor bias = checked_bias(bias_, w.out);
  const std::unique_ptr<float[]> filters(new float[filters_size(w.in, w.out)]);
  transform_all(w, filters.get());
  run({Images(x), w.in, w.out, data_of<float>(x), filters.get(), data_of<float>(bias),
       static_cast<float*>(y.mutable_data_ptr())},
      Act::identity);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(diffusion_ext, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&conv3x3));
  m.impl("conv3x3_filters", TORCH_BOX(&conv3x3_filters));
  m.impl("conv3x3_once", TORCH_BOX(&conv3x3_once));
}

}  // namespace dx
