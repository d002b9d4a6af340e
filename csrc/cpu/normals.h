// Normal noise on the CPU, by counter: which numbers they are is math/philox.h and math/normal.h.
#pragma once

#include <cstdint>

namespace dx {

// The noise of one sample: its seed, and the step and stream words of the counter.
struct NormalKey {
  uint64_t seed;
  uint32_t step, stream;
};

// out [count]: the normals of the sample's elements [begin, begin + count).
void fill_normals(const NormalKey& key, int64_t begin, int64_t count, float* out);

}  // namespace dx
