// philox_normal_: out [B, *] filled with normals of each sample's seed.
#include "elementwise.h"

namespace dx {
namespace {

void philox_normal_(Tensor out, const Tensor& seeds_, int64_t step, int64_t stream) {
  STD_TORCH_CHECK(out.dim() >= 1, "out: wanted shape [B, *]");
  const Tensor seeds = index_vector("seeds", seeds_, out.size(0));
  Output output(out);
  const Batch batch(output.dense(), output.layout());
  const int64_t* seed = data_of<int64_t>(seeds);
  dispatch_floating(out.scalar_type(), "philox_normal_", [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    T* to = output.data<T>();
    for_each_tile(batch, [=](int64_t b, int64_t begin, int64_t end, float* scratch) DX_KERNEL {
      const NormalKey key{uint64_t(seed[b]), uint32_t(step), uint32_t(stream)};
      const float* z = tile_normals(key, batch, begin, end, scratch);
      store(z, to + b * batch.per_sample() + begin, end - begin);
    });
  });
  output.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(diffusion_ext, CPU, m) {
  m.impl("philox_normal_", TORCH_BOX(&philox_normal_));
}

}  // namespace dx
