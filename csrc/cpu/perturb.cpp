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
      const auto blocks = [&](const auto& noise_block) DX_KERNEL {
        for_each_block(begin, end, [&](int64_t i, int64_t count) DX_KERNEL {
          float x[kBlock], z[kBlock], out[kBlock];
          load(x0 + offset + i, x, count);
          noise_block(i, count, z);
          for (int64_t k = 0; k < count; ++k) out[k] = perturb_sample(signal, sigma, x[k], z[k]);
          store(out, x_t + offset + i, count);
          if (target == nullptr) return;
          if (p.velocity)
            for (int64_t k = 0; k < count; ++k) z[k] = velocity(signal, sigma, x[k], z[k]);
          store(z, target + offset + i, count);
        });
      };
      if (noise != nullptr) {
        blocks([&](int64_t i, int64_t count, float* z)
                   DX_KERNEL { load(noise + offset + i, z, count); });
      } else {
        const NormalKey key{uint64_t(p.seeds[b]), uint32_t(p.t[b]), kTrainingStream};
        const float* tile = tile_normals(key, p.batch, begin, end, scratch);
        blocks([&](int64_t i, int64_t count, float* z)
                   DX_KERNEL { load(tile + (i - begin), z, count); });
      }
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(diffusion_ext, CPU, m) { m.impl("perturb", TORCH_BOX(&perturb<Cpu>)); }

}  // namespace dx
