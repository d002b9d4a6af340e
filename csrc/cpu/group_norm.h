// What the forward and backward of group_norm_act share on the CPU: the problem, its parameters,
// its division into slabs, chunks and blocks, and its sums.
#pragma once

#include <algorithm>
#include <vector>

#include "../ops/group_norm_act.h"
#include "blocks.h"
#include "simd.h"

namespace dx {

// A block: `rows` rows of `width` neighbours in memory, `pitch` elements apart, from `element` on.
// Contiguous: a row is (part of) a channel; channels_last: a row is a pixel, all its channels.
// `channel` is that of the first element, counted from the slab's first.
struct Block {
  int64_t element, channel, rows, width, pitch;
  int64_t size() const { return rows * width; }
};

constexpr int64_t kBlockElements = 1024;
constexpr int64_t kChunkElements = 1 << 16;

// What is normalised in one go: contiguous, a group; channels_last, a sample, whose groups
// interleave. Its blocks are gathered in chunks, the unit of threads within a slab and of the order
// of summation, so that the result does not depend on the number of threads.
struct Slab {
  const GroupNorm& g;
  int64_t n, first, width;  // sample; channels [first, first + width)
  int64_t rows_per_block, cols_per_block, blocks, blocks_per_chunk;

  Slab(const GroupNorm& g, int64_t index) : g(g) {
    const bool contiguous = g.layout == Layout::contiguous;
    n = contiguous ? index / g.groups : index;
    width = contiguous ? g.group_channels() : g.channels;
    first = contiguous ? index % g.groups * width : 0;
    cols_per_block = contiguous ? std::min(g.spatial, kBlockElements) : g.channels;
    rows_per_block = std::max<int64_t>(kBlockElements / cols_per_block, 1);
    blocks = pieces(rows(), rows_per_block) * pieces(cols(), cols_per_block);
    blocks_per_chunk = std::max<int64_t>(kChunkElements / (rows_per_block * cols_per_block), 1);
  }

  static int64_t pieces(int64_t extent, int64_t step) { return (extent + step - 1) / step; }
  int64_t rows() const { return g.layout == Layout::contiguous ? width : g.spatial; }
  int64_t cols() const { return g.layout == Layout::contiguous ? g.spatial : width; }
  int64_t chunks() const { return pieces(blocks, blocks_per_chunk); }

  DX_INLINE Block block(int64_t i) const {
    const int64_t across = pieces(cols(), cols_per_block);
    const int64_t row = i / across * rows_per_block, col = i % across * cols_per_block;
    return {(n * g.channels + first) * g.spatial + row * cols() + col,
            g.layout == Layout::contiguous ? row : col, std::min(rows_per_block, rows() - row),
            std::min(cols_per_block, cols() - col), cols()};
  }

  // Calls body(block) for the blocks of a chunk.
  template <class Body>
  DX_INLINE void for_each_block(int64_t chunk, const Body& body) const {
    const int64_t end = std::min((chunk + 1) * blocks_per_chunk, blocks);
    for (int64_t i = chunk * blocks_per_chunk; i < end; ++i) body(block(i));
  }

  // Calls body(chunk) for every chunk, on all threads unless the slabs themselves keep them busy.
  template <class Body>
  void for_each_chunk(const Body& body) const {
    torch::stable::parallel_for(0, chunks(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) body(chunk);
    });
  }
};

// Calls body(slab) for every slab: on all threads where there are enough slabs, else in turn, with
// the threads at work on the slab's chunks (a nested parallel_for runs in its caller's thread).
template <class Body>
void for_each_slab(const GroupNorm& g, const Body& body) {
  if (g.samples * g.channels * g.spatial == 0) return;
  const int64_t slabs = g.layout == Layout::contiguous ? g.samples * g.groups : g.samples;
  const int64_t elements = g.samples * g.channels * g.spatial / slabs;
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(Slab(g, i));
  };
  if (slabs < 2 * int64_t(torch::stable::get_num_threads()) && elements >= 2 * kChunkElements)
    return range(0, slabs);
  torch::stable::parallel_for(0, slabs, std::max<int64_t>(16384 / elements, 1), range);
}

// What normalises the channels of a slab (math/group_norm_act.h), an array [width] of each member
// of Channel.
class Channels {
  std::vector<float> values_;

 public:
  float *centre, *rstd, *residual, *gain, *offset, *slope, *intercept, *post_scale, *post_shift;

  // mean [N,G] and rstd [N,G] are the groups' statistics.
  Channels(const Slab& slab, const double* mean, const float* group_rstd)
      : values_(9 * slab.width) {
    float* next = values_.data();
    for (auto** p :
         {&centre, &rstd, &residual, &gain, &offset, &slope, &intercept, &post_scale, &post_shift})
      *p = next, next += slab.width;
    const GroupNorm& g = slab.g;
    for (int64_t k = 0; k < slab.width; ++k) {
      const int64_t c = slab.first + k, group = slab.n * g.groups + c / g.group_channels();
      const Channel ch(g.parameters(slab.n, c), mean_of(mean[group]), group_rstd[group]);
      centre[k] = ch.centre, rstd[k] = ch.rstd, residual[k] = ch.residual;
      gain[k] = ch.gain, offset[k] = ch.offset;
      slope[k] = ch.slope, intercept[k] = ch.intercept;
      post_scale[k] = ch.post_scale, post_shift[k] = ch.post_shift;
    }
  }
  Channels(const Channels&) = delete;
};

// K sums per channel of a slab: float32 over up to 256 rows of channels_last, then float64.
template <int K>
class ChannelSums {
 public:
  explicit ChannelSums(int64_t channels)
      : channels_(channels), narrow_(K * channels), wide_(K * channels) {}

  // Where a row adds the k-th sum of every channel; after some rows, say how many.
  DX_INLINE float* narrow(int k) { return narrow_.data() + k * channels_; }
  DX_INLINE void added(int64_t rows) {
    if ((rows_ += rows) >= 256) flush();
  }
  double& total(int k, int64_t channel) { return wide_[k * channels_ + channel]; }

  void flush() {
    for (size_t i = 0; i < wide_.size(); ++i) {
      wide_[i] += narrow_[i];
      narrow_[i] = 0;
    }
    rows_ = 0;
  }
  ChannelSums& operator+=(const ChannelSums& other) {
    for (size_t i = 0; i < wide_.size(); ++i) wide_[i] += other.wide_[i];
    return *this;
  }

 private:
  int64_t channels_, rows_ = 0;
  std::vector<float> narrow_;
  std::vector<double> wide_;
};

// The sums of a slab's chunks, made on all threads and added in order. add(chunk, sums) makes one.
template <int K, class Add>
ChannelSums<K> sum_chunks(const Slab& slab, const Add& add) {
  std::vector<ChannelSums<K>> partial(slab.chunks(), ChannelSums<K>(slab.width));
  slab.for_each_chunk([&](int64_t chunk) {
    on_best_isa([&]() DX_KERNEL { add(chunk, partial[chunk]); });
    partial[chunk].flush();
  });
  for (size_t chunk = 1; chunk < partial.size(); ++chunk) partial[0] += partial[chunk];
  return std::move(partial[0]);
}

// The channel of neighbour k in row r of a block.
template <Layout layout>
DX_INLINE int64_t channel_at(const Block& b, int64_t r, int64_t k) {
  return b.channel + (layout == Layout::contiguous ? r : k);
}

}  // namespace dx
