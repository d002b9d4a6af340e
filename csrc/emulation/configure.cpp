// configure: the op that sets up the emulated GPU. What it sets holds for the launches to come.
#include "../cuda/device.cuh"

namespace dx::emulation {

Configuration configuration;

namespace {

void configure(int64_t seed, int64_t multiprocessors, int64_t shared_bytes, int64_t max_cluster) {
  STD_TORCH_CHECK(multiprocessors >= 1 && shared_bytes >= 0 && max_cluster >= 1 && max_cluster <= 8,
                  "configure: no such GPU");
  configuration = {uint64_t(seed), {int(multiprocessors), int(shared_bytes), int(max_cluster)}};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(DX_NAMESPACE, m) {
  m.def("configure(int seed, int multiprocessors, int shared_bytes, int max_cluster) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(DX_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("configure", TORCH_BOX(&configure));
}

}  // namespace dx::emulation
