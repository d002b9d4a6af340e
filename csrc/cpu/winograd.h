// Tiles of images [B, T, H, W, channels] and their transforms (math/winograd.h), as the CPU's 3x3
// convolutions and their gradients walk over them.
#pragma once

#include "../math/winograd.h"
#include "convolution.h"

namespace dx {

constexpr int kTiles = 32;  // of a block, at the most

// What lies between the transforms' 36 matrices [tiles, row]. A line more than they take: at
// powers of two, lines of all 36 would fall into the same few places of the first-level cache.
constexpr int64_t point_stride(int64_t row, int64_t tiles = kTiles) { return tiles * row + 16; }

// The tiles of images, 4x4 pixels of the outputs each: of all frames in one place after the other.
struct Tiles {
  int64_t frames, high, wide, count;
  Tiles(int64_t batch, int64_t frames, int64_t height, int64_t width)
      : frames(frames),
        high(ceil_div(height, kTileOut)),
        wide(ceil_div(width, kTileOut)),
        count(batch * frames * high * wide) {}
};

// 4x4 pixels from (row, column) of frame t of image b on.
struct ImageTile {
  int64_t b, t, row, column;
  DX_INLINE ImageTile(const Tiles& tiles, int64_t i) : t(i % tiles.frames) {
    const int64_t place = i / tiles.frames;
    b = place / (tiles.high * tiles.wide);
    row = place / tiles.wide % tiles.high * kTileOut;
    column = place % tiles.wide * kTileOut;
  }
};

// A one-dimensional transform f of From numbers to To, of the rows of a matrix and then of its
// columns, for as many matrices side by side as there are lanes: load(i, j, lane) gives the
// numbers, store(i, j, lane, number) takes them.
template <int From, int To, int Lanes, class T, class F, class Load, class Store>
DX_INLINE void transform(const F& f, const Load& load, const Store& store) {
  alignas(64) T half[From][To][Lanes];
// Unrolled, it would hold the addresses of all pixels in registers, which spill.
#pragma GCC unroll 1
  for (int i = 0; i < From; ++i)
#pragma omp simd
    for (int lane = 0; lane < Lanes; ++lane) {
      T from[From], to[To];
      for (int j = 0; j < From; ++j) from[j] = load(i, j, lane);
      f(from, to);
      for (int j = 0; j < To; ++j) half[i][j][lane] = to[j];
    }
#pragma GCC unroll 1
  for (int j = 0; j < To; ++j)
#pragma omp simd
    for (int lane = 0; lane < Lanes; ++lane) {
      T from[From], to[To];
      for (int i = 0; i < From; ++i) from[i] = half[i][j][lane];
      f(from, to);
      for (int i = 0; i < To; ++i) store(i, j, lane, to[i]);
    }
}

// The way of a 3x3 filter of stride 1 and padding 1 over images that do not move.
inline Filter filter_3x3(const Inputs& images) {
  return {{1}, {images.height, kFilterSide, 1, 1}, {images.width, kFilterSide, 1, 1}};
}

// Neighbouring channels of images [B, T, H, W, channels]: `count` from `first` on, multiples of
// kLanes.
struct ChannelRange {
  Part images;
  int64_t first, count;
};

// The 36 numbers of each channel of Side x Side pixels, the tile's first ones, to v, `stride` from
// one to the next. Outside the image are zeros, `count` of them. wide: room for the pixels where
// they are not float32.
template <int Side, class F>
DX_INLINE void transform_pixels(const F& f, const Inputs& images, const ImageTile& tile,
                                const ChannelRange& x, const float* zeros, float* wide, float* v,
                                int64_t stride) {
  const float* pixels[Side][Side];
  const int64_t channels = x.images.channels;
  int64_t columns[Side];
  for (int j = 0; j < Side; ++j) columns[j] = images.column(tile.column + j);
  const int64_t left = images.column(std::max<int64_t>(tile.column, 0));
  const int64_t right = images.column(std::min(tile.column + Side, images.width) - 1);
  const bool outside = left < 0 || right < 0;
  for (int i = 0; i < Side; ++i, wide += Side * channels) {
    const int64_t row = outside ? -1 : images.row(tile.b, tile.t, tile.row + i);
    const float* of_row = zeros;
    if (row >= 0) of_row = x.images.view(row + left, right - left + 1, wide) + x.first;
    for (int j = 0; j < Side; ++j)
      pixels[i][j] = row < 0 || columns[j] < 0 ? zeros : of_row + (columns[j] - left) * channels;
  }
  for (int64_t k = 0; k < x.count; k += kLanes)
    transform<Side, kTileIn, kLanes, float>(
        f, [&](int i, int j, int lane) DX_KERNEL { return pixels[i][j][k + lane]; },
        [&](int i, int j, int lane, float number)
            DX_KERNEL { v[(i * kTileIn + j) * stride + k + lane] = number; });
}

// B^T d B of what the filters see in frame t, from a tile of their outputs.
DX_INLINE void transform_input(const Inputs& images, const Filter& filter, ImageTile tile,
                               int64_t t, const ChannelRange& x, const float* zeros, float* wide,
                               float* v, int64_t stride) {
  tile.t = t;
  tile.row = filter.high.first(tile.row), tile.column = filter.wide.first(tile.column);
  transform_pixels<kTileIn>([](const auto& d, auto& u) DX_KERNEL { winograd_input(d, u); }, images,
                            tile, x, zeros, wide, v, stride);
}

}  // namespace dx
