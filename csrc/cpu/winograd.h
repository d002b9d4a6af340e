// Tiles of images [B, H, W, channels] and their transforms (math/winograd.h), as the CPU's 3x3
// convolutions and their gradients walk over them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "../common.h"
#include "../math/winograd.h"
#include "simd.h"

namespace dx {

constexpr int kColumns = 32;  // output channels that are computed together
constexpr int kLanes = 16;    // channels that are transformed together
constexpr int kTiles = 32;    // of a block, at the most

struct Images {
  int64_t batch, height, width;

  explicit Images(const Tensor& x) : batch(x.size(0)), height(x.size(2)), width(x.size(3)) {}
  DX_INLINE int64_t tiles_high() const { return (height + kTileOut - 1) / kTileOut; }
  DX_INLINE int64_t tiles_wide() const { return (width + kTileOut - 1) / kTileOut; }
  DX_INLINE int64_t tiles() const { return batch * tiles_high() * tiles_wide(); }
};

// 4x4 pixels from (row, column) of image b on.
struct Tile {
  int64_t b, row, column;
  DX_INLINE Tile(const Images& x, int64_t i)
      : b(i / (x.tiles_high() * x.tiles_wide())),
        row(i / x.tiles_wide() % x.tiles_high() * kTileOut),
        column(i % x.tiles_wide() * kTileOut) {}

  // Where pixel (row + i, column + j) lies, in pixels; -1 outside the image.
  DX_INLINE int64_t pixel(const Images& x, int64_t i, int64_t j) const {
    const int64_t h = row + i, w = column + j;
    return h < 0 || h >= x.height || w < 0 || w >= x.width ? -1 : (b * x.height + h) * x.width + w;
  }
};

// A one-dimensional transform f of From numbers to To, of the rows of a matrix and then of its
// columns, for as many matrices side by side as there are lanes: load(i, j, lane) gives the
// numbers, store(i, j, lane, number) takes them.
template <int From, int To, int Lanes, class T, class F, class Load, class Store>
DX_INLINE void transform(const F& f, const Load& load, const Store& store) {
  T half[From][To][Lanes];
  for (int i = 0; i < From; ++i)
#pragma omp simd
    for (int lane = 0; lane < Lanes; ++lane) {
      T from[From], to[To];
      for (int j = 0; j < From; ++j) from[j] = load(i, j, lane);
      f(from, to);
      for (int j = 0; j < To; ++j) half[i][j][lane] = to[j];
    }
  for (int j = 0; j < To; ++j)
#pragma omp simd
    for (int lane = 0; lane < Lanes; ++lane) {
      T from[From], to[To];
      for (int i = 0; i < From; ++i) from[i] = half[i][j][lane];
      f(from, to);
      for (int i = 0; i < To; ++i) store(i, j, lane, to[i]);
    }
}

// Neighbouring channels of images [B, H, W, channels]: `count` from `first` on, multiples of
// kLanes.
struct ChannelRange {
  const float* data;
  int64_t channels, first, count;
};

// The 36 numbers of each channel of Side x Side pixels, from `offset` of the tile's first on, to v
// [36, kTiles, count]. Outside the image are zeros, `count` of them.
template <int Side, int offset, class F>
DX_INLINE void transform_pixels(const F& f, const Images& images, const Tile& tile,
                                const ChannelRange& x, const float* zeros, float* v) {
  const float* pixels[Side][Side];
  for (int i = 0; i < Side; ++i)
    for (int j = 0; j < Side; ++j) {
      const int64_t p = tile.pixel(images, i + offset, j + offset);
      pixels[i][j] = p < 0 ? zeros : x.data + p * x.channels + x.first;
    }
  for (int64_t k = 0; k < x.count; k += kLanes)
    transform<Side, kTileIn, kLanes, float>(
        f, [&](int i, int j, int lane) DX_KERNEL { return pixels[i][j][k + lane]; },
        [&](int i, int j, int lane, float number)
            DX_KERNEL { v[(i * kTileIn + j) * kTiles * x.count + k + lane] = number; });
}

// B^T d B of the tiles first, ..., first + tiles - 1 of x, to v [36, kTiles, count].
inline void transform_inputs(const Images& images, int64_t first, int64_t tiles,
                             const ChannelRange& x, const float* zeros, float* v) {
  on_best_isa([&]() DX_KERNEL {
    for (int64_t t = 0; t < tiles; ++t)
      transform_pixels<kTileIn, -1>([](const auto& d, auto& u) DX_KERNEL { winograd_input(d, u); },
                                    images, Tile(images, first + t), x, zeros, v + t * x.count);
  });
}

// Calls body(i, scratch) for 0 <= i < count on all threads, with `size` floats for each thread.
// The caller's: what a thread of the pool allocates stays in an arena of its own.
template <class Body>
void for_each_with_scratch(int64_t count, int64_t size, const Body& body) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  const std::unique_ptr<float[]> scratch(new float[threads * size]);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      float* own = scratch.get() + thread * size;
      for (int64_t i = count * thread / threads; i < count * (thread + 1) / threads; ++i)
        body(i, own);
    }
  });
}

inline void check_float32(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float, name,
                  ": wanted float32 on the CPU");
}

// x [B, C, H, W], C a multiple of kLanes, as [B, H, W, C].
inline Tensor pixels_of(const char* name, const Tensor& x) {
  check_float32(name, x);
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) % kLanes == 0, name,
                  ": wanted shape [B, C, H, W], C a multiple of ", kLanes);
  return fits(x, Layout::channels_last)
             ? x
             : torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
}

}  // namespace dx
