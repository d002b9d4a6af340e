// What the forward and backward of group_norm_act share on the CPU: the division of the problem
// into slabs and chunks and their threads, the channels' numbers, and sums.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "../ops/group_norm_act.h"
#include "blocks.h"
#include "simd.h"

namespace dx {

constexpr int64_t kChunkElements = 1 << 16;
constexpr int64_t kLanes = 32;  // sums of a run of neighbours that go on side by side
// Channels of channels_last that walk over the pixels together.
constexpr int64_t kColumns = 32;
static_assert(kColumns <= kLanes);
// What float32 adds before the sum goes on in float64: neighbours, 128 a lane, or pixels.
constexpr int64_t kRun = 4096, kPixels = 256;

struct Range {
  int64_t begin, end;
};

// What is normalised in one go: contiguous, a group of a sample; channels_last, a sample, whose
// groups interleave. It is a sequence of units, which are elements of channels that follow one
// another, or pixels of `width` channels. They are gathered in chunks, the unit of threads within a
// slab and of the order of summation, so that no result depends on the number of threads.
struct Slab {
  const GroupNorm& g;
  int64_t n, first, width;  // sample; channels [first, first + width)
  int64_t element;          // the first
  int64_t units, units_per_chunk;

  DX_INLINE Slab(const GroupNorm& g, int64_t index) : g(g) {
    const bool contiguous = g.layout == Layout::contiguous;
    n = contiguous ? index / g.groups : index;
    width = contiguous ? g.group_channels() : g.channels;
    first = contiguous ? index % g.groups * width : 0;
    element = (n * g.channels + first) * g.spatial;
    units = contiguous ? width * g.spatial : g.spatial;
    units_per_chunk = contiguous ? kChunkElements : std::max<int64_t>(kChunkElements / width, 1);
  }

  DX_INLINE int64_t chunks() const { return (units + units_per_chunk - 1) / units_per_chunk; }
  DX_INLINE Range chunk(int64_t i) const {
    return {i * units_per_chunk, std::min((i + 1) * units_per_chunk, units)};
  }

  // Contiguous: calls body(channel, elements) for the channels that a range has a part of.
  template <class Body>
  DX_INLINE void for_each_channel(Range range, const Body& body) const {
    for (int64_t begin = range.begin; begin < range.end;) {
      const int64_t channel = begin / g.spatial;
      const int64_t end = std::min((channel + 1) * g.spatial, range.end);
      body(channel, Range{begin, end});
      begin = end;
    }
  }

  // channels_last: calls body(first channel, channels) for every kColumns channels, then for 16, 8
  // and 4 of the rest, then for single ones: numbers that the compiler knows. With 16 left to the
  // 8s, half types took 1.6 to 2.4 times as long at 16 channels; with 4 left to the 1s, float32
  // with its gradients 1.4 times at 4 and 12 (AVX2).
  template <class Body>
  DX_INLINE void for_each_column(const Body& body) const {
    int64_t k = 0;
    const auto columns = [&](auto count) DX_KERNEL {
      for (; k + count <= width; k += count) body(k, count);
    };
    columns(std::integral_constant<int64_t, kColumns>());
    columns(std::integral_constant<int64_t, 16>());
    columns(std::integral_constant<int64_t, 8>());
    columns(std::integral_constant<int64_t, 4>());
    columns(std::integral_constant<int64_t, 1>());
  }
};

// Calls body(chunk) for every chunk of a slab: in turn, or on all threads.
template <class Body>
void for_each_chunk(const Slab& slab, bool on_threads, const Body& body) {
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) body(chunk);
  };
  if (on_threads)
    torch::stable::parallel_for(0, slab.chunks(), 1, range);
  else
    range(0, slab.chunks());
}

// The sum, in order, of make(chunk) over the chunks of a slab.
template <class Make>
auto sum_chunks(const Slab& slab, bool on_threads, const Make& make) {
  using Sum = decltype(make(0));
  std::vector<std::optional<Sum>> partial(slab.chunks());
  for_each_chunk(slab, on_threads, [&](int64_t chunk) { partial[chunk] = make(chunk); });
  for (int64_t chunk = 1; chunk < slab.chunks(); ++chunk) *partial[0] += *partial[chunk];
  return std::move(*partial[0]);
}

// Calls body(slab, on_threads) for every slab. The threads share the slabs where there are enough
// of them; else on_threads says that they are to share each slab's chunks.
template <class Body>
void for_each_slab(const GroupNorm& g, const Body& body) {
  if (g.elements() == 0) return;
  const int64_t slabs = g.layout == Layout::contiguous ? g.samples * g.groups : g.samples;
  const int64_t elements = g.elements() / slabs;
  const bool few = slabs < 2 * int64_t(torch::stable::get_num_threads());
  const bool on_threads = few && elements >= 2 * kChunkElements;
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(Slab(g, i), on_threads);
  };
  if (on_threads) return range(0, slabs);
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
    on_best_isa([&]() DX_KERNEL { fill(slab, mean, group_rstd); });
  }
  Channels(const Channels&) = delete;

 private:
  DX_INLINE void fill(const Slab& slab, const double* mean, const float* group_rstd) const {
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
};

// K sums over a run of neighbours, kLanes of each side by side in float32.
template <int K>
struct LaneSums {
  float lanes[K][kLanes] = {};

  // By halves, which leaves the adding to the vector unit.
  DX_INLINE double total(int k) {
    for (int64_t half = kLanes / 2; half > 0; half /= 2)
      for (int64_t i = 0; i < half; ++i) lanes[k][i] += lanes[k][i + half];
    return lanes[k][0];
  }
};

// Calls body(i, lane) for every i of the range; the full rounds of kLanes are loops of constant
// length, whose lanes stay in registers.
template <class Body>
DX_INLINE void for_each_lane(Range range, const Body& body) {
  int64_t begin = range.begin;
  for (; begin + kLanes <= range.end; begin += kLanes)
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) body(begin + lane, lane);
  for (int64_t lane = 0; begin + lane < range.end; ++lane) body(begin + lane, lane);
}

// K float64 sums of each channel of a slab.
template <int K>
class ChannelSums {
 public:
  explicit ChannelSums(int64_t channels) : channels_(channels), values_(K * channels) {}

  double& at(int k, int64_t channel) { return values_[k * channels_ + channel]; }

  ChannelSums& operator+=(const ChannelSums& other) {
    for (size_t i = 0; i < values_.size(); ++i) values_[i] += other.values_[i];
    return *this;
  }

 private:
  int64_t channels_;
  std::vector<double> values_;
};

}  // namespace dx
