// What the forward and backward of group_norm_act share on the CPU: the division of the problem
// into slabs and chunks and their threads, the channels' numbers, and sums.
#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "../ops/group_norm_act.h"
#include "simd.h"
#include "threads.h"
#include "tiles.h"

namespace dx {

constexpr int64_t kChunkElements = 1 << 16;
constexpr int64_t kLanes = 32;  // sums of a run of neighbours that go on side by side
// Channels of channels_last that walk over the pixels together.
constexpr int64_t kColumns = 32;
static_assert(kColumns <= kLanes);
// What float32 adds before the sum goes on in float64: neighbours, 128 a lane, or pixels.
constexpr int64_t kRun = 4096, kPixels = 256;
// Channels of channels_last of which a tile has whole pixels: half precision is read and written in
// the order of memory, which at 320 channels of 64x64 took 0.6 of the time that columns did.
constexpr int64_t kPanel = 512;

struct Range {
  int64_t begin, end;
  DX_INLINE int64_t size() const { return end - begin; }
};

// Calls body(part) for the parts of a range, `size` long but for the last.
template <class Body>
DX_INLINE void for_each_part(Range range, int64_t size, const Body& body) {
  for (int64_t begin = range.begin; begin < range.end; begin += size)
    body(Range{begin, std::min(begin + size, range.end)});
}

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

  // Contiguous: where a part of it is.
  DX_INLINE Place place(Range part) const { return {element + part.begin, 0, 1, part.size()}; }

  // channels_last: where a panel of pixels is.
  DX_INLINE Place place(Range pixels, Range panel) const {
    return {element + pixels.begin * width + panel.begin, width, pixels.size(), panel.size()};
  }

  // Contiguous: calls body(channel, elements) for the channels that a range has a part of.
  template <class Body>
  DX_INLINE void for_each_channel(Range range, const Body& body) const {
    int64_t channel = range.begin / g.spatial;
    for (int64_t begin = range.begin; begin < range.end; ++channel) {
      const int64_t end = std::min((channel + 1) * g.spatial, range.end);
      body(channel, Range{begin, end});
      begin = end;
    }
  }

  // channels_last: calls body(panel) for every kPanel channels.
  template <class Body>
  DX_INLINE void for_each_panel(const Body& body) const {
    for_each_part({0, width}, kPanel, body);
  }
};

// How much a tile has, which is what a buffer has room for where it is not in place: neighbours, or
// pixels of a panel.
DX_INLINE int64_t tile_run(bool in_place) { return in_place ? kRun : kTileElements; }
DX_INLINE int64_t tile_pixels(Range panel, bool in_place) {
  return in_place ? kPixels : std::min(kTileElements / panel.size(), kPixels);
}

// Calls body(first channel, channels) for every kColumns channels of a panel, then for 16, 8 and 4
// of the rest, then for single ones: numbers that the compiler knows. With 16 left to the 8s, half
// types took 1.6 to 2.4 times as long at 16 channels; with 4 left to the 1s, float32 with its
// gradients 1.4 times at 4 and 12 (AVX2).
template <class Body>
DX_INLINE void for_each_column(Range panel, const Body& body) {
  int64_t k = panel.begin;
  const auto columns = [&](auto count) DX_KERNEL {
    for (; k + count <= panel.end; k += count) body(k, count);
  };
  // The registers of processors without fma keep the numbers of no more than 8 channels: by 32,
  // float32 of 320 channels took 1.7 times as long.
  if (has_fma) {
    columns(std::integral_constant<int64_t, kColumns>());
    columns(std::integral_constant<int64_t, 16>());
  }
  columns(std::integral_constant<int64_t, 8>());
  columns(std::integral_constant<int64_t, 4>());
  columns(std::integral_constant<int64_t, 1>());
}

// Calls body(chunk) for every chunk of a slab: in turn, or on all threads.
template <class Body>
void for_each_chunk(const Slab& slab, bool on_threads, const Body& body) {
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) body(chunk);
  };
  if (on_threads)
    share_work(slab.chunks(), 1, range);
  else
    range(0, slab.chunks());
}

// The sum, in order, of make(chunk) over the chunks of a slab.
template <class Make>
auto sum_chunks(const Slab& slab, bool on_threads, const Make& make) {
  using Sum = decltype(make(0));
  if (slab.chunks() == 1) return make(0);
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
  share_work(slabs, std::max<int64_t>(16384 / elements, 1), range);
}

// What normalises the channels of a slab (math/group_norm_act.h), an array [width] of each member
// of Channel.
class Channels {
  std::vector<float> values_;

 public:
  float *centre, *rstd, *residual, *gain, *offset, *slope, *intercept, *post_scale, *post_shift;

  // mean [N,G] and rstd [N,G] are the groups' statistics.
  Channels(const Slab& slab, const double* mean, const float* group_rstd)
      : values_((9 + kParameters) * slab.width) {
    float* next = values_.data();
    for (auto** p :
         {&centre, &rstd, &residual, &gain, &offset, &slope, &intercept, &post_scale, &post_shift})
      *p = next, next += slab.width;
    parameters_ = next, width_ = slab.width;
    on_best_isa([&]() DX_KERNEL { fill(slab, mean, group_rstd); });
  }
  Channels(const Channels&) = delete;

  DX_INLINE ChannelParameters parameters(int64_t k) const {
    const auto row = [&](int64_t i) DX_KERNEL { return parameters_[i * width_ + k]; };
    return {row(0), row(1), row(2), row(3), row(4), row(5), row(6)};
  }

 private:
  float* parameters_;  // [7, width], in the order of ChannelParameters
  int64_t width_;

  // Row by row, which the vector unit does: channel by channel it took a tenth of a call at 8x8.
  DX_INLINE void fill(const Slab& slab, const double* mean, const float* group_rstd) const {
    const GroupNorm& g = slab.g;
    const int64_t size = g.group_channels(), width = slab.width;
    const Parameter* const of[] = {&g.weight,     &g.bias,       &g.scale,    &g.shift,
                                   &g.post_scale, &g.post_shift, &g.pre_shift};
    for (int64_t i = 0; i < kParameters; ++i)
      of[i]->row(slab.n, slab.first, width, parameters_ + i * width);
    for (int64_t begin = 0, group = slab.n * g.groups + slab.first / size; begin < width;
         begin += size, ++group) {
      const Mean group_mean = mean_of(mean[group]);
      const float of_group = group_rstd[group];
#pragma omp simd
      for (int64_t k = begin; k < begin + size; ++k) {
        const Channel ch(parameters(k), group_mean, of_group);
        centre[k] = ch.centre, rstd[k] = ch.rstd, residual[k] = ch.residual;
        gain[k] = ch.gain, offset[k] = ch.offset;
        slope[k] = ch.slope, intercept[k] = ch.intercept;
        post_scale[k] = ch.post_scale, post_shift[k] = ch.post_shift;
      }
    }
  }
};

// The sum of N neighbours by halves, which leaves the adding to the vector unit. Each half has a
// length that the compiler knows: a loop over them took as long as the sums of 64 elements.
template <int64_t N>
DX_INLINE float sum_by_halves(const float* values) {
  if constexpr (N == 1) {
    return values[0];
  } else {
    float half[N / 2];
#pragma omp simd
    for (int64_t i = 0; i < N / 2; ++i) half[i] = values[i] + values[i + N / 2];
    return sum_by_halves<N / 2>(half);
  }
}

template <int K>
using Lanes = float[K][kLanes];

// K sums over a tile's neighbours, kLanes of each side by side in float32: body(i, lanes, lane)
// adds what element i is to lanes[k][lane].
template <int K, class Body>
DX_INLINE std::array<double, K> sum_lanes(int64_t count, const Body& body) {
  const int64_t whole = count / kLanes * kLanes;
  const auto rounds = [&](Lanes<K>& lanes) DX_KERNEL {
    for (int64_t i = 0; i < whole; i += kLanes)
#pragma omp simd
      for (int64_t lane = 0; lane < kLanes; ++lane) body(i + lane, lanes, lane);
  };
  const auto totals = [](const Lanes<K>& lanes) DX_KERNEL {
    std::array<double, K> total;
    for (int k = 0; k < K; ++k) total[k] = sum_by_halves<kLanes>(lanes[k]);
    return total;
  };
  if (whole == count) {  // apart, since then the lanes never leave the registers
    Lanes<K> lanes = {};
    rounds(lanes);
    return totals(lanes);
  }
  Lanes<K> lanes = {};
  rounds(lanes);
  for (int64_t lane = 0; whole + lane < count; ++lane) body(whole + lane, lanes, lane);
  return totals(lanes);
}

// K float64 sums of each channel of a slab.
template <int K>
class ChannelSums {
 public:
  explicit ChannelSums(int64_t channels) : channels_(channels), values_(K * channels) {}

  double& at(int k, int64_t channel) { return values_[k * channels_ + channel]; }

  // To sum k of channels [first, first + count).
  DX_INLINE void add(int k, int64_t first, int64_t count, const float* __restrict values) {
    double* __restrict to = values_.data() + k * channels_ + first;
    for (int64_t i = 0; i < count; ++i) to[i] += values[i];
  }

  ChannelSums& operator+=(const ChannelSums& other) {
    for (size_t i = 0; i < values_.size(); ++i) values_[i] += other.values_[i];
    return *this;
  }

 private:
  int64_t channels_;
  std::vector<double> values_;
};

}  // namespace dx
