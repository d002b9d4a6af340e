// How group_norm_act divides its work on a GPU: plain host code, which Python sees as
// diffusion_ext._C.group_norm_plan. docs/kernels.md says which plan serves which shape, and why.
//
//   on chip  a slab stays in the shared memory of a block, or of a cluster of blocks that exchange
//            their sums: every tensor crosses the memory bus once
//   split    a slab is cut into parts; one launch sums each, another combines them in order, a
//   third
//            reads the tensors again and writes the result
//
// A slab is what is normalised together: contiguous, a group of a sample; channels_last, where the
// groups interleave, a bundle of neighbouring groups, wide enough for whole memory sectors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "limits.h"
#include "tuning.h"

namespace dx {

struct NormShape {
  int64_t samples, channels, spatial, groups;
  bool channels_last;
  bool aligned;      // to 16 bytes, every tensor
  int element_size;  // bytes
  bool backward;     // x and dy are read, and up to five sums made of each channel
};

struct NormPlan {
  bool on_chip;
  int vector;      // elements of an access: 16 bytes of them, or 1
  int threads;     // of a block
  int parts;       // blocks of a slab; on chip, they are a cluster
  int bundle;      // groups of a slab
  int64_t slabs;   // of a sample
  int lanes;       // contiguous: threads that walk a run together. channels_last: pixels at a time
  int run;         // contiguous: vectors that each of them takes of it
  int64_t pieces;  // partial sums of a channel: contiguous, its runs; channels_last, the parts
  int kept;        // vectors of each tensor that a thread keeps in shared memory
  int64_t shared_bytes;
};

namespace plan {

constexpr int kMaxBundle = 64;
constexpr int kRun = 4;               // vectors that a thread takes of a run of neighbours
constexpr int64_t kPartBytes = 4096;  // of a tensor: less is not worth a block of its own
constexpr int64_t kSectorBytes = 32, kLineBytes = 128;
constexpr int64_t kMostChannels = 2048;  // of a channels_last slab: their sums fit any device
constexpr int kMomentsBytes = 16, kSums = 5;

constexpr int64_t pieces_of(int64_t extent, int64_t step) { return (extent + step - 1) / step; }

inline int power_of_two_up_to(int64_t n, int most) {
  int p = 1;
  while (p < n && p < most) p *= 2;
  return p;
}

// Threads for `demand` equal pieces of work, up to `most`: whole warps, evenly loaded.
inline int threads_for(int64_t demand, int most) {
  const int64_t rounds = std::max<int64_t>(pieces_of(demand, most), 1);
  return int(std::max<int64_t>(pieces_of(pieces_of(demand, rounds), 32) * 32, 32));
}

// How the kernels of a plan are compiled.
constexpr tuning::Norm kernels_of(bool on_chip, bool channels_last, bool backward) {
  if (!on_chip) return backward ? tuning::kBackwardSplit : tuning::kForwardSplit;
  if (channels_last) return backward ? tuning::kBackwardLast : tuning::kForwardLast;
  return backward ? tuning::kBackward : tuning::kForward;
}

inline int64_t slab_elements(const NormShape& s, int bundle) {
  return s.channels / s.groups * bundle * s.spatial;
}

// A plan for slabs of `bundle` groups in `parts` parts, but for the choice between the two kinds.
inline NormPlan lay_out(const NormShape& s, int vector, int bundle, int parts, bool on_chip) {
  NormPlan p = {};
  const int64_t width = s.channels / s.groups * bundle;
  p.on_chip = on_chip;
  p.vector = vector;
  p.bundle = bundle;
  p.parts = parts;
  p.slabs = pieces_of(s.groups, bundle);
  const tuning::Norm kernels = kernels_of(on_chip, s.channels_last, s.backward);
  const int most = kernels.threads, run = std::max(kRun, kernels.loads);
  int64_t sums_bytes;
  if (s.channels_last) {
    const int64_t columns = width / vector, pixels = pieces_of(s.spatial, parts);
    const int64_t lanes = std::min(std::max<int64_t>(most / columns, 1), pieces_of(pixels, run));
    p.threads = int(std::min<int64_t>(pieces_of(columns * lanes, 32) * 32, most));
    p.lanes = int(std::max<int64_t>(p.threads / columns, 1));
    p.run = 1;
    p.pieces = parts;
    p.kept = int(pieces_of(columns, p.threads) * pieces_of(pixels, p.lanes));
    sums_bytes = p.lanes * width * (s.backward ? kSums * 4 : kMomentsBytes) + width * 8;
  } else {
    const int64_t row = s.spatial / vector;
    p.lanes = power_of_two_up_to(
        std::max(pieces_of(row, run), std::min<int64_t>(row, tuning::kLeastLanes)), 32);
    p.run = int(std::clamp<int64_t>(pieces_of(row, p.lanes), 1, run));
    p.pieces = pieces_of(row, int64_t{p.lanes} * p.run);
    const int64_t runs = pieces_of(width * p.pieces, parts);
    p.threads = threads_for(runs * p.lanes, most);
    p.kept = int(pieces_of(runs, p.threads / p.lanes) * p.run);
    sums_bytes = p.threads * kMomentsBytes;
  }
  const int64_t tensors = s.backward ? 2 : 1;
  if (!on_chip) p.kept = 0;
  p.shared_bytes = tensors * p.kept * p.threads * vector * s.element_size + sums_bytes;
  return p;
}

// The least bundle whose pixels are whole vectors and at least `bytes` wide, in whole `sectors`.
inline int bundle_of(const NormShape& s, int vector, int64_t bytes, int64_t sector) {
  if (!s.channels_last) return 1;
  const int64_t size = s.channels / s.groups,
                unit = std::max<int64_t>(sector / s.element_size, vector);
  const int64_t step = unit / std::gcd(unit, size);
  const int64_t groups = pieces_of(pieces_of(bytes, size * s.element_size), step) * step;
  return int(std::min({groups, s.groups, int64_t{kMaxBundle}}));
}

// Whether a bundle's slabs begin and end on whole vectors.
inline bool divides(const NormShape& s, int vector, int bundle) {
  return !s.channels_last || bundle == s.groups || s.channels / s.groups * bundle % vector == 0;
}

// The best on-chip plan for slabs of `bundle` groups: the least cluster that holds a slab and keeps
// the GPU busy. Its threads are 0 where no cluster holds one.
inline NormPlan on_chip(const NormShape& s, const DeviceLimits& device, int vector, int bundle) {
  NormPlan best = {};
  const int64_t bytes = slab_elements(s, bundle) * s.element_size;
  for (int parts = 1; parts <= device.max_cluster; parts *= 2) {
    const NormPlan p = lay_out(s, vector, bundle, parts, true);
    if (p.shared_bytes > device.shared_bytes) continue;
    if (best.threads != 0 && bytes / parts < kPartBytes) break;
    best = p;
    const bool busy = s.samples * p.slabs * parts * p.threads >=
                      int64_t{tuning::kBusyThreads} * device.multiprocessors;
    if (busy && 2 * p.shared_bytes <= device.shared_bytes) break;  // two blocks at a time
  }
  return best;
}

// Enough parts for a grid that fills the GPU several times over, each worth its block.
inline NormPlan split(const NormShape& s, const DeviceLimits& device, int vector) {
  int bundle = bundle_of(s, vector, int64_t{128} * vector * s.element_size, s.element_size);
  if (!divides(s, vector, bundle) || s.channels / s.groups * bundle > kMostChannels)
    bundle = bundle_of(s, vector, 1, s.element_size);
  const int64_t slabs = s.samples * pieces_of(s.groups, bundle);
  const int64_t bytes = slab_elements(s, bundle) * s.element_size;
  const int64_t wanted =
      std::max(pieces_of(int64_t{tuning::kPartsPerMultiprocessor} * device.multiprocessors,
                         std::max<int64_t>(slabs, 1)),
               bytes / (1 << 18));
  const int64_t worth = std::max<int64_t>(bytes / (4 * kPartBytes), 1);
  return lay_out(s, vector, bundle, int(std::clamp<int64_t>(std::min(wanted, worth), 1, 512)),
                 false);
}

// The bytes that a plan moves over the bus, as if the whole GPU took part: a block alone draws
// about twice a multiprocessor's share of the bandwidth, a pixel narrower than a sector wastes the
// rest of it, and a launch takes as long as kLaunchBytes.
inline double cost(const NormShape& s, const DeviceLimits& device, const NormPlan& p) {
  const double bytes = double(s.samples * s.channels * s.spatial * s.element_size);
  const double blocks = double(std::max<int64_t>(s.samples * p.slabs * p.parts, 1));
  const double idle = std::max(1.0, device.multiprocessors / (2 * blocks));
  const double pixel = double(s.channels / s.groups * p.bundle * s.element_size);
  const double wasted = s.channels_last ? std::max(1.0, kSectorBytes / pixel) : 1.0;
  const double passes = p.on_chip ? (s.backward ? 3 : 2) : (s.backward ? 5 : 3);
  return passes * bytes * idle * wasted + (p.on_chip ? 0 : 2 * double(tuning::kLaunchBytes));
}

}  // namespace plan

inline NormPlan group_norm_plan(const NormShape& s, const DeviceLimits& device) {
  using namespace plan;
  int vector = 16 / s.element_size;
  if (!s.aligned || (s.channels_last ? s.channels : s.spatial) % vector != 0) vector = 1;
  const int least = bundle_of(s, vector, 1, s.element_size);
  if (!divides(s, vector, least) ||
      (s.channels_last && s.channels / s.groups * least > kMostChannels))
    vector = 1;
  NormPlan best = split(s, device, vector);
  // A wide bundle wastes no sectors; a narrow one makes smaller slabs, and more of them.
  for (const int64_t width : {kLineBytes, int64_t{1}}) {
    const int bundle = bundle_of(s, vector, width, width > 1 ? kSectorBytes : s.element_size);
    if (!divides(s, vector, bundle)) continue;
    const NormPlan p = on_chip(s, device, vector, bundle);
    if (p.threads != 0 && cost(s, device, p) < cost(s, device, best)) best = p;
  }
  return best;
}

}  // namespace dx
