// What only measuring can choose. The stage `tune` of `make gpu-check` times each constant's
// neighbours side by side (benchmarks/gpu/variants.py lists them) and prints this file as the GPU
// at hand would have it.
//
// Measured on: no GPU yet. Estimates for an H100 (docs/kernels.md says why).
#ifndef DX_TUNING_H  // and no #pragma once: a variant's header, included first, stands in for this
#define DX_TUNING_H

#include <cstdint>

namespace dx::tuning {

// How a kernel of group_norm_act is compiled: the threads of a block at most; the blocks that a
// multiprocessor has registers for, so that one reads its slab while another writes; the vectors of
// a tensor that a thread loads before it uses the first.
struct Norm {
  int threads, blocks, loads;
};

// On chip, contiguous and channels_last; split.
constexpr Norm kForward = {256, 2, 4};
constexpr Norm kForwardLast = {256, 2, 4};
constexpr Norm kForwardSplit = {256, 2, 4};
constexpr Norm kBackward = {256, 2, 2};
constexpr Norm kBackwardLast = {128, 2, 2};
constexpr Norm kBackwardSplit = {256, 1, 2};

// How group_norm_act divides its work. A run of neighbours is shared by kLeastLanes threads and
// more: 8 vectors are a line of memory.
constexpr int kLeastLanes = 8;
constexpr int kMostCluster = 8;              // blocks
constexpr int kBusyThreads = 1024;           // of a multiprocessor, to hide its memory's latency
constexpr int kPartsPerMultiprocessor = 16;  // split
constexpr int64_t kLaunchBytes = 3000000;    // what could be moved while one is launched

// Whether a kernel that follows one of ours is launched while that still runs (programmatic
// dependent launch, sm_90 and later).
constexpr bool kOverlapLaunches = false;

// The elementwise ops: threads of a block, fewer where four pixels of noise take their registers;
// vectors that a thread loads before it uses the first; blocks a multiprocessor, whose threads then
// go on to further elements (0: as many as there are elements for); and whether memory is told that
// nothing is read again.
constexpr int kElementThreads = 256, kPixelThreads = 128;
constexpr int kElementVectors = 1;
constexpr int kElementBlocks = 0;
constexpr bool kStreaming = false;

}  // namespace dx::tuning

#endif
