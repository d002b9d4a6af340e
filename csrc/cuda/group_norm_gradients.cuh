// What follows from the sums of the channels in group_norm_act's backward: the means of the groups,
// and the gradients of the parameters.
#pragma once

#include "group_norm_act_backward.cuh"

namespace dx::norm_backward {
namespace {

constexpr int kMeansThreads = 256, kParameterThreads = 128;

// A block for each group: means [N, G] from the partial sums of its channels.
DX_GLOBAL DX_BOUNDED(kMeansThreads, 1) void gradient_means(const GroupNorm g,
                                                           const PartialSums sums,
                                                           GroupMeans* means) {
  let_next_launch();
  await_last_launch();
  const int64_t n = block() / g.groups, first = block() % g.groups * g.group_channels();
  double da = 0, da_xhat = 0;
  for (int64_t i = thread(); i < g.group_channels() * sums.pieces; i += threads()) {
    const int64_t c = first + i / sums.pieces, piece = i % sums.pieces;
    const float gain = g.gain(n, c);
    da += gain * sums.at(kDa, n, c, piece);
    da_xhat += gain * sums.at(kDaXhat, n, c, piece);
  }
  struct Warps {
    double da[kMeansThreads / kWarp], da_xhat[kMeansThreads / kWarp];
  };
  Warps& of = shared<Warps>();
  da = warp_sum(da);
  da_xhat = warp_sum(da_xhat);
  if (lane() == 0) of.da[warp()] = da, of.da_xhat[warp()] = da_xhat;
  block_barrier();
  if (thread() != 0) return;
  for (int i = 1; i < warps(); ++i) da += of.da[i], da_xhat += of.da_xhat[i];
  const double count = double(g.group_channels() * g.spatial);
  means[block()] = {float(da / count), float(da_xhat / count)};
}

// A block for each channel: the gradients of its parameters in every sample, and their sums over
// the samples. `lanes` threads, a power of two, add up the pieces of a sample.
DX_GLOBAL DX_BOUNDED(kParameterThreads,
                     1) void gradient_parameters(const GroupNorm g, const float* rstd,
                                                 const PartialSums sums, const int kinds,
                                                 const GroupMeans* means, const int lanes,
                                                 const Gradients gradients) {
  await_last_launch();
  const int64_t c = block();
  double over_samples[kParameters] = {};
  const int64_t stride = threads() / lanes;
  for (int64_t warp_n = warp() * (kWarp / lanes); warp_n < g.samples; warp_n += stride) {
    const int64_t n = warp_n + lane() / lanes;
    double channel[kSums] = {};
#pragma unroll
    for (int kind = 0; kind < kSums; ++kind) {
      if (kind >= kinds) break;
      if (n < g.samples)
        for (int64_t piece = lane() % lanes; piece < sums.pieces; piece += lanes)
          channel[kind] += sums.at(kind, n, c, piece);
      for (int mask = lanes / 2; mask > 0; mask /= 2)
        channel[kind] += shuffle_xor(channel[kind], mask);
    }
    if (n >= g.samples || lane() % lanes != 0) continue;
    const int64_t group = n * g.groups + c / g.group_channels();
    GroupMeans of_group = {0, 0};
    if (sums.pieces > 0) of_group = means[group];  // else the samples have no elements
    const ChannelParameters p =
        parameter_gradients(g.parameters(n, c), rstd[group], of_group, double(g.spatial), channel);
    const float of[kParameters] = {p.weight,     p.bias,       p.scale,    p.shift,
                                   p.post_scale, p.post_shift, p.pre_shift};
#pragma unroll
    for (int i = 0; i < kParameters; ++i) {
      over_samples[i] += of[i];
      if (gradients.of[i].wanted() && gradients.of[i].per_sample)
        gradients.of[i].set(n * g.channels + c, of[i]);
    }
  }
  struct Threads {
    double of[kParameters][kParameterThreads];
  };
  Threads& all = shared<Threads>();
#pragma unroll
  for (int i = 0; i < kParameters; ++i) all.of[i][thread()] = over_samples[i];
  block_barrier();
#pragma unroll
  for (int i = 0; i < kParameters; ++i) {
    if (i % warps() != warp()) continue;
    double sum = 0;
    for (int k = lane(); k < threads(); k += kWarp) sum += all.of[i][k];
    sum = warp_sum(sum);
    if (lane() == 0 && gradients.of[i].wanted() && !gradients.of[i].per_sample)
      gradients.of[i].set(c, sum);
  }
}

}  // namespace
}  // namespace dx::norm_backward
