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

// scratch: v [36, kTiles, C], m [36, kTiles, 32] and C zeros.
constexpr int64_t scratch_size(int64_t in) { return kPoints * kTiles * (in + kColumns) + in; }

// The three parts are compiled apart, which leaves each the registers that it needs.
void convolve(const Convolution& c, int64_t first, int64_t tiles, Act act, float* v) {
  float* m = v + kPoints * kTiles * c.in;
  const float* zeros = m + kPoints * kTiles * kColumns;
  transform_inputs(c.images, first, tiles, c.x, c.in, zeros, v);
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
  if (c.images.tiles() == 0 || c.out == 0) return;
  const Blocks blocks(c.images);
  torch::stable::parallel_for(0, blocks.count(), 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[scratch_size(c.in)]);
    std::fill_n(scratch.get() + scratch_size(c.in) - c.in, c.in, 0.0f);
    for (int64_t b = begin; b < end; ++b)
      convolve(c, blocks.first(b), blocks.tiles_of(b), act, scratch.get());
  });
}

Tensor conv3x3(const Tensor& x_, const Tensor& filters_, const MaybeTensor& bias_,
               int64_t out_channels, int64_t act) {
  const Tensor x = pixels_of("x", x_);
  check_float32("filters", filters_);
  STD_TORCH_CHECK(act >= 0 && act < kActs, "act: unknown");
  const int64_t in = x.size(1), column_blocks = (out_channels + kColumns - 1) / kColumns;
  STD_TORCH_CHECK(out_channels >= 0 && filters_.numel() == column_blocks * kPoints * in * kColumns,
                  "filters: wanted what conv3x3_filters made for these channels");
  if (bias_) {
    check_float32("bias", *bias_);
    STD_TORCH_CHECK(bias_->dim() == 1 && bias_->numel() == out_channels, "bias: wanted shape [",
                    out_channels, "]");
  }
  const Tensor filters = as_contiguous(filters_);
  const MaybeTensor bias = map(bias_, as_contiguous);
  const Images images(x);
  const int64_t row = images.width * out_channels;
  const Tensor y =
      in_huge_pages(fresh_strided(x, {images.batch, out_channels, images.height, images.width},
                                  {images.height * row, 1, row, out_channels}, dtype_of(x)));
  run({images, in, out_channels, data_of<float>(x), data_of<float>(filters), data_of<float>(bias),
       static_cast<float*>(y.mutable_data_ptr())},
      Act(act));
  return y;
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

// The filters of weight [K, C, 3, 3] as conv3x3 multiplies with them, [K / 32 rounded up, 36, C,
// 32]; `transposed`: for its gradient, a convolution of dy [B, K, H, W].
Tensor conv3x3_filters(const Tensor& weight, bool transposed) {
  check_float32("weight", weight);
  STD_TORCH_CHECK(
      weight.dim() == 4 && weight.size(2) == kFilterSide && weight.size(3) == kFilterSide,
      "weight: wanted shape [K, C, 3, 3]");
  const Weight w(weight, transposed);
  const int64_t blocks = (w.out + kColumns - 1) / kColumns;
  const Tensor filters = fresh(weight, {blocks, kPoints, w.in, kColumns});
  float* u = static_cast<float*>(filters.mutable_data_ptr());
  torch::stable::parallel_for(0, blocks * w.in, 16, [&](int64_t begin, int64_t end) {
    on_best_isa([&]() DX_KERNEL {
      for (int64_t n = begin; n < end; ++n) {
        const int64_t k = n / w.in * kColumns;
        transform_filters(w, n % w.in, k, u + k * kPoints * w.in);
      }
    });
  });
  return filters;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(diffusion_ext, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&conv3x3));
  m.impl("conv3x3_filters", TORCH_BOX(&conv3x3_filters));
}

}  // namespace dx
