// The kernels of group_norm_act's backward that walk over x and dy: sums of each channel's
// elements, and dx. On chip, x and dy are read once and dx is written by the launch that makes the
// sums.
#pragma once

#include "group_norm.cuh"

namespace dx::norm_backward {

// S1/M and S2/M (math/group_norm_act.h) are made of these, of one channel or of a group's part.
struct GroupSums {
  float da, da_xhat;
};

// The partial sums of every channel, float32 [kinds, N, C, pieces], in the order of ChannelSum.
struct PartialSums {
  float* data;
  int64_t channels, pieces, stride;  // C; stride: from one kind to the next

  DX_DEVICE float& at(int kind, int64_t n, int64_t c, int64_t piece) const {
    return data[kind * stride + (n * channels + c) * pieces + piece];
  }
};

template <class T>
struct Backward {
  const T *x, *dy;
  const double* mean;  // [N, G]
  const float* rstd;   // [N, G]
  PartialSums sums;
  GroupMeans* means;  // [N, G]
  T* dx;
};

// Calls f(act, xs, dys, valid, i) for the batches of a span of x and dy, with act as a constant.
template <int loads, class W, class XSource, class DySource, class F>
DX_DEVICE void for_each_pair(const W& walk, const Span& span, const XSource& x, const DySource& dy,
                             const F& f) {
  for_each_batch<loads>(span, x, [&](const auto& xs, int valid, int64_t i) {
    decltype(dy(span, i)) dys[loads];
    load_batch(span, dy, i, valid, dys);
    dispatch_act(walk.g.act, [&](auto act) { f(act, xs, dys, valid, i); });
  });
}

// Adds up what each thread has of its spans, kinds floats a channel: contiguous, over the lanes of
// a run, into the partial sums; channels_last, into shared memory, for add_up_pixels. `own`
// collects what the thread's runs are of S1 and S2.
template <int V, int loads, int kinds, class T, class W, class Known, class XSource, class DySource>
DX_DEVICE GroupSums sum_channels(const W& walk, const Known& statistics, const XSource& x,
                                 const DySource& dy, const PartialSums& partial, float* left) {
  constexpr int kChannels = W::kChannels;
  GroupSums own = {0, 0};
  walk.for_each_span([&](const Span& span) {
    const Channels<W> channels(walk, span, statistics);
    float sums[kinds][kChannels] = {};
    for_each_pair<loads>(
        walk, span, x, dy, [&](auto act, const auto& xs, const auto& dys, int valid, int64_t i) {
#pragma unroll
          for (int u = 0; u < loads; ++u)
            if (u < valid)
#pragma unroll
              for (int k = 0; k < V; ++k) {
                const float dy_k = to_float(dys[u].at[k]);
                const auto d =
                    Derivative::of<decltype(act)::value>(channels[k], to_float(xs[u].at[k]), dy_k);
                const int c = k % kChannels;
                sums[kDa][c] += d.da;
                sums[kDaXhat][c] = fma(d.da, d.xhat, sums[kDaXhat][c]);
                if constexpr (kinds == kSums) {
                  sums[kDy][c] += dy_k;
                  sums[kDyAct][c] = fma(dy_k, d.act, sums[kDyAct][c]);
                  sums[kXhat][c] += d.xhat;
                }
              }
        });
    if constexpr (W::kContiguous) {
#pragma unroll
      for (int kind = 0; kind < kinds; ++kind)
        for (int mask = walk.plan.lanes / 2; mask > 0; mask /= 2)
          sums[kind][0] += shuffle_xor(sums[kind][0], mask);
      if (!span.exists || lane() % walk.plan.lanes != 0) return;
      const int64_t piece = span.run % walk.plan.pieces;
#pragma unroll
      for (int kind = 0; kind < kinds; ++kind)
        partial.at(kind, walk.slab.n, walk.slab.first_channel + span.channel, piece) =
            sums[kind][0];
      own.da = fma(channels[0].gain, sums[kDa][0], own.da);
      own.da_xhat = fma(channels[0].gain, sums[kDaXhat][0], own.da_xhat);
    } else {
      const int size = walk.rows() * walk.width();
#pragma unroll
      for (int kind = 0; kind < kinds; ++kind)
#pragma unroll
        for (int k = 0; k < kChannels; ++k) left[kind * size + walk.place(span, k)] = sums[kind][k];
    }
  });
  return own;
}

// channels_last: a warp adds up what the threads have of a channel into its partial sum, and leaves
// its share of S1 and S2 in `entries` [width].
template <int kinds, class W>
DX_DEVICE void add_up_pixels(const W& walk, const float* left, const PartialSums& partial,
                             GroupSums* entries) {
  const int rows = walk.rows(), width = walk.width();
  for (int channel = warp(); channel < width; channel += warps()) {
    float sums[kinds] = {};
#pragma unroll
    for (int kind = 0; kind < kinds; ++kind) {
      for (int row = lane(); row < rows; row += kWarp)
        sums[kind] += left[(kind * rows + row) * width + channel];
      sums[kind] = warp_sum(sums[kind]);
    }
    if (lane() != 0) continue;
    const int64_t c = walk.slab.first_channel + channel;
#pragma unroll
    for (int kind = 0; kind < kinds; ++kind)
      partial.at(kind, walk.slab.n, c, walk.slab.part) = sums[kind];
    const float gain = walk.g.gain(walk.slab.n, c);
    entries[channel] = {gain * sums[kDa], gain * sums[kDaXhat]};
  }
}

// The partial sums of the block's part of a slab. Leaves the shares of S1 and S2 in shared memory,
// at the address that it returns: [rows, width] contiguous, [width] channels_last.
template <int V, int loads, int kinds, class T, class W, class Known, class XSource, class DySource>
DX_DEVICE GroupSums* part_sums(const W& walk, const Known& statistics, const XSource& x,
                               const DySource& dy, const PartialSums& partial, float* left) {
  const GroupSums own = sum_channels<V, loads, kinds, T>(walk, statistics, x, dy, partial, left);
  if constexpr (W::kContiguous) {
    auto* entries = reinterpret_cast<GroupSums*>(left);
    entries[thread()] = own;
    block_barrier();
    return entries;
  } else {
    auto* entries = reinterpret_cast<GroupSums*>(left + kSums * walk.rows() * walk.width());
    block_barrier();
    add_up_pixels<kinds>(walk, left, partial, entries);
    block_barrier();
    return entries;
  }
}

template <int V, int loads, class T, class W, class Known, class Means, class XSource,
          class DySource>
DX_DEVICE void write_dx(const W& walk, const Known& statistics, const Means& means,
                        const XSource& x, const DySource& dy, T* dx) {
  walk.for_each_span([&](const Span& span) {
    const Channels<W> channels(walk, span, statistics);
    GroupMeans of[W::kChannels];
#pragma unroll
    for (int k = 0; k < W::kChannels; ++k)
      of[k] = means[(span.channel + k) / walk.slab.group_channels];
    for_each_pair<loads>(
        walk, span, x, dy, [&](auto act, const auto& xs, const auto& dys, int valid, int64_t i) {
#pragma unroll
          for (int u = 0; u < loads; ++u)
            if (u < valid) {
              Vec<T, V> out;
#pragma unroll
              for (int k = 0; k < V; ++k) {
                const auto d = Derivative::of<decltype(act)::value>(
                    channels[k], to_float(xs[u].at[k]), to_float(dys[u].at[k]));
                round_to(input_gradient(channels[k], of[k % W::kChannels], d.xhat, d.da),
                         out.at[k]);
              }
              store(dx + span.first + (i + u) * span.pitch, out);
            }
        });
  });
}

// What a block of the on-chip plan has in its static shared memory.
struct OnChip {
  GroupSums part[kMaxBundle];  // of the block's part of each group
  GroupMeans group[kMaxBundle];
};

template <class T, Layout layout, int V, int kinds>
DX_GLOBAL DX_BOUNDED_BY((kKernels<true, true, layout>)) void gradient_on_chip(const GroupNorm g,
                                                                              const NormPlan plan,
                                                                              const Backward<T> b) {
  constexpr int kLoads = kKernels<true, true, layout>.loads;
  const Slab slab(g, plan);
  const Walk<layout, V> walk{g, plan, slab};
  const KnownStatistics statistics(g, slab, b.mean, b.rstd);
  const Kept<T, V> x{dynamic_shared<Vec<T, V>>()};
  const Kept<T, V> dy{x.all + int64_t{plan.kept} * threads()};
  auto* left = reinterpret_cast<float*>(dy.all + int64_t{plan.kept} * threads());
  OnChip& on_chip = shared<OnChip>();

  const GroupSums* entries = part_sums<V, kLoads, kinds, T>(
      walk, statistics, Keeping<T, V>{{b.x}, x}, Keeping<T, V>{{b.dy}, dy}, b.sums, left);
  const int shares = layout == Layout::contiguous ? threads() : slab.group_channels;
  for (int i = warp(); i < slab.groups; i += warps()) {
    GroupSums sums = {0, 0};
    for (int k = lane(); k < shares; k += kWarp) {
      const GroupSums& entry = entries[i * shares + k];
      sums.da += entry.da;
      sums.da_xhat += entry.da_xhat;
    }
    sums = {warp_sum(sums.da), warp_sum(sums.da_xhat)};
    if (lane() == 0) on_chip.part[i] = sums;
  }
  cluster_barrier();
  const float count = float(slab.group_channels * g.spatial);
  for (int i = thread(); i < slab.groups; i += threads()) {
    GroupMeans all = {0, 0};
    for (int rank = 0; rank < plan.parts; ++rank) {
      const GroupSums& part = *of_rank(&on_chip.part[i], rank);
      all.da += part.da;
      all.da_xhat += part.da_xhat;
    }
    on_chip.group[i] = {all.da / count, all.da_xhat / count};
    if (slab.part == 0) b.means[slab.n * g.groups + slab.first_group + i] = on_chip.group[i];
  }
  cluster_arrive();  // its part has been read
  let_next_launch();
  block_barrier();
  write_dx<V, kLoads>(walk, statistics, on_chip.group, x, dy, b.dx);
  cluster_wait();  // no block may end while another reads its part
}

template <class T, Layout layout, int V, int kinds>
DX_GLOBAL DX_BOUNDED_BY((kKernels<false, true>)) void gradient_sums(const GroupNorm g,
                                                                    const NormPlan plan,
                                                                    const Backward<T> b) {
  const Slab slab(g, plan);
  const Walk<layout, V> walk{g, plan, slab};
  part_sums<V, kKernels<false, true>.loads, kinds, T>(
      walk, KnownStatistics(g, slab, b.mean, b.rstd), FromMemory<T, V>{b.x}, FromMemory<T, V>{b.dy},
      b.sums, dynamic_shared<float>());
  let_next_launch();
}

// The parts in reverse: the last that were read may still be in the second-level cache.
template <class T, Layout layout, int V>
DX_GLOBAL DX_BOUNDED_BY((kKernels<false, true>)) void gradient_apply(const GroupNorm g,
                                                                     const NormPlan plan,
                                                                     const Backward<T> b) {
  await_last_launch();
  const Slab slab(g, plan, blocks() - 1 - block());
  const Walk<layout, V> walk{g, plan, slab};
  write_dx<V, kKernels<false, true>.loads>(walk, KnownStatistics(g, slab, b.mean, b.rstd),
                                           b.means + slab.n * g.groups + slab.first_group,
                                           FromMemory<T, V>{b.x}, FromMemory<T, V>{b.dy}, b.dx);
}

// What a call's launches are given.
template <class T>
struct Call {
  const OnDevice& device;
  const GroupNorm& g;
  NormPlan plan;
  Backward<T> b;
};

template <int kinds, class T>
void launch_on_chip(const Call<T>& c) {
  const Launch how = launch_to_sum("group_norm_act_backward", c.g, c.plan);
  dispatch_walk<T>(c.g, c.plan, [&](auto vector, auto layout) {
    constexpr auto kernel =
        gradient_on_chip<T, decltype(layout)::value, decltype(vector)::value, kinds>;
    launch(c.device, how, kernel, c.g, c.plan, c.b);
  });
}

template <int kinds, class T>
void launch_sums(const Call<T>& c) {
  const Launch how = launch_to_sum("group_norm_act_backward: sums", c.g, c.plan);
  dispatch_walk<T>(c.g, c.plan, [&](auto vector, auto layout) {
    constexpr auto kernel =
        gradient_sums<T, decltype(layout)::value, decltype(vector)::value, kinds>;
    launch(c.device, how, kernel, c.g, c.plan, c.b);
  });
}

template <class T>
void launch_apply(const Call<T>& c) {
  const Launch how = launch_to_apply("group_norm_act_backward: apply", c.g, c.plan);
  dispatch_walk<T>(c.g, c.plan, [&](auto vector, auto layout) {
    constexpr auto kernel = gradient_apply<T, decltype(layout)::value, decltype(vector)::value>;
    launch(c.device, how, kernel, c.g, c.plan, c.b);
  });
}

// How many kinds of sums are made: those behind kDaXhat only for the gradients of modulations.
constexpr int kFewSums = kDaXhat + 1;

// Files of csrc/cuda/instances compile them for a dtype and a number of kinds.
#define DX_SUMS_LAUNCHES(prefix, kinds, T)                    \
  prefix template void launch_on_chip<kinds>(const Call<T>&); \
  prefix template void launch_sums<kinds>(const Call<T>&);
#define DX_APPLY_LAUNCH(prefix, T) prefix template void launch_apply(const Call<T>&);

DX_SUMS_LAUNCHES(extern, kFewSums, float)
DX_SUMS_LAUNCHES(extern, kFewSums, Half)
DX_SUMS_LAUNCHES(extern, kFewSums, BFloat16)
DX_SUMS_LAUNCHES(extern, kSums, float)
DX_SUMS_LAUNCHES(extern, kSums, Half)
DX_SUMS_LAUNCHES(extern, kSums, BFloat16)
DX_APPLY_LAUNCH(extern, float)
DX_APPLY_LAUNCH(extern, Half)
DX_APPLY_LAUNCH(extern, BFloat16)

}  // namespace dx::norm_backward
