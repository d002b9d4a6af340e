// What the elementwise ops share on the CPU: walking a batch in blocks on all threads, and normal
// noise for a block, counted in logical (C, H, W) order whatever the memory layout.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "../common.h"
#include "blocks.h"
#include "normals.h"
#include "simd.h"
#include "threads.h"

namespace dx {

constexpr int kBlock = 512;            // elements
constexpr int64_t kTile = 4 * kBlock;  // about the elements of a tile
constexpr int64_t kGrain = 4 * kTile;  // the least work worth waking another thread for

// The elements of a tile.
inline int64_t tile_of(const Batch& batch) {
  const int64_t row = batch.channels;  // 1 where contiguous
  return row * std::max<int64_t>(kTile / row, 1);
}

// Calls body(sample, begin, end, scratch) for every tile of every sample, on all threads: [begin,
// end) counts elements in memory order. A channels_last tile is whole pixels. scratch holds the
// noise of a tile and a run of one channel.
template <class Body>
void for_each_tile(const Batch& batch, const Body& body) {
  if (batch.samples == 0 || batch.per_sample() == 0) return;
  const int64_t tile = tile_of(batch);
  const int64_t tiles = (batch.per_sample() + tile - 1) / tile;
  const int64_t grain = std::max<int64_t>(kGrain / std::min(tile, batch.per_sample()), 1);
  share_work(batch.samples * tiles, grain, [&](int64_t first, int64_t last) {
    const std::unique_ptr<float[]> scratch(new float[tile + kTile]);
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % tiles * tile;
      const int64_t end = std::min(begin + tile, batch.per_sample());
      on_best_isa([&]() DX_KERNEL { body(i / tiles, begin, end, scratch.get()); });
    }
  });
}

// Calls body(i, count) for the blocks of [begin, end).
template <class Body>
DX_INLINE void for_each_block(int64_t begin, int64_t end, const Body& body) {
  for (int64_t i = begin; i < end; i += kBlock) body(i, std::min<int64_t>(kBlock, end - i));
}

// The noise of a tile, in memory order, made in scratch. Elements are counted in logical (C, H, W)
// order: a channels_last tile, rows [begin/C, end/C) of every channel, gathers a run of each.
inline const float* tile_normals(const NormalKey& key, const Batch& batch, int64_t begin,
                                 int64_t end, float* scratch) {
  if (batch.layout == Layout::contiguous) {
    fill_normals(key, begin, end - begin, scratch);
    return scratch;
  }
  const int64_t channels = batch.channels, first = begin / channels;
  const int64_t rows = end / channels - first;
  float* run = scratch + (end - begin);
  for (int64_t c = 0; c < channels; ++c) {
    fill_normals(key, c * batch.spatial + first, rows, run);
    for (int64_t r = 0; r < rows; ++r) scratch[r * channels + c] = run[r];
  }
  return scratch;
}

}  // namespace dx
