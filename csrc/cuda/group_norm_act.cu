// group_norm_act, forward. On chip: one launch, which reads x once and keeps it in shared memory
// until its statistics are known. Split: the statistics of parts, their combination, the result.
#include "group_norm.cuh"

namespace dx {
namespace {

constexpr int kBatch = 4;  // loads in flight

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
template <int V, class W, class Source>
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
    for_each_batch<kBatch>(span, source, [&](const auto& vectors, int valid, int64_t) {
      if (sums[0].count == 0) {
        float total[kChannels] = {};
#pragma unroll
        for (int u = 0; u < kBatch; ++u)
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
      for (int u = 0; u < kBatch; ++u)
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

template <int V, class T, class W, class Known, class Source>
DX_DEVICE void write_result(const W& walk, const Known& statistics, const Source& source, T* y) {
  walk.for_each_span([&](const Span& span) {
    const Channels<W> channels(walk, span, statistics);
    for_each_batch<kBatch>(span, source, [&](const auto& vectors, int valid, int64_t i) {
      dispatch_act(walk.g.act, [&](auto act) {
#pragma unroll
        for (int u = 0; u < kBatch; ++u)
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
DX_GLOBAL DX_BOUNDED(on_chip_threads(layout)) void norm_on_chip(const GroupNorm g,
                                                                const NormPlan plan,
                                                                const double eps, const T* x, T* y,
                                                                double* mean, float* rstd) {
  const Slab slab(g, plan);
  const Walk<layout, V> walk{g, plan, slab};
  const Kept<T, V> kept{dynamic_shared<Vec<T, V>>()};
  auto* left = reinterpret_cast<ThreadMoments*>(kept.all + int64_t{plan.kept} * threads());
  OnChip& on_chip = shared<OnChip>();

  thread_moments<V>(walk, Keeping<T, V>{{x}, kept}, left);
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
  cluster_barrier();  // no block may end while another reads its part
  write_result<V>(walk, on_chip, kept, y);
}

// moments [N, G, parts]
template <class T, Layout layout, int V>
DX_GLOBAL DX_BOUNDED(kSplitThreads) void norm_moments(const GroupNorm g, const NormPlan plan,
                                                      const T* x, Moments* moments) {
  const Slab slab(g, plan);
  const Walk<layout, V> walk{g, plan, slab};
  auto* left = dynamic_shared<ThreadMoments>();
  thread_moments<V>(walk, FromMemory<T, V>{x}, left);
  block_barrier();
  for (int i = warp(); i < slab.groups; i += warps()) {
    const Moments part = group_moments(walk, left, i);
    const int64_t group = slab.n * g.groups + slab.first_group + i;
    if (lane() == 0) moments[group * plan.parts + slab.part] = part;
  }
}

// A warp for each group adds up its parts. A group without elements has mean 0 and variance 0.
DX_GLOBAL DX_BOUNDED(128) void norm_statistics(const Moments* moments, const int parts,
                                               const int64_t groups, const double eps, double* mean,
                                               float* rstd) {
  const int64_t group = block() * warps() + warp();
  if (group >= groups) return;
  Moments all = {0, 0, 0};
  for (int i = lane(); i < parts; i += kWarp) all = combine(all, moments[group * parts + i]);
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2)
    all = combine(all, {shuffle_xor(all.count, mask), shuffle_xor(all.mean, mask),
                        shuffle_xor(all.m2, mask)});
  if (lane() != 0) return;
  mean[group] = all.mean;
  rstd[group] = rstd_of(all, eps);
}

// The parts in reverse: the last that were read may still be in the second-level cache.
template <class T, Layout layout, int V>
DX_GLOBAL DX_BOUNDED(kSplitThreads) void norm_apply(const GroupNorm g, const NormPlan plan,
                                                    const T* x, T* y, const double* mean,
                                                    const float* rstd) {
  const Slab slab(g, plan, blocks() - 1 - block());
  const Walk<layout, V> walk{g, plan, slab};
  write_result<V>(walk, KnownStatistics(g, slab, mean, rstd), FromMemory<T, V>{x}, y);
}

struct Cuda {
  OnDevice device;
  Tensor like;
  explicit Cuda(const Tensor& x) : device(x), like(x) {}

  static Layout layout(const Tensor& x, int64_t groups) { return norm_layout(x, groups); }

  template <class T>
  void forward(const GroupNorm& g, double eps, const T* x, T* y, double* mean, float* rstd) const {
    const NormPlan plan = plan_of(g, device, {x, y}, sizeof(T), false);
    const int64_t blocks = g.samples * plan.slabs * plan.parts, groups = g.samples * g.groups;
    if (groups == 0) return;
    const auto statistics = [&](const Moments* moments, int parts) {
      const Launch how{"group_norm_act: statistics", (groups + 3) / 4, 1, 4 * kWarp};
      launch(device, how, norm_statistics, moments, parts, groups, eps, mean, rstd);
    };
    if (g.elements() == 0) return statistics(nullptr, 0);
    const int shared_bytes = int(plan.shared_bytes);
    dispatch_walk<T>(g, plan, [&](auto vector, auto layout) {
      constexpr int V = decltype(vector)::value;
      constexpr Layout L = decltype(layout)::value;
      if (plan.on_chip) {
        const Launch how{"group_norm_act", blocks, 1, plan.threads, plan.parts, shared_bytes};
        return launch(device, how, norm_on_chip<T, L, V>, g, plan, eps, x, y, mean, rstd);
      }
      const Tensor scratch =
          fresh(like, {groups * plan.parts * int64_t{sizeof(Moments) / sizeof(double)}},
                aoti_torch_dtype_float64());
      auto* moments = static_cast<Moments*>(scratch.mutable_data_ptr());
      launch(device, {"group_norm_act: moments", blocks, 1, plan.threads, 1, shared_bytes},
             norm_moments<T, L, V>, g, plan, x, moments);
      statistics(moments, plan.parts);
      launch(device, {"group_norm_act: apply", blocks, 1, plan.threads}, norm_apply<T, L, V>, g,
             plan, x, y, static_cast<const double*>(mean), static_cast<const float*>(rstd));
    });
  }
};

}  // namespace

DX_REGISTER_KERNELS(m) { m.impl("group_norm_act", TORCH_BOX(&group_norm_act<Cuda>)); }

}  // namespace dx
