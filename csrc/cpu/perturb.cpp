// perturb: x_t = signal[t] x0 + sigma[t] z and the training target, in one pass.
#include "../ops/perturb.h"

#include "elementwise.h"

namespace dx {
namespace {

struct Cpu {
  explicit Cpu(const Tensor&) {}

  template <class T>
  void run(const Perturbation& p, const T* x0, const T* noise, T* x_t, T* target) const {
    for (int64_t b = 0; b < p.batch.samples; ++b)
      STD_TORCH_CHECK(p.t[b] >= 0 && p.t[b] < p.table_size, "t: wanted from 0 to ",
                      p.table_size - 1, ", got ", p.t[b]);
    for_each_tile(p.batch, [=](int64_t b, int64_t begin, int64_t end, float* scratch) DX_KERNEL {
      const float signal = p.signal[p.t[b]], sigma = p.sigma[p.t[b]];
      const int64_t offset = b * p.batch.per_sample();
      const auto blocks = [&](const auto& noise_at) DX_KERNEL {
        for_each_block(begin, end, [&](int64_t i, int64_t count) DX_KERNEL {
          const int64_t at = offset + i;
          float buffers[4][kBlock];
          const float *x = view(x0 + at, buffers[0], count), *z = noise_at(i, count, buffers[1]);
          float* out = place(x_t + at, buffers[2]);
#pragma omp simd
          for (int64_t k = 0; k < count; ++k) out[k] = perturb_sample(signal, sigma, x[k], z[k]);
          keep(out, x_t + at, count);
          if (target == nullptr) return;
          if (p.learned == Learned::noise) {
            if (z != place(target + at, buffers[3])) store(z, target + at, count);
            return;
          }
          float* v = place(target + at, buffers[3]);
#pragma omp simd
          for (int64_t k = 0; k < count; ++k) v[k] = velocity(signal, sigma, x[k], z[k]);
          keep(v, target + at, count);
        });
      };
      if (noise != nullptr) {
        blocks([&](int64_t i, int64_t count, float* buffer)
                   DX_KERNEL { return view(noise + offset + i, buffer, count); });
      } else {
        const NormalKey key{uint64_t(p.seeds[b]), uint32_t(p.t[b]), kTrainingStream};
        prefetch(x0 + offset + begin, end - begin);
        // Contiguous float32 noise that is the target is made where it stays.
        const bool stays = p.batch.layout == Layout::contiguous && p.learned == Learned::noise;
        float* tile = stays ? place(target + offset + begin, scratch) : scratch;
        tile_normals(key, p.batch, begin, end, tile);
        blocks([&](int64_t i, int64_t, float*) DX_KERNEL { return tile + (i - begin); });
      }
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(diffusion_ext, CPU, m) { m.impl("perturb", TORCH_BOX(&perturb<Cpu>)); }

}  // namespace dx
