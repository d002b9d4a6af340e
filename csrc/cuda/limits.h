// What a plan may ask of a device. Plain host code.
#pragma once

namespace dx {

// Bytes of a block's shared memory that are left to the kernels' own static.
constexpr int kStaticShared = 4096;

// What every GPU from sm_75 on lets a block have beside those.
constexpr int kLeastShared = 64 * 1024 - kStaticShared;

struct DeviceLimits {
  int multiprocessors;
  int shared_bytes;       // dynamic shared memory that one block may have
  int max_cluster;        // blocks; 1 where there are no clusters
  bool overlaps = false;  // whether a kernel can wait for the launch before it, and begin early
};

}  // namespace dx
