// What the emulated GPU is, and the seed of the order that its threads run in.
#pragma once

#include <cstdint>

#include "../cuda/limits.h"

namespace dx::emulation {

struct Configuration {
  uint64_t seed = 0;
  DeviceLimits limits = {132, 227 * 1024 - kStaticShared, 8};  // an H100
};

extern Configuration configuration;

}  // namespace dx::emulation
