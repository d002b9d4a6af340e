// What the CPU's convolutions share: how they read images, multiply in registers, write what they
// have summed up, and divide the work among threads.
//
// Output channels are computed kColumns at a time, and filters lie so: [K / 32 rounded up, taps, C,
// 32] with zeros beyond the last channel, where the taps are the filter's pixels or, by Winograd's
// algorithm, the 36 numbers that it multiplies with.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>

#include "../common.h"
#include "../math/activation.h"
#include "products.h"
#include "simd.h"
#include "threads.h"
#include "tiles.h"

namespace dx {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t column_blocks(int64_t channels) { return ceil_div(channels, kColumns); }

// --- what is read --------------------------------------------------------------------------------

// Images [B, T, H, W, channels], of T = 1 frame where they do not move.
struct Part {
  Source data;
  int64_t channels;

  // Neighbouring pixels as float32: where they lie or, of half precision, widened in the buffer.
  DX_INLINE const float* view(int64_t first, int64_t count, float* buffer) const {
    return data.view({first * channels, 0, 1, count * channels}, buffer).at;
  }
};

// Images as the filters see them: of one tensor or two, whose channels follow one another, each
// pixel `repeat` times in both directions (nearest upsampling). Neither is written down.
struct Inputs {
  Part parts[2];
  int64_t batch, frames, height, width, repeat;

  explicit Inputs(const Tensor& x, const MaybeTensor& skip = std::nullopt, int64_t repeat = 1)
      : parts{{Source(x), x.size(1)}, {Source(skip ? *skip : x), skip ? skip->size(1) : 0}},
        batch(x.size(0)),
        frames(x.dim() == 5 ? x.size(2) : 1),
        height(x.size(x.dim() - 2) * repeat),
        width(x.size(x.dim() - 1) * repeat),
        repeat(repeat) {}
  // Whether kernels read the tensors themselves, which are float32.
  bool in_place() const { return parts[0].data.in_place(); }
  int64_t channels() const { return parts[0].channels + parts[1].channels; }
  int64_t count() const { return parts[1].channels > 0 ? 2 : 1; }

  // Where row h of frame t of image b begins in the tensors, in pixels, and which pixel of it is w;
  // -1 outside the image.
  DX_INLINE int64_t row(int64_t b, int64_t t, int64_t h) const {
    if (t < 0 || t >= frames || h < 0 || h >= height) return -1;
    const int64_t frame = b * frames + t;
    if (repeat == 1) return (frame * height + h) * width;
    return (frame * (height / repeat) + h / repeat) * (width / repeat);
  }
  DX_INLINE int64_t column(int64_t w) const {
    if (w < 0 || w >= width) return -1;
    return repeat == 1 ? w : w / repeat;
  }
};

// The filters' way over the images in one direction, in which these are `size` pixels long.
struct Axis {
  int64_t size, taps = 1, stride = 1, padding = 0;
  bool fits() const { return size > 0 && size + 2 * padding >= taps; }
  int64_t outputs() const { return (size + 2 * padding - taps) / stride + 1; }
  // The first place that an output sees.
  DX_INLINE int64_t first(int64_t output) const { return output * stride - padding; }
};

// And in all three. Images that do not move have the time's defaults, of one frame.
struct Filter {
  Axis time, high, wide;
  int64_t taps() const { return time.taps * high.taps * wide.taps; }
};

// Filters that were laid out: of x's dtype, those of Winograd's algorithm float32.
struct LaidOut {
  const void* data;
  Floating dtype;

  LaidOut(const float* data) : data(data), dtype(Floating::float32) {}
  explicit LaidOut(const Tensor& t) : data(t.const_data_ptr()), dtype(floating_of("filters", t)) {}

  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

// `multiply` of products.h by filters from number `first` on.
inline void multiply(const Products& p, int64_t count, int64_t columns, const LaidOut& filters,
                     int64_t first, float* sums) {
  switch (filters.dtype) {
    case Floating::float16: return multiply(p, count, columns, filters.as<Half>() + first, sums);
    case Floating::bfloat16:
      return multiply(p, count, columns, filters.as<BFloat16>() + first, sums);
    default: return multiply(p, count, columns, filters.as<float>() + first, sums);
  }
}

// --- what is written -----------------------------------------------------------------------------

// Numbers k, ..., k + 31 of `channels`; zeros beyond them, and where there are none.
DX_INLINE void copy_columns(const float* from, int64_t channels, int64_t k, float (&to)[kColumns]) {
  std::fill_n(to, kColumns, 0.0f);
  if (from != nullptr) std::copy_n(from + k, std::min<int64_t>(kColumns, channels - k), to);
}

// y = scale (act(sum + bias) + residual), [B, T, H, W, channels], rounded once.
struct Outputs {
  Target y;
  int64_t channels;
  const float* bias;
  std::optional<Source> residual;
  float scale;
  Act act;
};

// Channels of a pixel, from their sums.
template <Act act, class Count>
DX_INLINE void write(Count count, float scale, const float* __restrict sums,
                     const float* __restrict bias, const float* __restrict residual,
                     float* __restrict y) {
  float derivative;
  if (residual == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) y[i] = scale * activate<act>(sums[i] + bias[i], derivative);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      y[i] = scale * (activate<act>(sums[i] + bias[i], derivative) + residual[i]);
  }
}

// Channels k, k + 1, ..., up to kColumns of them, of `count` neighbouring pixels, from their sums
// [count, 32].
template <Act act>
DX_INLINE void write_pixels(const Outputs& out, int64_t first, int64_t count, int64_t k,
                            const float* sums, const float* bias) {
  constexpr int64_t most = kTileElements / kColumns;
  TileBuffer of_y, of_residual;
  const int64_t columns = std::min<int64_t>(kColumns, out.channels - k);
  for (int64_t n = 0; n < count; n += most) {
    const Place place{(first + n) * out.channels + k, out.channels, std::min(most, count - n),
                      columns};
    const Tile<float> y = out.y.place(place, of_y);
    Tile<const float> residual{nullptr, 0};
    if (out.residual) residual = out.residual->view(place, of_residual);
    for (int64_t r = 0; r < place.rows; ++r) {
      const float *from = sums + (n + r) * kColumns, *added = residual.at + r * residual.stride;
      float* to = y.at + r * y.stride;
      if (columns == kColumns)
        write<act>(std::integral_constant<int64_t, kColumns>(), out.scale, from, bias, added, to);
      else
        write<act>(columns, out.scale, from, bias, added, to);
    }
    out.y.keep(y, place);
  }
}

// --- threads -------------------------------------------------------------------------------------

// The work of a convolution, `units` (pixels or tiles) times `columns` blocks of channels, as a
// grid of tasks, `groups` of them side by side.
struct Grid {
  int64_t units, columns, size, group_size, groups, tasks;

  // Of at most `most` units a task. A thread reads the filters of its columns once for each of its
  // tasks, which takes as long as kReading units' products, and its units once for each group. The
  // numbers are what ran a ContextUnet of one picture fastest, of 1 to 8 on two cores.
  Grid(int64_t units, int64_t most, int64_t columns) : units(units), columns(columns) {
    constexpr double kReading = 1, kUnit = 0.5;
    const int64_t threads = torch::stable::get_num_threads();
    double best = std::numeric_limits<double>::infinity();
    for (int64_t wanted = 1; wanted <= std::min(columns, threads); ++wanted) {
      const int64_t in_group = ceil_div(columns, wanted), g = ceil_div(columns, in_group);
      const int64_t fewest = std::max(ceil_div(units, most), ceil_div(threads, g));
      const int64_t rounds = ceil_div(fewest * g, threads);
      const int64_t of_units = ceil_div(units, std::max<int64_t>(rounds * threads / g, 1));
      const double cost = rounds * (in_group * (of_units + kReading) + kUnit * of_units);
      if (of_units > most || cost >= best) continue;
      best = cost, group_size = in_group, groups = g, size = of_units;
    }
    tasks = ceil_div(units, size) * groups;
  }
  DX_INLINE int64_t first(int64_t task) const { return task / groups * size; }
  DX_INLINE int64_t count(int64_t task) const { return std::min(size, units - first(task)); }
  DX_INLINE int64_t first_column(int64_t task) const { return task % groups * group_size; }
  DX_INLINE int64_t end_column(int64_t task) const {
    return std::min(columns, first_column(task) + group_size);
  }
};

// Uninitialised floats that begin where a line of the cache does, as vectors are read fastest.
constexpr int64_t kLine = 16;  // floats
struct FreeScratch {
  void operator()(float* p) const { ::operator delete(p, std::align_val_t(kLine * sizeof(float))); }
};
using Scratch = std::unique_ptr<float[], FreeScratch>;
inline Scratch new_scratch(int64_t size) {
  constexpr std::align_val_t line{kLine * sizeof(float)};
  Scratch scratch(static_cast<float*>(::operator new(size * sizeof(float), line)));
  ask_huge_pages(scratch.get(), size * sizeof(float));
  return scratch;
}

// Calls body(begin, end, scratch) on all threads for ranges that cover [0, count), with `size`
// floats for each thread. The caller's: what a thread of the pool allocates stays in an arena of
// its own.
template <class Body>
void share_with_scratch(int64_t count, int64_t size, const Body& body) {
  const int64_t own = ceil_div(size, kLine) * kLine;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  const Scratch scratch = new_scratch(threads * own);
  share_work(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      body(count * thread / threads, count * (thread + 1) / threads, scratch.get() + thread * own);
  });
}

// The same with body(i, scratch) for each i.
template <class Body>
void for_each_with_scratch(int64_t count, int64_t size, const Body& body) {
  share_with_scratch(count, size, [&](int64_t begin, int64_t end, float* scratch) {
    for (int64_t i = begin; i < end; ++i) body(i, scratch);
  });
}

// --- arguments -----------------------------------------------------------------------------------

inline void check_float32(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float, name,
                  ": wanted float32 on the CPU");
}

// Of float32, float16 or bfloat16.
inline void check_floating(const char* name, const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(t.is_cpu() && (dtype == ScalarType::Float || dtype == ScalarType::Half ||
                                 dtype == ScalarType::BFloat16),
                  name, ": wanted float32, float16 or bfloat16 on the CPU");
}

// x [B, C, H, W] as [B, H, W, C].
inline Tensor pixels_of(const char* name, const Tensor& x) {
  check_floating(name, x);
  STD_TORCH_CHECK(x.dim() == 4, name, ": wanted shape [B, C, H, W]");
  return fits(x, Layout::channels_last)
             ? x
             : torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
}

// The weights of `count` output channels, `stride` from one to the next.
template <class From, class To>
DX_INLINE void load_columns(const From* __restrict weight, int64_t stride, int64_t count,
                            To* __restrict columns) {
  if (stride == 1)
    for (int64_t i = 0; i < count; ++i) columns[i] = weight[i];
  else
    for (int64_t i = 0; i < count; ++i) columns[i] = weight[i * stride];
}

// Winograd's transforms take channels in lanes.
constexpr int kLanes = 16;

inline void check_lanes(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.size(1) % kLanes == 0, name, ": wanted channels in multiples of ", kLanes);
}

inline void check_filters(const Tensor& filters, bool winograd, const Tensor& x) {
  if (winograd)
    check_float32("filters", filters);
  else
    check_same_kind("filters", filters, x);
}

// As float32, of x's dtype.
inline MaybeTensor checked_bias(const MaybeTensor& bias, int64_t channels, const Tensor& x) {
  if (!bias) return bias;
  check_same_kind("bias", *bias, x);
  STD_TORCH_CHECK(bias->dim() == 1 && bias->numel() == channels, "bias: wanted shape [", channels,
                  "]");
  const Tensor dense = as_contiguous(*bias);
  if (dense.scalar_type() == ScalarType::Float) return dense;
  const Tensor wide = fresh(dense, dense.sizes(), aoti_torch_dtype_float32());
  Source(dense).view({0, 0, 1, channels}, static_cast<float*>(wide.mutable_data_ptr()));
  return wide;
}

inline std::optional<Source> source_of(const MaybeTensor& t) {
  return t ? std::optional(Source(*t)) : std::nullopt;
}

// [B, channels, height, width], channels_last.
inline Tensor new_images(const Tensor& like, int64_t batch, int64_t channels, int64_t height,
                         int64_t width) {
  const int64_t row = width * channels;
  return in_huge_pages(fresh_strided(like, {batch, channels, height, width},
                                     {height * row, 1, row, channels}, dtype_of(like)));
}

// --- the op and its algorithms -------------------------------------------------------------------

// conv2d.cpp: scale (act(convolution(x beside skip, each pixel `repeat` times) + bias) + residual)
// of filters that conv2d_filters, conv3x3_filters (of four dimensions) or, where side > 1,
// conv2d_filters of a transposed weight of that side made.
Tensor conv2d(const Tensor& x, const MaybeTensor& skip, const Tensor& filters,
              const MaybeTensor& bias, const MaybeTensor& residual, int64_t channels,
              int64_t stride_high, int64_t stride_wide, int64_t padding_high, int64_t padding_wide,
              int64_t repeat, int64_t side, int64_t act, double scale);

// A convolution: the inputs, the filters' way over them, the filters, and what becomes of the sums.
struct Convolution {
  Inputs in;
  Filter filter;
  LaidOut filters;
  Outputs out;
};

// conv2d.cpp: filters [K / 32 rounded up, taps, C, 32] of x's dtype, of any size and stride. side >
// 1: transposed ones of that stride, to y [B, T, H side, W side, K].
void convolve_directly(const Convolution& c, int64_t side = 1);

// conv3x3.cpp: float32 filters [K / 32 rounded up, 36, T C, 32] of T frames of 3x3, of stride 1 in
// these.
void convolve_by_winograd(const Convolution& c);

}  // namespace dx
