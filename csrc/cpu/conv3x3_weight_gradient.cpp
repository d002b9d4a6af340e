// The gradient of a 3x3 convolution's weight, by Winograd's F(4x4, 3x3): G^T u G, where u is the
// sum over the tiles of (B^T d B) * (A dy A^T) (math/winograd.h).
//
// The threads share u, [36, C, K], by its channels, so that none of its sums depends on how many
// they are: a part is added up over all tiles, in blocks of them, a product of matrices [C, tiles]
// and [tiles, K] for each of the 36 numbers, and transformed back. That the threads of other output
// channels transform the same inputs takes less than adding up their parts.
#include "winograd.h"

namespace dx {
namespace {

// u is read and written once for each block of tiles. On a Zen 4 these, with four rows of u at a
// time, took 0.84 to 0.92 of the time of blocks of 32 tiles and all channels, with eight rows; with
// AVX2, which has four rows in any case, 0.9 to 1.04.
constexpr int kBlock = 64;
constexpr int64_t kMostChannels = 128;  // of x, at once

constexpr int64_t point_of(int64_t channels) { return point_stride(channels, kBlock); }

// Of x [B, H, W, C] and dy [B, H, W, K].
struct Gradient {
  Inputs images;
  Filter filter;
  ChannelRange x, dy;

  Tiles tiles() const { return {images.batch, 1, images.height, images.width}; }
};

// dweight [K, C, 3, 3], of any strides.
struct Filters {
  float* data;
  int64_t strides[4];

  explicit Filters(const Tensor& t) : data(static_cast<float*>(t.mutable_data_ptr())) {
    std::copy_n(t.strides().begin(), 4, strides);
  }
  DX_INLINE float& at(int64_t k, int64_t c, int64_t i, int64_t j) const {
    return data[k * strides[0] + c * strides[1] + i * strides[2] + j * strides[3]];
  }
};

// R rows of u [C, K] += v [tiles, C]^T m [tiles, K], K in all; the sums stay in registers.
template <int R, int K>
DX_INLINE void multiply(const float* __restrict v, int64_t channels, const float* __restrict m,
                        int64_t stride, int64_t tiles, float* __restrict u) {
  float sums[R][K];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < K; ++i) sums[r][i] = u[r * stride + i];
  for (int64_t t = 0; t < tiles; ++t) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma omp simd
      for (int i = 0; i < K; ++i)
        sums[r][i] = multiply_add(v[t * channels + r], m[t * stride + i], sums[r][i]);
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < K; ++i) u[r * stride + i] = sums[r][i];
}

template <int R, int K>
DX_INLINE void multiply_all(const Gradient& g, const float* v, const float* m, int64_t tiles,
                            float* u) {
  const int64_t channels = g.x.count, stride = g.dy.count;
  for (int64_t c = 0; c < channels; c += R)
    for (int64_t k = 0; k < stride; k += K)
      multiply<R, K>(v + c, channels, m + k, stride, tiles, u + c * stride + k);
}

// Adds a block of tiles to u [36, C, K]; v is [36, kBlock, C] and m [36, kBlock, K].
void add_block(const Gradient& g, int64_t first, int64_t count, const float* zeros, float* v,
               float* m, float* u) {
  const int64_t channels = g.x.count, columns = g.dy.count;
  const Tiles tiles = g.tiles();
  on_best_isa([&]() DX_KERNEL {
    for (int64_t t = 0; t < count; ++t)
      transform_input(g.images, g.filter, ImageTile(tiles, first + t), 0, g.x, zeros, nullptr,
                      v + t * channels, point_of(channels));
  });
  on_best_isa([&]() DX_KERNEL {
    for (int64_t t = 0; t < count; ++t)
      transform_pixels<kTileOut>(
          [](const auto& dy, auto& p) DX_KERNEL { winograd_output_gradient(dy, p); }, g.images,
          ImageTile(tiles, first + t), g.dy, zeros, nullptr, m + t * columns, point_of(columns));
  });
  on_best_isa([&]() DX_KERNEL {
    for (int64_t p = 0; p < kPoints; ++p) {
      const float *vp = v + p * point_of(channels), *mp = m + p * point_of(columns);
      float* up = u + p * channels * columns;
      if (best_isa() != Isa::avx512)
        multiply_all<4, kLanes>(g, vp, mp, count, up);
      else if (columns == kColumns)
        multiply_all<4, kColumns>(g, vp, mp, count, up);
      else
        multiply_all<8, kLanes>(g, vp, mp, count, up);
    }
  });
}

// G^T u G, where it belongs in dweight.
DX_INLINE void transform_back(const Gradient& g, const float* u, const Filters& dweight) {
  const int64_t channels = g.x.count, columns = g.dy.count;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t k = 0; k < columns; k += kLanes) {
      float filters[kFilterSide][kFilterSide][kLanes];
      transform<kTileIn, kFilterSide, kLanes, double>(
          [](const auto& p, auto& dg) DX_KERNEL { winograd_filter_gradient(p, dg); },
          [&](int i, int j, int lane)
              DX_KERNEL { return u[((i * kTileIn + j) * channels + c) * columns + k + lane]; },
          [&](int i, int j, int lane, double number)
              DX_KERNEL { filters[i][j][lane] = float(number); });
      for (int64_t lane = 0; lane < kLanes; ++lane)
        for (int i = 0; i < kFilterSide; ++i)
          for (int j = 0; j < kFilterSide; ++j)
            dweight.at(g.dy.first + k + lane, g.x.first + c, i, j) = filters[i][j][lane];
    }
}

// v, m, u and zeros of `in` and `out` channels.
int64_t scratch_size(int64_t in, int64_t out) {
  return kPoints * (point_of(in) + point_of(out) + in * out) + std::max(in, out);
}

// The part of dweight that belongs to the channels of g.
void run(const Gradient& g, const Filters& dweight, float* v) {
  const int64_t channels = g.x.count, columns = g.dy.count, tiles = g.tiles().count;
  float *m = v + kPoints * point_of(channels), *u = m + kPoints * point_of(columns),
        *zeros = u + kPoints * channels * columns;
  std::fill(u, v + scratch_size(channels, columns), 0.0f);
  for (int64_t first = 0; first < tiles; first += kBlock)
    add_block(g, first, std::min<int64_t>(kBlock, tiles - first), zeros, v, m, u);
  on_best_isa([&]() DX_KERNEL { transform_back(g, u, dweight); });
}

// Parts of kColumns output channels and of at most kMostChannels input channels, of fewer where
// threads are left.
void run_all(const Gradient& g, const Filters& dweight) {
  const int64_t in = g.x.count, out = g.dy.count;
  const int64_t parts_out = column_blocks(out);
  const int64_t wanted =
      std::max(ceil_div(torch::stable::get_num_threads(), parts_out), ceil_div(in, kMostChannels));
  const int64_t size = ceil_div(in / kLanes, wanted) * kLanes;
  const int64_t parts = ceil_div(in, size) * parts_out;
  for_each_with_scratch(parts, scratch_size(size, kColumns), [&](int64_t part, float* scratch) {
    Gradient of_part = g;
    of_part.x.first = part / parts_out * size;
    of_part.x.count = std::min(size, in - of_part.x.first);
    of_part.dy.first = part % parts_out * kColumns;
    of_part.dy.count = std::min<int64_t>(kColumns, out - of_part.dy.first);
    run(of_part, dweight, scratch);
  });
}

// As weight [K, C, 3, 3] lies, from x [B, C, H, W] and dy [B, K, H, W].
Tensor conv3x3_weight_gradient(const Tensor& x_, const Tensor& dy_, const Tensor& weight) {
  const Tensor x = pixels_of("x", x_), dy = pixels_of("dy", dy_);
  check_float32("x", x), check_float32("dy", dy), check_float32("weight", weight);
  check_lanes("x", x), check_lanes("dy", dy);
  const Inputs images(x);
  const int64_t in = x.size(1), out = dy.size(1);
  STD_TORCH_CHECK(
      dy.size(0) == images.batch && dy.size(2) == images.height && dy.size(3) == images.width,
      "dy: wanted x's batch and size");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == out && weight.size(1) == in &&
                      weight.size(2) == kFilterSide && weight.size(3) == kFilterSide,
                  "weight: wanted shape [", out, ", ", in, ", 3, 3]");
  const Tensor dweight = fresh_like(weight);
  if (in > 0)
    run_all({images, filter_3x3(images), {{Source(x), in}, 0, in}, {{Source(dy), out}, 0, out}},
            Filters(dweight));
  return dweight;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(diffusion_ext, CPU, m) {
  m.impl("conv3x3_weight_gradient", TORCH_BOX(&conv3x3_weight_gradient));
}

}  // namespace dx
