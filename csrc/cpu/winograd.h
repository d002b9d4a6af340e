// Tiles of images [B, H, W, channels] and their transforms (math/winograd.h), as the CPU's 3x3
// convolutions and their gradients walk over them.
#pragma once

#include "../math/winograd.h"
#include "convolution.h"

namespace dx {

constexpr int kTiles = 32;  // of a block, at the most

// What lies between the transforms' 36 matrices [kTiles, row]. A line more than they take: at
// powers of two, lines of all 36 would fall into the same few places of the first-level cache.
constexpr int64_t point_stride(int64_t row) { return kTiles * row + 16; }

// The tiles of images, 4x4 pixels of the outputs each.
struct Tiles {
  int64_t high, wide, count;
  explicit Tiles(const Inputs& x)
      : high(ceil_div(x.height, kTileOut)),
        wide(ceil_div(x.width, kTileOut)),
        count(x.batch * high * wide) {}
};

// 4x4 pixels from (row, column) of image b on.
struct Tile {
  int64_t b, row, column;
  DX_INLINE Tile(const Tiles& tiles, int64_t i)
      : b(i / (tiles.high * tiles.wide)),
        row(i / tiles.wide % tiles.high * kTileOut),
        column(i % tiles.wide * kTileOut) {}
};

// A one-dimensional transform f of From numbers to To, of the rows of a matrix and then of its
// columns, for as many matrices side by side as there are lanes: load(i, j, lane) gives the
// numbers, store(i, j, lane, number) takes them.
template <int From, int To, int Lanes, class T, class F, class Load, class Store>
DX_INLINE void transform(const F& f, const Load& load, const Store& store) {
  alignas(64) T half[From][To][Lanes];
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
// [36, kTiles, row]. Outside the image are zeros, `count` of them.
template <int Side, int offset, class F>
DX_INLINE void transform_pixels(const F& f, const Inputs& images, const Tile& tile,
                                const ChannelRange& x, const float* zeros, float* v, int64_t row) {
  const float* pixels[Side][Side];
  for (int i = 0; i < Side; ++i)
    for (int j = 0; j < Side; ++j) {
      const int64_t p = images.pixel(tile.b, tile.row + i + offset, tile.column + j + offset);
      pixels[i][j] = p < 0 ? zeros : x.data + p * x.channels + x.first;
    }
  const int64_t stride = point_stride(row);
  for (int64_t k = 0; k < x.count; k += kLanes)
    transform<Side, kTileIn, kLanes, float>(
        f, [&](int i, int j, int lane) DX_KERNEL { return pixels[i][j][k + lane]; },
        [&](int i, int j, int lane, float number)
            DX_KERNEL { v[(i * kTileIn + j) * stride + k + lane] = number; });
}

// B^T d B of the tiles first, ..., first + count - 1 of x, to v [36, kTiles, row].
inline void transform_inputs(const Inputs& images, int64_t first, int64_t count,
                             const ChannelRange& x, const float* zeros, float* v, int64_t row) {
  const Tiles tiles(images);
  on_best_isa([&]() DX_KERNEL {
    for (int64_t t = 0; t < count; ++t)
      transform_pixels<kTileIn, -1>([](const auto& d, auto& u) DX_KERNEL { winograd_input(d, u); },
                                    images, Tile(tiles, first + t), x, zeros, v + t * row, row);
  });
}

}  // namespace dx
