// philox_normal_ as every device sees it: `out` is handed to the device's
// Kernel::run<T>(batch, seeds, step, stream, out).
#pragma once

#include "../common.h"

namespace dx {

template <class Kernel>
void philox_normal_(Tensor out, const Tensor& seeds_, int64_t step, int64_t stream) {
  STD_TORCH_CHECK(out.dim() >= 1, "out: wanted shape [B, *]");
  const Tensor seeds = index_vector("seeds", seeds_, out.size(0), out);
  Output output(out);
  const Batch batch(output.dense(), output.layout());
  const Kernel kernel(out);
  dispatch_floating(out.scalar_type(), "philox_normal_", [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    kernel.template run<T>(batch, data_of<int64_t>(seeds), uint32_t(step), uint32_t(stream),
                           output.data<T>());
  });
  output.finish();
}

}  // namespace dx
