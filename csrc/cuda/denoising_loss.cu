// denoising_loss: a launch that reads the model's output once, makes the target again and writes
// the gradient, where it is wanted, with a sum for each block; and one that adds up the sums, in an
// order of their own, so that a loss has the same bits in every run.
#include "../ops/denoising_loss.h"

#include "elementwise.cuh"

namespace dx {
namespace {

template <class T, class X>
struct LossOfShares {
  DenoisingLoss loss;
  const T* output;
  const X *x0, *noise;
  T* gradient;
  float sum;  // of this thread's penalties

  struct Sample {
    float of_x0, of_noise, scale;
    NoiseKey key;
    bool noisy;
  };
  template <int n>
  struct Inputs {
    Vec<T, n> output;
    Vec<X, n> x0, noise;
  };

  DX_DEVICE Sample sample(int64_t b) const {
    const int64_t t = loss.t[b];
    require(t >= 0 && t < loss.table_size, "denoising_loss: t out of range");
    Sample sample{loss.of_x0[t], loss.of_noise[t], 0, {}, loss.seeds != nullptr};
    if (gradient != nullptr) sample.scale = loss.upstream[b] / float(loss.batch.per_sample());
    if (sample.noisy) sample.key = {uint64_t(loss.seeds[b]), uint32_t(t), kTrainingStream};
    return sample;
  }

  template <int n, bool full>
  DX_DEVICE Inputs<n> read(int64_t at, int count) const {
    Inputs<n> in = {};
    in.output = load_pack<n, full>(output + at, count);
    if (x0 != nullptr) in.x0 = load_pack<n, full>(x0 + at, count);
    if (noise != nullptr) in.noise = load_pack<n, full>(noise + at, count);
    return in;
  }

  template <int n, bool full>
  DX_DEVICE void write(int64_t at, int count, const Sample& sample, const Inputs<n>& in,
                       const float (&made)[n]) {
    float slopes[n];
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const float z = noise != nullptr ? to_float(in.noise.at[k]) : made[k];
      const float x = to_float(in.x0.at[k]);
      const float residual =
          to_float(in.output.at[k]) - denoising_target(sample.of_x0, x, sample.of_noise, z);
      const Penalty p = loss.delta == 0 ? squared(residual) : huber(residual, loss.delta);
      if (full || k < count) sum += p.value;
      slopes[k] = sample.scale * p.slope;
    }
    if (gradient != nullptr) store_pack<n, full>(gradient + at, count, slopes);
  }
};

// The sum over a block of at most that many threads, in its thread 0.
template <int threads_at_most>
DX_DEVICE double block_sum(double value) {
  struct Warps {
    double of[threads_at_most / kWarp];
  };
  Warps& sums = shared<Warps>();
  value = warp_sum(value);
  block_barrier();  // what the sum before left there was read
  if (lane() == 0) sums.of[warp()] = value;
  block_barrier();
  value = 0;
  if (thread() == 0)
    for (int i = 0; i < warps(); ++i) value += sums.of[i];
  return value;
}

// sums [B, blocks]
template <Walk walk, int n, bool full, class T, class X>
DX_GLOBAL DX_BOUNDED(kMostThreads<walk>, 1) void loss_of_shares(const LossOfShares<T, X> all,
                                                                double* sums) {
  const Batch& batch = all.loss.batch;
  const int64_t shares = Share<walk, n>::shares(batch);
  const int64_t of_block = int64_t{threads()} * tuning::kElementVectors;
  for (int64_t b = block_y(); b < batch.samples; b += blocks_y()) {
    LossOfShares<T, X> op = all;
    op.sum = 0;
    for (int64_t first = block() * of_block + thread(); first < shares;
         first += blocks() * of_block)
      elementwise_shares<walk, n, full>(op, batch, b, first);
    const double sum = block_sum<kMostThreads<walk>>(op.sum);
    if (thread() == 0) sums[b * blocks() + block()] = sum;
  }
  let_next_launch();
}

// A warp for each sample: losses [B] from its sums [B, pieces].
DX_GLOBAL DX_BOUNDED(kWarp, 1) void mean_losses(const DenoisingLoss loss, const double* sums,
                                                const int64_t pieces) {
  await_last_launch();
  double sum = 0;
  for (int64_t i = lane(); i < pieces; i += kWarp) sum += sums[block() * pieces + i];
  sum = warp_sum(sum);
  if (lane() == 0) loss.losses[block()] = float(sum / double(loss.batch.per_sample()));
}

struct Cuda {
  OnDevice device;
  const Tensor& output;
  explicit Cuda(const Tensor& output) : device(output), output(output) {}

  template <class T, class X>
  void run(const DenoisingLoss& loss, const T* m, const X* x0, const X* noise, T* gradient) const {
    const Batch& batch = loss.batch;
    if (batch.samples == 0) return;
    if (batch.per_sample() == 0) return means(loss, nullptr, 0, false);
    const auto run = [&](auto walk, auto n, auto full) {
      constexpr Walk w = decltype(walk)::value;
      constexpr int kPack = decltype(n)::value;
      const Launch how = elementwise_launch<w, kPack>("denoising_loss", device, batch);
      const Tensor sums = fresh(output, {batch.samples, how.blocks}, int32_t(ScalarType::Double));
      double* at = static_cast<double*>(sums.mutable_data_ptr());
      launch(device, how, loss_of_shares<w, kPack, decltype(full)::value, T, X>,
             LossOfShares<T, X>{loss, m, x0, noise, gradient, 0}, at);
      means(loss, at, how.blocks, true);
    };
    dispatch_shares<T>(batch, loss.seeds != nullptr, run, m, x0, noise, gradient);
  }

  void means(const DenoisingLoss& loss, const double* sums, int64_t pieces, bool follows) const {
    Launch how{"denoising_loss: means", loss.batch.samples, 1, kWarp};
    how.follows_ours = follows;
    launch(device, how, mean_losses, loss, sums, pieces);
  }
};

}  // namespace

DX_REGISTER_KERNELS(m) { m.impl("denoising_loss", TORCH_BOX(&denoising_loss<Cuda>)); }

}  // namespace dx
