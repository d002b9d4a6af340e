// conv3d: convolutions of images that move, of filters that were laid out before, by the ways of
// conv2d.cpp and conv3x3.cpp. Those want channels_last_3d, [B, T, H, W, C]; what lies
// otherwise is transposed on the way in, and on the way out where that is asked for.
#include "../math/winograd.h"
#include "convolution.h"

namespace dx {
namespace {

enum class To { pixels, planes };

// Pixels [B, P, C] from planes [B, C, P], or these from those. Of 16 channels and 64 pixels at a
// time, through a square beside them: lines a power of two apart, as planes often are, drive each
// other out of the first-level cache before all of a line is used.
template <To to, class T>
void transpose(int64_t batch, int64_t channels, int64_t pixels, const T* from, T* result) {
  constexpr int64_t high = 64, wide = 16;
  const int64_t down = ceil_div(pixels, high), of_image = down * ceil_div(channels, wide);
  share_work(batch * of_image, 16, [=](int64_t begin, int64_t end) {
    T square[high][wide];
    for (int64_t n = begin; n < end; ++n) {
      const int64_t p = n % down * high, c = n % of_image / down * wide;
      const int64_t rows = std::min(high, pixels - p), columns = std::min(wide, channels - c);
      const int64_t image = n / of_image * channels * pixels;
      const int64_t pixel = image + p * channels + c, plane = image + c * pixels + p;
      if constexpr (to == To::pixels) {
        for (int64_t j = 0; j < columns; ++j)
          for (int64_t i = 0; i < rows; ++i) square[i][j] = from[plane + j * pixels + i];
        for (int64_t i = 0; i < rows; ++i)
          std::copy_n(square[i], columns, result + pixel + i * channels);
      } else {
        for (int64_t i = 0; i < rows; ++i)
          std::copy_n(from + pixel + i * channels, columns, square[i]);
        for (int64_t j = 0; j < columns; ++j)
          for (int64_t i = 0; i < rows; ++i) result[plane + j * pixels + i] = square[i][j];
      }
    }
  });
}

Tensor new_in(const Tensor& like, IntHeaderOnlyArrayRef sizes, Layout layout) {
  return in_huge_pages(fresh_strided(like, sizes, strides_in(sizes, layout), dtype_of(like)));
}

// `from` [B, C, T, H, W] in the other layout.
template <To to>
Tensor transposed(const Tensor& from) {
  const Tensor result =
      new_in(from, from.sizes(), to == To::pixels ? Layout::channels_last : Layout::contiguous);
  dispatch_floating(from.scalar_type(), "conv3d", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    transpose<to>(from.size(0), from.size(1), from.size(2) * from.size(3) * from.size(4),
                  data_of<T>(from), static_cast<T*>(result.mutable_data_ptr()));
  });
  return result;
}

// x [B, C, T, H, W] as [B, T, H, W, C].
Tensor moving_pixels_of(const char* name, const Tensor& x) {
  check_floating(name, x);
  STD_TORCH_CHECK(x.dim() == 5, name, ": wanted shape [B, C, T, H, W]");
  return fits(x, Layout::channels_last) ? x : transposed<To::pixels>(as_contiguous(x));
}

Tensor conv3d(const Tensor& x_, const Tensor& filters_, const MaybeTensor& bias_,
              const MaybeTensor& residual_, int64_t channels, int64_t stride_time,
              int64_t stride_high, int64_t stride_wide, int64_t padding_time, int64_t padding_high,
              int64_t padding_wide, int64_t act, double scale, bool contiguous) {
  const Tensor x = moving_pixels_of("x", x_);
  STD_TORCH_CHECK(act >= 0 && act < kActs, "act: unknown");
  STD_TORCH_CHECK(stride_time > 0 && stride_high > 0 && stride_wide > 0 && padding_time >= 0 &&
                      padding_high >= 0 && padding_wide >= 0 && channels >= 0,
                  "conv3d: wanted positive numbers");
  const bool winograd = filters_.dim() == 5;
  check_filters(filters_, winograd, x);
  STD_TORCH_CHECK(winograd || filters_.dim() == 6,
                  "filters: wanted what conv2d_filters or conv3x3_filters made of five dimensions");
  const Inputs in(x);
  const int64_t frames = filters_.size(winograd ? 2 : 1);
  const int64_t rows = winograd ? kFilterSide : filters_.size(2);
  const int64_t columns = winograd ? kFilterSide : filters_.size(3);
  const Filter filter{{in.frames, frames, stride_time, padding_time},
                      {in.height, rows, stride_high, padding_high},
                      {in.width, columns, stride_wide, padding_wide}};
  const int64_t numbers = winograd ? kPoints * frames : filter.taps();
  STD_TORCH_CHECK(filters_.size(0) == column_blocks(channels) &&
                      filters_.numel() == filters_.size(0) * numbers * in.channels() * kColumns,
                  "filters: wanted those of ", in.channels(), " channels to ", channels);
  STD_TORCH_CHECK(!winograd || (stride_high == 1 && stride_wide == 1),
                  "filters: those of Winograd's algorithm have stride 1 within a frame");
  STD_TORCH_CHECK(filter.time.fits() && filter.high.fits() && filter.wide.fits(),
                  "x: wanted images at least as large as the filters");
  if (winograd) check_lanes("x", x);
  const Strides sizes{x.size(0), channels, filter.time.outputs(), filter.high.outputs(),
                      filter.wide.outputs()};
  const MaybeTensor residual =
      map(residual_, [](const Tensor& t) { return moving_pixels_of("residual", t); });
  if (residual) check_same_kind("residual", *residual, x);
  STD_TORCH_CHECK(!residual || same_sizes(residual->sizes(), sizes),
                  "residual: wanted the outputs' shape");
  const Tensor filters = as_contiguous(filters_), y = new_in(x, sizes, Layout::channels_last);
  const MaybeTensor bias = checked_bias(bias_, channels, x);
  const Convolution c{
      in,
      filter,
      LaidOut(filters),
      {Target(y), channels, data_of<float>(bias), source_of(residual), float(scale), Act(act)}};
  if (winograd)
    convolve_by_winograd(c);
  else
    convolve_directly(c);
  return contiguous ? transposed<To::planes>(y) : y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(diffusion_ext, CPU, m) { m.impl("conv3d", TORCH_BOX(&conv3d)); }

}  // namespace dx
