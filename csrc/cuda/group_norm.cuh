// What the forward and backward of group_norm_act share on CUDA: slabs, the walk of a thread over
// its part of one, and sums across a warp. group_norm_plan.h explains the division.
#pragma once

#include "../ops/group_norm_act.h"
#include "device.cuh"
#include "group_norm_plan.h"

namespace dx {

using plan::kMaxBundle;

// How the kernels of a plan and a layout are compiled (tuning.h).
template <bool on_chip, bool backward, Layout layout = Layout::contiguous>
constexpr tuning::Norm kKernels =
    plan::kernels_of(on_chip, layout == Layout::channels_last, backward);
#define DX_BOUNDED_BY(kernels) DX_BOUNDED((kernels).threads, (kernels).blocks)

// The part of a slab that a block works on.
struct Slab {
  int64_t n, first_channel, first_group;
  int groups, group_channels, width, part;  // width: its channels

  DX_DEVICE Slab(const GroupNorm& g, const NormPlan& plan, int64_t block) {
    const int64_t index = block / plan.parts;
    part = int(block % plan.parts);
    n = index / plan.slabs;
    first_group = index % plan.slabs * plan.bundle;
    const int64_t left = g.groups - first_group;
    groups = int(left < plan.bundle ? left : plan.bundle);
    group_channels = int(g.group_channels());
    first_channel = first_group * group_channels;
    width = groups * group_channels;
  }
  DX_DEVICE Slab(const GroupNorm& g, const NormPlan& plan) : Slab(g, plan, block()) {}
};

// Vectors of one thread that hold the same channels: `count` of them, `pitch` elements apart.
// Contiguous: all their elements are of `channel`; channels_last: element k is of channel + k.
struct Span {
  int64_t first, pitch;  // in the tensor
  int64_t count;
  int channel;     // of the slab
  int64_t run;     // contiguous: its number among the slab's runs
  bool exists;     // contiguous: an empty span may stand in for a run that does not
  int64_t before;  // vectors that this thread has walked before it
};

// A thread's walk over its part of a slab of x [N, C, *spatial], in accesses of V elements.
template <Layout layout, int V>
struct Walk {
  static constexpr bool kContiguous = layout == Layout::contiguous;
  static constexpr int kChannels = kContiguous ? 1 : V;  // of a span

  const GroupNorm& g;
  const NormPlan& plan;
  const Slab& slab;

  // The rows and the width of what the threads leave in shared memory for each other.
  DX_DEVICE int rows() const { return kContiguous ? threads() : plan.lanes; }
  DX_DEVICE int width() const { return kContiguous ? 1 : slab.width; }
  DX_DEVICE int group_width() const { return kContiguous ? 1 : slab.group_channels; }

  // Calls f(span) for every span of this thread. Contiguous: in step with its warp, with empty
  // spans where the warp's other lanes still have some.
  template <class F>
  DX_DEVICE void for_each_span(const F& f) const {
    if constexpr (kContiguous) {
      const int64_t row_vectors = g.spatial / V, runs = slab.width * plan.pieces;
      const int64_t begin = runs * slab.part / plan.parts;
      const int64_t end = runs * (slab.part + 1) / plan.parts;
      const int per_warp = kWarp / plan.lanes, in_run = lane() % plan.lanes;
      int64_t before = 0;
      for (int64_t warp_run = begin + int64_t{warp()} * per_warp; warp_run < end;
           warp_run += int64_t{warps()} * per_warp) {
        const int64_t run = warp_run + lane() / plan.lanes;
        const int64_t row = run < end ? run / plan.pieces : 0;
        const int64_t column = (run - row * plan.pieces) * plan.lanes * plan.run + in_run;
        const int64_t left = (row_vectors - column + plan.lanes - 1) / plan.lanes;
        const int64_t first = slab.n * g.channels + slab.first_channel + row;
        const int64_t count = run < end ? (left < plan.run ? left : plan.run) : 0;
        f(Span{first * g.spatial + column * V, int64_t{plan.lanes} * V, count, int(row), run,
               run < end, before});
        before += count;
      }
    } else {
      const int columns = slab.width / V, pixel = thread() / columns;
      const int64_t begin = g.spatial * slab.part / plan.parts;
      const int64_t end = g.spatial * (slab.part + 1) / plan.parts;
      if (pixel >= plan.lanes) return;
      const int64_t count = (end - begin - pixel + plan.lanes - 1) / plan.lanes;
      int64_t before = 0;
      for (int column = thread() % columns; column < columns; column += threads()) {
        const int64_t at = (slab.n * g.spatial + begin + pixel) * g.channels + slab.first_channel;
        f(Span{at + column * V, plan.lanes * g.channels, count, column * V, 0, true, before});
        before += count;
      }
    }
  }

  // Where this thread leaves what it has of channel k of a span.
  DX_DEVICE int place(const Span& span, int k) const {
    return kContiguous ? thread() : thread() / (slab.width / V) * slab.width + span.channel + k;
  }
};

// Loads vectors i .. i + valid - 1 of a span, at most `batch`. All of them, as nearly always,
// without a branch between the loads, so that they are in flight together. source(span, i) loads
// one.
template <int batch, class Source, class Vector>
DX_DEVICE void load_batch(const Span& span, const Source& source, int64_t i, int valid,
                          Vector (&vectors)[batch]) {
  if (valid == batch) {
#pragma unroll
    for (int u = 0; u < batch; ++u) vectors[u] = source(span, i + u);
  } else {
#pragma unroll
    for (int u = 0; u < batch; ++u)
      if (u < valid) vectors[u] = source(span, i + u);
  }
}

// Calls f(vectors, valid, i) for the vectors i, i + 1, ... of a span, `batch` at a time, of which
// `valid` exist.
template <int batch, class Source, class F>
DX_DEVICE void for_each_batch(const Span& span, const Source& source, const F& f) {
  for (int64_t i = 0; i < span.count; i += batch) {
    const int valid = int(span.count - i < batch ? span.count - i : batch);
    decltype(source(span, i)) vectors[batch];
    load_batch(span, source, i, valid, vectors);
    f(vectors, valid, i);
  }
}

template <class T, int V>
struct FromMemory {
  const T* x;
  DX_DEVICE Vec<T, V> operator()(const Span& span, int64_t i) const {
    return load<V>(x + span.first + i * span.pitch);
  }
};

// A thread's vectors of a tensor, in shared memory between two passes over them.
template <class T, int V>
struct Kept {
  Vec<T, V>* all;  // [plan.kept, threads]

  DX_DEVICE Vec<T, V>& at(const Span& span, int64_t i) const {
    return all[(span.before + i) * threads() + thread()];
  }
  DX_DEVICE Vec<T, V> operator()(const Span& span, int64_t i) const { return at(span, i); }
};

// Loads from memory, and keeps.
template <class T, int V>
struct Keeping {
  FromMemory<T, V> memory;
  Kept<T, V> kept;
  DX_DEVICE Vec<T, V> operator()(const Span& span, int64_t i) const {
    return kept.at(span, i) = memory(span, i);
  }
};

// The channels of a span.
template <class W>
struct Channels {
  Channel of[W::kChannels];

  // statistics(group of the slab) gives its Mean and rstd.
  template <class Statistics>
  DX_DEVICE Channels(const W& walk, const Span& span, const Statistics& statistics) {
#pragma unroll
    for (int k = 0; k < W::kChannels; ++k) {
      const int channel = span.channel + k;
      const auto s = statistics(channel / walk.slab.group_channels);
      const int64_t c = walk.slab.first_channel + channel;
      of[k] = Channel(walk.g.parameters(walk.slab.n, c), s.mean, s.rstd);
    }
  }
  // Of element k of a vector.
  DX_DEVICE const Channel& operator[](int k) const { return of[W::kContiguous ? 0 : k]; }
};

struct Statistics {
  Mean mean;
  float rstd;
};

// The statistics that a launch before this one left in mean [N, G] and rstd [N, G].
struct KnownStatistics {
  const double* mean;
  const float* rstd;
  int64_t first;  // of the slab's first group

  DX_DEVICE KnownStatistics(const GroupNorm& g, const Slab& slab, const double* mean,
                            const float* rstd)
      : mean(mean), rstd(rstd), first(slab.n * g.groups + slab.first_group) {}
  DX_DEVICE Statistics operator()(int group) const {
    return {mean_of(mean[first + group]), rstd[first + group]};
  }
};

// Calls f(vector, layout) with constants for a plan's accesses of T and a problem's layout.
template <class T, class F>
void dispatch_walk(const GroupNorm& g, const NormPlan& plan, const F& f) {
  const auto with_layout = [&](auto vector) {
    if (g.layout == Layout::contiguous)
      f(vector, std::integral_constant<Layout, Layout::contiguous>());
    else
      f(vector, std::integral_constant<Layout, Layout::channels_last>());
  };
  if (plan.vector == 1) return with_layout(std::integral_constant<int, 1>());
  with_layout(std::integral_constant<int, 16 / sizeof(T)>());
}

// A launch that walks over x as planned: to keep and to sum, or, once the sums are known, to apply.
inline Launch launch_to_sum(const char* name, const GroupNorm& g, const NormPlan& plan) {
  return {name,         g.samples * plan.slabs * plan.parts, 1,
          plan.threads, plan.on_chip ? plan.parts : 1,       int(plan.shared_bytes)};
}
inline Launch launch_to_apply(const char* name, const GroupNorm& g, const NormPlan& plan) {
  Launch how{name, g.samples * plan.slabs * plan.parts, 1, plan.threads};
  how.follows_ours = true;
  return how;
}

// The plan for a call whose tensors lie at `pointers`.
inline NormPlan plan_of(const GroupNorm& g, const OnDevice& device,
                        std::initializer_list<const void*> pointers, int element_size,
                        bool backward) {
  const bool aligned = std::all_of(pointers.begin(), pointers.end(), [](const void* p) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0;
  });
  return group_norm_plan({g.samples, g.channels, g.spatial, g.groups,
                          g.layout == Layout::channels_last, aligned, element_size, backward},
                         device.limits);
}

// The tensors of channels_last groups that are too wide for any slab are copied.
inline Layout norm_layout(const Tensor& x, int64_t groups) {
  const bool wide = groups > 0 && x.size(1) / groups > plan::kMostChannels;
  return wide ? Layout::contiguous : layout_of(x);
}

}  // namespace dx
