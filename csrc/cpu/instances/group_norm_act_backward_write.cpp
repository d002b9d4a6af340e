#include "../group_norm_act_backward.h"

namespace dx::norm_backward {

void write(const Slab& slab, const Channels& channels, const Correction& correction,
           const Tensors& t, int64_t chunk) {
  const Range range = slab.chunk(chunk);
  on_best_isa([&]() DX_KERNEL {
    if (t.keeps_da()) return write_chunk(slab, channels, correction, t, range, KeptDa());
    dispatch_act(slab.g.act, [&](auto act) DX_KERNEL {
      write_chunk(slab, channels, correction, t, range, DaAgain<decltype(act)::value>());
    });
  });
}

}  // namespace dx::norm_backward
