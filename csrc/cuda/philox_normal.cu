// philox_normal_: out [B, *] filled with normals of each sample's seed.
#include "../ops/philox_normal.h"

#include "elementwise.cuh"

namespace dx {
namespace {

template <class T>
struct FillNormal {
  const int64_t* seeds;  // [B]
  uint32_t step, stream;
  T* out;

  struct Sample {
    NoiseKey key;
    static constexpr bool noisy = true;
  };
  template <int n>
  struct Inputs {};

  DX_DEVICE Sample sample(int64_t b) const { return {{uint64_t(seeds[b]), step, stream}}; }

  template <int n, bool full>
  DX_DEVICE Inputs<n> read(int64_t, int) const {
    return {};
  }

  template <int n, bool full>
  DX_DEVICE void write(int64_t at, int count, const Sample&, const Inputs<n>&,
                       const float (&z)[n]) const {
    store_pack<n, full>(out + at, count, z);
  }
};

struct Cuda {
  OnDevice device;
  explicit Cuda(const Tensor& out) : device(out) {}

  template <class T>
  void run(const Batch& batch, const int64_t* seeds, uint32_t step, uint32_t stream, T* out) const {
    const FillNormal<T> op{seeds, step, stream, out};
    launch_elementwise<T>("philox_normal_", device, batch, op, true, out);
  }
};

}  // namespace

DX_REGISTER_KERNELS(m) { m.impl("philox_normal_", TORCH_BOX(&philox_normal_<Cuda>)); }

}  // namespace dx
