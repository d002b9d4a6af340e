// What the elementwise ops share on the CPU: walking a batch in blocks on all threads, and normal
// noise for a block, counted in logical (C, H, W) order whatever the memory layout.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../common.h"
#include "../math/normal.h"
#include "../math/philox.h"
#include "blocks.h"
#include "simd.h"

namespace dx {

constexpr int kBlock = 64;              // elements, and 16 Philox counters: a vector of each word
constexpr int64_t kTile = 16 * kBlock;  // about the elements of a tile
constexpr int64_t kGrain = 8 * kTile;   // the least work worth waking another thread for

// Calls body(sample, begin, end, scratch) for every tile of every sample, on all threads: [begin,
// end) counts elements in memory order. A channels_last tile is whole rows of C. scratch holds
// end - begin floats.
template <class Body>
void for_each_tile(const Batch& batch, const Body& body) {
  if (batch.samples == 0 || batch.per_sample() == 0) return;
  const int64_t row = batch.channels;  // 1 where contiguous
  const int64_t tile = row * std::max<int64_t>(kTile / row, 1);
  const int64_t tiles = (batch.per_sample() + tile - 1) / tile;
  const int64_t grain = std::max<int64_t>(kGrain / std::min(tile, batch.per_sample()), 1);
  torch::stable::parallel_for(0, batch.samples * tiles, grain, [&](int64_t first, int64_t last) {
    std::vector<float> scratch(batch.layout == Layout::channels_last ? tile : 0);
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % tiles * tile;
      const int64_t end = std::min(begin + tile, batch.per_sample());
      on_best_isa([&]() DX_KERNEL { body(i / tiles, begin, end, scratch.data()); });
    }
  });
}

// Calls body(i, count) for the blocks of [begin, end); count is a constant for all but the last.
template <class Body>
DX_INLINE void for_each_block(int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + kBlock <= end; i += kBlock) body(i, int64_t{kBlock});
  if (i < end) body(i, end - i);
}

// The noise of one sample: its seed, and the step and stream words of the counter.
struct NormalKey {
  uint64_t seed;
  uint32_t step, stream;
};

// The 64 normals of elements [element, element + 64); element is a multiple of 64.
DX_INLINE void normal_block(const NormalKey& key, int64_t element, float* __restrict z) {
  const uint64_t block = uint64_t(element) / 4;
  const uint32_t low = uint32_t(block), high = uint32_t(block >> 32);
  for (uint32_t i = 0; i < kBlock / 4; ++i) {  // low is a multiple of 16: low + i does not carry
    const Words4 w =
        philox4x32({low + i, high, key.step, key.stream}, uint32_t(key.seed), key.seed >> 32);
    box_muller(w.r0, w.r1, z[4 * i], z[4 * i + 1]);
    box_muller(w.r2, w.r3, z[4 * i + 2], z[4 * i + 3]);
  }
}

// The normals of a channels_last tile: rows [begin/C, end/C), every channel, in memory order.
DX_INLINE void normal_rows(const NormalKey& key, const Batch& batch, int64_t begin, int64_t end,
                           float* __restrict out) {
  const int64_t channels = batch.channels;
  const int64_t first = begin / channels, last = end / channels;
  float z[kBlock];
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t from = c * batch.spatial + first, to = c * batch.spatial + last;
    for (int64_t element = from / kBlock * kBlock; element < to; element += kBlock) {
      normal_block(key, element, z);
      const int64_t low = std::max(from, element), high = std::min<int64_t>(to, element + kBlock);
      for (int64_t e = low; e < high; ++e) out[(e - from) * channels + c] = z[e - element];
    }
  }
}

// Gives a tile's noise block by block, made on the way where the layout allows it.
class TileNoise {
 public:
  DX_INLINE TileNoise(const NormalKey& key, const Batch& batch, int64_t begin, int64_t end,
                      float* scratch)
      : key_(key), begin_(begin), rows_(nullptr) {
    if (batch.layout == Layout::channels_last) {
      normal_rows(key, batch, begin, end, scratch);
      rows_ = scratch;
    }
  }
  DX_INLINE void operator()(int64_t i, int64_t count, float* __restrict z) const {
    if (rows_ == nullptr) return normal_block(key_, i, z);
    for (int64_t k = 0; k < count; ++k) z[k] = rows_[i - begin_ + k];
  }

 private:
  NormalKey key_;
  int64_t begin_;
  const float* rows_;
};

}  // namespace dx
