// context_unet: what an optimized ContextUnet computes between its embeddings and its output, in
// one call. Of one small picture, Python and the dispatcher took a third of the time. The layers
// are those of diffusion_ext/nn/context_unet.py (`UnetForward.predict`), their weights laid out
// before.
#include "convolution.h"
#include "normalise.h"

namespace dx {
namespace {

constexpr int kLevelConvs = 4;       // of a level: two blocks of two convolutions
constexpr int64_t kGrain = 1 << 15;  // elements that are worth a thread: torch's own number

// The convolutions in the order in which they run.
struct Layers {
  std::vector<Tensor> filters, biases;
  size_t next = 0;

  Tensor conv(const Tensor& x, Act act, const MaybeTensor& skip = std::nullopt,
              const MaybeTensor& residual = std::nullopt) {
    return run(x, skip, residual, 1, 1, act);
  }
  Tensor unpool(const Tensor& x, const MaybeTensor& skip, int64_t side) {
    return run(x, skip, std::nullopt, 0, side, Act::identity);
  }
  Tensor level(Tensor x) {
    for (int i = 0; i < kLevelConvs; ++i) x = conv(x, Act::gelu);
    return x;
  }

 private:
  Tensor run(const Tensor& x, const MaybeTensor& skip, const MaybeTensor& residual, int64_t padding,
             int64_t side, Act act) {
    const Tensor &filter = filters[next], &bias = biases[next];
    ++next;
    return conv2d(x, skip, filter, bias, residual, bias.numel(), 1, 1, padding, padding, 1, side,
                  int64_t(act), 1.0);
  }
};

// x [B, C, H, W] as pixels of C channels.
struct Pixels {
  int64_t batch, channels, height, width;
  const float* data;
  explicit Pixels(const Tensor& x)
      : batch(x.size(0)),
        channels(x.size(1)),
        height(x.size(2)),
        width(x.size(3)),
        data(data_of<float>(x)) {}
  int64_t grain() const { return std::max<int64_t>(kGrain / std::max<int64_t>(channels, 1), 1); }
};

// The largest of 2x2 pixels; a NaN is.
Tensor max_pool(const Tensor& x_) {
  const Pixels x(x_);
  const int64_t height = x.height / 2, width = x.width / 2;
  const Tensor y_ = new_images(x_, x.batch, x.channels, height, width);
  float* y = static_cast<float*>(y_.mutable_data_ptr());
  share_work(x.batch * height * width, x.grain(), [&](int64_t begin, int64_t end) {
    on_best_isa([&]() DX_KERNEL {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t row = p / width * 2 % x.height + p / (width * height) * x.height;
        const float* from = x.data + (row * x.width + p % width * 2) * x.channels;
        const float* below = from + x.width * x.channels;
#pragma omp simd
        for (int64_t c = 0; c < x.channels; ++c) {
          float most = from[c];
          for (const float other : {from[c + x.channels], below[c], below[c + x.channels]})
            most = other > most || other != other ? other : most;
          y[p * x.channels + c] = most;
        }
      }
    });
  });
  return y_;
}

// GELU of the mean over the first window x window pixels, [B, C, 1, 1].
Tensor mean_gelu(const Tensor& x_, int64_t window) {
  const Pixels x(x_);
  const Tensor y_ = new_images(x_, x.batch, x.channels, 1, 1);
  float* y = static_cast<float*>(y_.mutable_data_ptr());
  on_best_isa([&]() DX_KERNEL {
    for (int64_t b = 0; b < x.batch; ++b) {
      float* to = y + b * x.channels;
      std::fill_n(to, x.channels, 0.0f);
      for (int64_t i = 0; i < window * window; ++i) {
        const int64_t p = (b * x.height + i / window) * x.width + i % window;
#pragma omp simd
        for (int64_t c = 0; c < x.channels; ++c) to[c] += x.data[p * x.channels + c];
      }
      float derivative;
#pragma omp simd
      for (int64_t c = 0; c < x.channels; ++c)
        to[c] = activate<Act::gelu>(to[c] / float(window * window), derivative);
    }
  });
  return y_;
}

// x scale + shift, in place; scale, shift: [B or 1, C].
void modulate(const Tensor& x_, const Tensor& scale_, const Tensor& shift_) {
  const Pixels x(x_);
  const Tensor scale = as_contiguous(scale_), shift = as_contiguous(shift_);
  float* y = static_cast<float*>(x_.mutable_data_ptr());
  const int64_t of_image = x.height * x.width;
  share_work(x.batch * of_image, x.grain(), [&](int64_t begin, int64_t end) {
    on_best_isa([&]() DX_KERNEL {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t b = p / of_image * x.channels;
        const float* by = data_of<float>(scale) + (scale.size(0) == 1 ? 0 : b);
        const float* to = data_of<float>(shift) + (shift.size(0) == 1 ? 0 : b);
        float* pixel = y + p * x.channels;
#pragma omp simd
        for (int64_t c = 0; c < x.channels; ++c) pixel[c] = multiply_add(by[c], pixel[c], to[c]);
      }
    });
  });
}

// relu(GroupNorm(x)) scale + shift; scale, shift: [B or 1, C], or none.
Tensor norm_relu(const Tensor& x, int64_t groups, const Tensor& weight, const Tensor& bias,
                 double eps, const MaybeTensor& scale, const MaybeTensor& shift) {
  const MaybeTensor none;
  GroupNorm g = group_norm_of(x, layout_of(x), groups, int64_t(Act::relu), weight, bias, none, none,
                              none, none, none);
  const auto rows = [](const MaybeTensor& t, float absent) {
    if (!t) return Parameter{nullptr, Floating::float32, 0, 0, absent};
    return Parameter{t->const_data_ptr(), Floating::float32, t->size(0) == 1 ? 0 : t->stride(0),
                     t->stride(1), absent};
  };
  g.post_scale = rows(scale, 1.0f), g.post_shift = rows(shift, 0.0f);
  const Tensor y = new_like(x);
  std::vector<double> mean(g.samples * g.groups);
  std::vector<float> rstd(g.samples * g.groups);
  normalise(g, eps, data_of<float>(x), static_cast<float*>(y.mutable_data_ptr()), mean.data(),
            rstd.data());
  return y;
}

void check_rows(const char* name, const Tensor& t, int64_t batch, int64_t channels) {
  check_float32(name, t);
  STD_TORCH_CHECK(t.dim() == 2 && (t.size(0) == batch || t.size(0) == 1) && t.size(1) == channels,
                  name, ": wanted shape [", batch, " or 1, ", channels, "]");
}

// The noise in x [B, C, H, H]. scale1, shift1: [B or 1, 2n], of the map at the bottom; scale2,
// shift2: [B or 1, n]. filters, biases: of the 23 convolutions. norms: weight and bias of the two
// GroupNorms of `groups` groups. shortcut: what is added to the second convolution, 0: nothing, 1:
// x, 2: the first one. window: of the mean at the bottom.
Tensor context_unet(const Tensor& x, const Tensor& scale1, const Tensor& shift1,
                    const Tensor& scale2, const Tensor& shift2, std::vector<Tensor> filters,
                    std::vector<Tensor> biases, const std::vector<Tensor>& norms, int64_t groups,
                    double eps, int64_t shortcut, int64_t window) {
  constexpr size_t kConvs = 2 + 2 * kLevelConvs + 1 + 2 * (1 + kLevelConvs) + 2;
  STD_TORCH_CHECK(filters.size() == kConvs && biases.size() == kConvs && norms.size() == 4,
                  "filters, biases: wanted ", kConvs, " of each, and 4 norms");
  check_float32("x", x);
  STD_TORCH_CHECK(x.dim() == 4 && x.size(2) == x.size(3) && x.size(2) >= 4 && x.size(2) % 4 == 0,
                  "x: wanted shape [B, C, H, H], H a multiple of 4");
  const int64_t bottom = x.size(2) / 4;
  STD_TORCH_CHECK(window > 0 && window <= bottom, "window: wanted at most ", bottom);
  const int64_t narrow = biases[0].numel(), wide = biases[2 * kLevelConvs].numel();
  for (const auto& [name, t] : {std::pair("scale1", &scale1), std::pair("shift1", &shift1)})
    check_rows(name, *t, x.size(0), wide);
  for (const auto& [name, t] : {std::pair("scale2", &scale2), std::pair("shift2", &shift2)})
    check_rows(name, *t, x.size(0), narrow);
  Layers layers{std::move(filters), std::move(biases)};

  const Tensor first = layers.conv(x, Act::gelu);
  const MaybeTensor residual = shortcut == 0   ? std::nullopt
                               : shortcut == 1 ? MaybeTensor(x)
                                               : MaybeTensor(first);
  const Tensor top = layers.conv(first, Act::gelu, std::nullopt, residual);  // [B, n, H, H]
  const Tensor down1 = max_pool(layers.level(top));                          // [B, n, H/2, H/2]
  const Tensor down2 = max_pool(layers.level(down1));                        // [B, 2n, H/4, H/4]
  const Tensor hidden = layers.unpool(mean_gelu(down2, window), std::nullopt, bottom);
  const Tensor up1 = norm_relu(hidden, groups, norms[0], norms[1], eps, scale1, shift1);
  const Tensor up2 = layers.level(layers.unpool(up1, down2, 2));  // [B, n, H/2, H/2]
  modulate(up2, scale2, shift2);
  const Tensor up3 = layers.level(layers.unpool(up2, down1, 2));  // [B, n, H, H]
  const Tensor last = layers.conv(up3, Act::identity, top);
  return layers.conv(norm_relu(last, groups, norms[2], norms[3], eps, std::nullopt, std::nullopt),
                     Act::identity);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(diffusion_ext, CPU, m) {
  m.impl("context_unet", TORCH_BOX(&context_unet));
}

}  // namespace dx
