// philox_normal_: out [B, *] filled with normals of each sample's seed.
#include "../ops/philox_normal.h"

#include "elementwise.h"

namespace dx {
namespace {

struct Cpu {
  explicit Cpu(const Tensor&) {}

  template <class T>
  void run(const Batch& batch, const int64_t* seeds, uint32_t step, uint32_t stream, T* out) const {
    for_each_tile(batch, [=](int64_t b, int64_t begin, int64_t end, float* scratch) DX_KERNEL {
      const NormalKey key{uint64_t(seeds[b]), step, stream};
      T* to = out + b * batch.per_sample() + begin;
      const bool in_place = batch.layout == Layout::contiguous;  // nothing else is beside the noise
      float* z = in_place ? place(to, scratch) : scratch;
      tile_normals(key, batch, begin, end, z);
      if (z == scratch) store(z, to, end - begin);
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(diffusion_ext, CPU, m) {
  m.impl("philox_normal_", TORCH_BOX(&philox_normal_<Cpu>));
}

}  // namespace dx
