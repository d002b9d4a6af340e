// denoising_loss: the target is made again, block by block, from the clean sample and the noise's
// counters; the model's output is read once, and its gradient, where it is wanted, written once.
#include "../ops/denoising_loss.h"

#include <vector>

#include "elementwise.h"

namespace dx {
namespace {

constexpr int kLanes = 16;  // sums that go on side by side, the same on every vector unit

// The sum of at most kBlock values.
DX_INLINE double sum_of(const float* values, int64_t count) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += values[i + lane];
  for (; i < count; ++i) lanes[i % kLanes] += values[i];
  double sum = 0;
  for (const float lane : lanes) sum += lane;
  return sum;
}

// out = of_x0 x0 + of_noise noise, either of which may be absent.
DX_INLINE void targets(float of_x0, const float* x0, float of_noise, const float* noise,
                       int64_t count, float* out) {
  if (x0 == nullptr || noise == nullptr) {
    const float weight = x0 == nullptr ? of_noise : of_x0;
    const float* term = x0 == nullptr ? noise : x0;
    for (int64_t k = 0; k < count; ++k) out[k] = weight * term[k];
    return;
  }
  for (int64_t k = 0; k < count; ++k) out[k] = denoising_target(of_x0, x0[k], of_noise, noise[k]);
}

// Penalties and slopes of a block's residuals.
DX_INLINE void penalties(float delta, const float* output, const float* target, int64_t count,
                         float* values, float* slopes) {
  with_constants(
      [&](auto square) DX_KERNEL {
        for (int64_t k = 0; k < count; ++k) {
          const float residual = output[k] - target[k];
          const Penalty p = square ? squared(residual) : huber(residual, delta);
          values[k] = p.value, slopes[k] = p.slope;
        }
      },
      delta == 0);
}

struct Cpu {
  explicit Cpu(const Tensor&) {}

  template <class T, class X>
  void run(const DenoisingLoss& loss, const T* output, const X* x0, const X* noise,
           T* gradient) const {
    const int64_t samples = loss.batch.samples, size = loss.batch.per_sample();
    for (int64_t b = 0; b < samples; ++b)
      STD_TORCH_CHECK(loss.t[b] >= 0 && loss.t[b] < loss.table_size, "t: wanted from 0 to ",
                      loss.table_size - 1, ", got ", loss.t[b]);
    const int64_t tile = tile_of(loss.batch), tiles = (size + tile - 1) / tile;
    std::vector<double> sums(samples * tiles);  // [B, tiles]
    double* of_tile = sums.data();
    for_each_tile(loss.batch, [=](int64_t b, int64_t begin, int64_t end, float* scratch) DX_KERNEL {
      const float of_x0 = loss.of_x0[loss.t[b]], of_noise = loss.of_noise[loss.t[b]];
      const float scale = gradient == nullptr ? 0 : loss.upstream[b] / float(size);
      const int64_t offset = b * size;
      if (loss.seeds != nullptr) {
        prefetch(output + offset + begin, end - begin);
        const NormalKey key{uint64_t(loss.seeds[b]), uint32_t(loss.t[b]), kTrainingStream};
        tile_normals(key, loss.batch, begin, end, scratch);
      }
      double sum = 0;
      for_each_block(begin, end, [&](int64_t i, int64_t count) DX_KERNEL {
        const int64_t at = offset + i;
        float buffers[3][kBlock], target[kBlock], values[kBlock], slopes[kBlock];
        const float* x = x0 == nullptr ? nullptr : view(x0 + at, buffers[0], count);
        const float* z = loss.seeds != nullptr ? scratch + (i - begin)
                         : noise != nullptr    ? view(noise + at, buffers[1], count)
                                               : nullptr;
        targets(of_x0, x, of_noise, z, count, target);
        penalties(loss.delta, view(output + at, buffers[2], count), target, count, values, slopes);
        sum += sum_of(values, count);
        if (gradient == nullptr) return;
        float* out = place(gradient + at, buffers[2]);
        for (int64_t k = 0; k < count; ++k) out[k] = scale * slopes[k];
        keep(out, gradient + at, count);
      });
      of_tile[b * tiles + begin / tile] = sum;
    });
    for (int64_t b = 0; b < samples; ++b) {
      double sum = 0;
      for (int64_t i = 0; i < tiles; ++i) sum += of_tile[b * tiles + i];
      loss.losses[b] = float(sum / double(size));
    }
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(diffusion_ext, CPU, m) {
  m.impl("denoising_loss", TORCH_BOX(&denoising_loss<Cpu>));
}

}  // namespace dx
