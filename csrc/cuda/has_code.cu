// has_code: whether this library was compiled for a GPU. Where it was not, torch's reference
// serves.
#include "device.cuh"

namespace dx {
namespace {

bool has_code(int64_t device) { return compiled_for(int(device)); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DX_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("has_code", TORCH_BOX(&has_code));
}

}  // namespace dx
