// The gradient of a 3x3 convolution's weight, by Winograd's F(4x4, 3x3): G^T u G, where u
// is the sum over the tiles of (B^T d B) * (A dy A^T) (math/winograd.h).
//
// Each thread adds the tiles of its blocks to a u of its own, [36, C, K]; a product of matrices
// [C, tiles] and [tiles, K] for each of the 36 numbers. The sum of the threads' is transformed
// back.
#include <memory>

#include "winograd.h"

namespace dx {
namespace {

struct Gradient {
  Images images;
  int64_t in, out;  // C, K
  const float *x, *dy;

  DX_INLINE int64_t size() const { return kPoints * in * out; }  // of u
};

// u[R, W] of [C, K] += v[T, C]^T m[T, K], from element (c, k) on; the sums stay in registers.
template <int R, int W>
DX_INLINE void multiply(const Gradient& g, const float* __restrict v, const float* __restrict m,
                        int64_t tiles, float* __restrict u) {
  float sums[R][W];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < W; ++i) sums[r][i] = u[r * g.out + i];
  for (int64_t t = 0; t < tiles; ++t) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma omp simd
      for (int i = 0; i < W; ++i) sums[r][i] = fma(v[t * g.in + r], m[t * g.out + i], sums[r][i]);
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < W; ++i) u[r * g.out + i] = sums[r][i];
}

// All of it. C is a multiple of R, K of W where wide, else of kLanes.
template <int R, int W>
DX_INLINE void multiply_all(const Gradient& g, const float* v, const float* m, int64_t tiles,
                            float* u) {
  for (int64_t c = 0; c < g.in; c += R) {
    int64_t k = 0;
    for (; k + W <= g.out; k += W) multiply<R, W>(g, v + c, m + k, tiles, u + c * g.out + k);
    if (k < g.out) multiply<R, kLanes>(g, v + c, m + k, tiles, u + c * g.out + k);
  }
}

// scratch: v [36, kTiles, C], m [36, kTiles, K] and zeros of the larger one.
int64_t scratch_size(const Gradient& g) {
  return kPoints * kTiles * (g.in + g.out) + std::max(g.in, g.out);
}

// Adds a block's tiles to u.
void add_block(const Gradient& g, int64_t first, int64_t tiles, float* v, float* u) {
  float* m = v + kPoints * kTiles * g.in;
  const float* zeros = m + kPoints * kTiles * g.out;
  transform_inputs(g.images, first, tiles, g.x, g.in, zeros, v);
  on_best_isa([&]() DX_KERNEL {
    for (int64_t t = 0; t < tiles; ++t)
      transform_pixels<kTileOut, 0>(
          [](const auto& dy, auto& p) DX_KERNEL { winograd_output_gradient(dy, p); }, g.images,
          Tile(g.images, first + t), g.dy, g.out, zeros, m + t * g.out);
  });
  on_best_isa([&]() DX_KERNEL {
    for (int64_t p = 0; p < kPoints; ++p) {
      const float *vp = v + p * kTiles * g.in, *mp = m + p * kTiles * g.out;
      float* up = u + p * g.in * g.out;
      if (best_isa() == Isa::avx512)
        multiply_all<8, 32>(g, vp, mp, tiles, up);
      else
        multiply_all<4, 16>(g, vp, mp, tiles, up);
    }
  });
}

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

// The filters of input channel c: the sum of the parts of u [parts, 36, C, K], left in the first,
// transformed back.
DX_INLINE void transform_back(const Gradient& g, int64_t parts, float* u, int64_t c,
                              const Filters& dweight) {
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t p = 0; p < kPoints; ++p) {
      float* __restrict sum = u + (p * g.in + c) * g.out;
      const float* __restrict other = sum + part * g.size();
      for (int64_t k = 0; k < g.out; ++k) sum[k] += other[k];
    }
  for (int64_t k = 0; k < g.out; k += kLanes) {
    float filters[kFilterSide][kFilterSide][kLanes];
    transform<kTileIn, kFilterSide, kLanes, double>(
        [](const auto& p, auto& dg) DX_KERNEL { winograd_filter_gradient(p, dg); },
        [&](int i, int j, int lane)
            DX_KERNEL { return u[((i * kTileIn + j) * g.in + c) * g.out + k + lane]; },
        [&](int i, int j, int lane, double number)
            DX_KERNEL { filters[i][j][lane] = float(number); });
    for (int64_t lane = 0; lane < kLanes; ++lane)
      for (int i = 0; i < kFilterSide; ++i)
        for (int j = 0; j < kFilterSide; ++j) dweight.at(k + lane, c, i, j) = filters[i][j][lane];
  }
}

void run(const Gradient& g, const Tensor& x, const Filters& dweight) {
  const Blocks blocks(g.images);
  const int64_t parts = std::min<int64_t>(torch::stable::get_num_threads(), blocks.count());
  const Tensor sums = fresh(x, {parts, g.size()});
  float* u = static_cast<float*>(sums.mutable_data_ptr());
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[scratch_size(g)]);
    std::fill_n(scratch.get() + scratch_size(g) - std::max(g.in, g.out), std::max(g.in, g.out),
                0.0f);
    for (int64_t part = begin; part < end; ++part) {
      std::fill_n(u + part * g.size(), g.size(), 0.0f);
      for (int64_t b = part * blocks.count() / parts; b < (part + 1) * blocks.count() / parts; ++b)
        add_block(g, blocks.first(b), blocks.tiles_of(b), scratch.get(), u + part * g.size());
    }
  });
  torch::stable::parallel_for(0, g.in, 4, [&](int64_t begin, int64_t end) {
    on_best_isa([&]() DX_KERNEL {
      for (int64_t c = begin; c < end; ++c) transform_back(g, parts, u, c, dweight);
    });
  });
}

// As weight [K, C, 3, 3] lies, from x [B, C, H, W] and dy [B, K, H, W].
Tensor conv3x3_weight_gradient(const Tensor& x_, const Tensor& dy_, const Tensor& weight) {
  const Tensor x = pixels_of("x", x_), dy = pixels_of("dy", dy_);
  check_float32("weight", weight);
  const Images images(x);
  const int64_t in = x.size(1), out = dy.size(1);
  STD_TORCH_CHECK(
      dy.size(0) == images.batch && dy.size(2) == images.height && dy.size(3) == images.width,
      "dy: wanted x's batch and size");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == out && weight.size(1) == in &&
                      weight.size(2) == kFilterSide && weight.size(3) == kFilterSide,
                  "weight: wanted shape [", out, ", ", in, ", 3, 3]");
  const Tensor dweight = fresh_like(weight);
  run({images, in, out, data_of<float>(x), data_of<float>(dy)}, x, Filters(dweight));
  return dweight;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(diffusion_ext, CPU, m) {
  m.impl("conv3x3_weight_gradient", TORCH_BOX(&conv3x3_weight_gradient));
}

}  // namespace dx
