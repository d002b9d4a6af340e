// The kernels of group_norm_act's forward that walk over x. On chip: one launch, which reads x once
// and keeps it in shared memory until its statistics are known. Split: the moments of parts, and,
// once they are combined (group_norm_act.cu), the result.
#pragma once

#include "group_norm.cuh"

namespace dx::norm_forward {

// `count` elements around `shift`: their mean is shift + delta, m2 the sum of squares about it.
// A thread's own, of some channel: the shift is the mean of its first few, so that float32 loses
// nothing, whatever the mean.
struct ThreadMoments {
  float count, shift, delta, m2;
};

// The same in float64, of a part of a group.
struct Moments {
  double count, mean, m2;
};

// Chan, Golub & LeVeque 1983, eq. 1.5.
DX_DEVICE Moments combine(const Moments& a, const Moments& b) {
  const double count = a.count + b.count;
  if (count == 0) return {0, 0, 0};
  const double delta = b.mean - a.mean, share = b.count / count;
  return {count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.count * share};
}

// Where squares overflow, or an element is NaN or infinite, rstd is NaN.
DX_DEVICE float rstd_of(const Moments& m, double eps) {
  const double variance = m.count == 0 ? 0 : m.m2 / m.count;
  const bool finite = variance - variance == 0;
  return finite ? float(1 / sqrt((variance < 0 ? 0 : variance) + eps)) : float_of(0x7FC00000u);
}

// Sums of x + pre_shift about a shift.
struct Accumulator {
  float count = 0, shift = 0, first = 0, second = 0;

  DX_DEVICE ThreadMoments finish() const {
    if (count == 0) return {0, 0, 0, 0};
    const float delta = first / count;
    return {count, shift, delta, second - first * delta};
  }
};

// Leaves the moments of the thread's vectors in `out`, by place.
template <int V, int loads, class W, class Source>
DX_DEVICE void thread_moments(const W& walk, const Source& source, ThreadMoments* out) {
  constexpr int kChannels = W::kChannels;
  Accumulator sums[kChannels];
  walk.for_each_span([&](const Span& span) {
    float pre[kChannels];
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      pre[k] = walk.g.pre_shift.at(walk.slab.n, walk.slab.first_channel + span.channel + k);
      if constexpr (!W::kContiguous) sums[k] = {};
    }
    for_each_batch<loads>(span, source, [&](const auto& vectors, int valid, int64_t) {
      if (sums[0].count == 0) {
        float total[kChannels] = {};
#pragma unroll
        for (int u = 0; u < loads; ++u)
          if (u < valid)
#pragma unroll
            for (int k = 0; k < V; ++k) total[k % kChannels] += to_float(vectors[u].at[k]);
#pragma unroll
        for (int k = 0; k < kChannels; ++k)
          sums[k].shift = total[k] / float(valid * (V / kChannels)) + pre[k];
      }
      float first[kChannels] = {}, second[kChannels] = {};
      Mean centre[kChannels];
#pragma unroll
      for (int k = 0; k < kChannels; ++k) centre[k] = difference(sums[k].shift, pre[k]);
#pragma unroll
      for (int u = 0; u < loads; ++u)
        if (u < valid)
#pragma unroll
          for (int k = 0; k < V; ++k) {
            const int c = k % kChannels;
            const float d = (to_float(vectors[u].at[k]) - centre[c].high) - centre[c].low;
            first[c] += d;
            second[c] = fma(d, d, second[c]);
          }
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        sums[k].count += float(valid * (V / kChannels));
        sums[k].first += first[k];
        sums[k].second += second[k];
      }
    });
    if constexpr (!W::kContiguous)
#pragma unroll
      for (int k = 0; k < kChannels; ++k) out[walk.place(span, k)] = sums[k].finish();
  });
  if constexpr (W::kContiguous) out[thread()] = sums[0].finish();
}

// The moments of the block's part of one of its groups, by a warp: about a rough mean first, so
// that the means of the threads may differ without loss.
template <class W>
DX_DEVICE Moments group_moments(const W& walk, const ThreadMoments* threads_left, int group) {
  const int columns = walk.group_width(), entries = walk.rows() * columns;
  const auto entry = [&](int i) -> const ThreadMoments& {
    return threads_left[i / columns * walk.width() + group * columns + i % columns];
  };
  double count = 0;
  float rough = 0, first = 0, second = 0;
  for (int i = lane(); i < entries; i += kWarp) {
    const ThreadMoments& m = entry(i);
    count += m.count;
    rough += m.count * (m.shift + m.delta);
  }
  count = warp_sum(count);
  if (count == 0) return {0, 0, 0};
  rough = warp_sum(rough) / float(count);
  for (int i = lane(); i < entries; i += kWarp) {
    const ThreadMoments& m = entry(i);
    const float delta = (m.shift - rough) + m.delta;
    first += m.count * delta;
    second += fma(m.count * delta, delta, m.m2);
  }
  const double sum = warp_sum(first), delta = sum / count;
  return {count, rough + delta, warp_sum(second) - sum * delta};
}

template <int V, int loads, class T, class W, class Known, class Source>
DX_DEVICE void write_result(const W& walk, const Known& statistics, const Source& source, T* y) {
  walk.for_each_span([&](const Span& span) {
    const Channels<W> channels(walk, span, statistics);
    for_each_batch<loads>(span, source, [&](const auto& vectors, int valid, int64_t i) {
      dispatch_act(walk.g.act, [&](auto act) {
#pragma unroll
        for (int u = 0; u < loads; ++u)
          if (u < valid) {
            Vec<T, V> out;
#pragma unroll
            for (int k = 0; k < V; ++k)
              round_to(
                  channels[k].template forward<decltype(act)::value>(to_float(vectors[u].at[k])),
                  out.at[k]);
            store(y + span.first + (i + u) * span.pitch, out);
          }
      });
    });
  });
}

// What a block has in its static shared memory.
struct OnChip {
  Moments part[kMaxBundle];  // of the block's part of each group
  Statistics group[kMaxBundle];

  DX_DEVICE Statistics operator()(int i) const { return group[i]; }
};

template <class T, Layout layout, int V>
DX_GLOBAL DX_BOUNDED_BY((kKernels<true, false, layout>)) void norm_on_chip(
    const GroupNorm g, const NormPlan plan, const double eps, const T* x, T* y, double* mean,
    float* rstd) {
  constexpr int kLoads = kKernels<true, false, layout>.loads;
  const Slab slab(g, plan);
  const Walk<layout, V> walk{g, plan, slab};
  const Kept<T, V> kept{dynamic_shared<Vec<T, V>>()};
  auto* left = reinterpret_cast<ThreadMoments*>(kept.all + int64_t{plan.kept} * threads());
  OnChip& on_chip = shared<OnChip>();

  thread_moments<V, kLoads>(walk, Keeping<T, V>{{x}, kept}, left);
  block_barrier();
  for (int i = warp(); i < slab.groups; i += warps()) {
    const Moments part = group_moments(walk, left, i);
    if (lane() == 0) on_chip.part[i] = part;
  }
  cluster_barrier();
  for (int i = thread(); i < slab.groups; i += threads()) {
    Moments all = *of_rank(&on_chip.part[i], 0);
    for (int rank = 1; rank < plan.parts; ++rank)
      all = combine(all, *of_rank(&on_chip.part[i], rank));
    on_chip.group[i] = {mean_of(all.mean), rstd_of(all, eps)};
    if (slab.part == 0) {
      const int64_t group = slab.n * g.groups + slab.first_group + i;
      mean[group] = all.mean;
      rstd[group] = on_chip.group[i].rstd;
    }
  }
  cluster_arrive();  // its part has been read
  block_barrier();
  write_result<V, kLoads>(walk, on_chip, kept, y);
  cluster_wait();  // no block may end while another reads its part
}

// moments [N, G, parts]
template <class T, Layout layout, int V>
DX_GLOBAL DX_BOUNDED_BY((kKernels<false, false>)) void norm_moments(const GroupNorm g,
                                                                    const NormPlan plan, const T* x,
                                                                    Moments* moments) {
  const Slab slab(g, plan);
  const Walk<layout, V> walk{g, plan, slab};
  auto* left = dynamic_shared<ThreadMoments>();
  thread_moments<V, kKernels<false, false>.loads>(walk, FromMemory<T, V>{x}, left);
  let_next_launch();
  block_barrier();
  for (int i = warp(); i < slab.groups; i += warps()) {
    const Moments part = group_moments(walk, left, i);
    const int64_t group = slab.n * g.groups + slab.first_group + i;
    if (lane() == 0) moments[group * plan.parts + slab.part] = part;
  }
}

// The parts in reverse: the last that were read may still be in the second-level cache.
template <class T, Layout layout, int V>
DX_GLOBAL DX_BOUNDED_BY((kKernels<false, false>)) void norm_apply(const GroupNorm g,
                                                                  const NormPlan plan, const T* x,
                                                                  T* y, const double* mean,
                                                                  const float* rstd) {
  await_last_launch();
  const Slab slab(g, plan, blocks() - 1 - block());
  const Walk<layout, V> walk{g, plan, slab};
  write_result<V, kKernels<false, false>.loads>(walk, KnownStatistics(g, slab, mean, rstd),
                                                FromMemory<T, V>{x}, y);
}

// What a call's launches are given.
template <class T>
struct Call {
  const OnDevice& device;
  const GroupNorm& g;
  NormPlan plan;
  double eps;
  const T* x;
  T* y;
  double* mean;  // [N, G]
  float* rstd;   // [N, G]
};

template <class T>
void launch_on_chip(const Call<T>& c) {
  const Launch how = launch_to_sum("group_norm_act", c.g, c.plan);
  dispatch_walk<T>(c.g, c.plan, [&](auto vector, auto layout) {
    constexpr auto kernel = norm_on_chip<T, decltype(layout)::value, decltype(vector)::value>;
    launch(c.device, how, kernel, c.g, c.plan, c.eps, c.x, c.y, c.mean, c.rstd);
  });
}

template <class T>
void launch_moments(const Call<T>& c, Moments* moments) {
  const Launch how = launch_to_sum("group_norm_act: moments", c.g, c.plan);
  dispatch_walk<T>(c.g, c.plan, [&](auto vector, auto layout) {
    constexpr auto kernel = norm_moments<T, decltype(layout)::value, decltype(vector)::value>;
    launch(c.device, how, kernel, c.g, c.plan, c.x, moments);
  });
}

template <class T>
void launch_apply(const Call<T>& c) {
  const Launch how = launch_to_apply("group_norm_act: apply", c.g, c.plan);
  dispatch_walk<T>(c.g, c.plan, [&](auto vector, auto layout) {
    constexpr auto kernel = norm_apply<T, decltype(layout)::value, decltype(vector)::value>;
    launch(c.device, how, kernel, c.g, c.plan, c.x, c.y, static_cast<const double*>(c.mean),
           static_cast<const float*>(c.rstd));
  });
}

// A file of csrc/cuda/instances compiles them for a dtype.
#define DX_FORWARD_LAUNCHES(prefix, T)                           \
  prefix template void launch_on_chip(const Call<T>&);           \
  prefix template void launch_moments(const Call<T>&, Moments*); \
  prefix template void launch_apply(const Call<T>&);

DX_FORWARD_LAUNCHES(extern, float)
DX_FORWARD_LAUNCHES(extern, Half)
DX_FORWARD_LAUNCHES(extern, BFloat16)

}  // namespace dx::norm_forward
