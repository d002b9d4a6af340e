// What the elementwise ops share on CUDA: a thread's share of a batch, its loads and stores, and
// its noise. An op is a struct that the kernel copies:
//   Sample sample(b)                what all elements of sample b need; sample.noisy: noise as well
//   Inputs<n> read<n, full>(at, count)                  a pack of its inputs
//   write<n, full>(at, count, sample, inputs, z)        its results; z: n normals, or zeros
#pragma once

#include "../math/normal.h"
#include "../math/philox.h"
#include "device.cuh"

namespace dx {

// The counter and key of the noise of a sample, but for the block.
struct NoiseKey {
  uint64_t seed;
  uint32_t step, stream;
};

// Normals 4 block .. 4 block + 3 of a sample.
DX_DEVICE void four_normals(const NoiseKey& key, int64_t block, float (&z)[4]) {
  const Words4 r = philox4x32({uint32_t(block), uint32_t(block >> 32), key.step, key.stream},
                              uint32_t(key.seed), uint32_t(key.seed >> 32));
  box_muller(r.r0, r.r1, z[0], z[1]);
  box_muller(r.r2, r.r3, z[2], z[3]);
}

// n neighbours, of which `count` exist; `full` says that all do and that they are aligned.
template <int n, bool full, class T>
DX_DEVICE Vec<T, n> load_pack(const T* from, int count) {
  if constexpr (full) {
    if constexpr (tuning::kStreaming && sizeof(Vec<T, n>) == 16) return load_streaming<n>(from);
    return load<n>(from);
  } else {
    Vec<T, n> pack = {};
#pragma unroll
    for (int k = 0; k < n; ++k)
      if (k < count) pack.at[k] = from[k];
    return pack;
  }
}

template <int n, bool full, class T>
DX_DEVICE void store_pack(T* to, int count, const float (&values)[n]) {
  Vec<T, n> pack;
#pragma unroll
  for (int k = 0; k < n; ++k) round_to(values[k], pack.at[k]);
  if constexpr (full) {
    if constexpr (tuning::kStreaming && sizeof pack == 16) return store_streaming(to, pack);
    store(to, pack);
  } else {
#pragma unroll
    for (int k = 0; k < n; ++k)
      if (k < count) to[k] = pack.at[k];
  }
}

// How a sample's elements are shared out. Noise is made for four neighbours in (C, H, W) order:
//   run     a thread has n neighbours in memory, which are also neighbours in that order
//   pixels  channels_last: a thread has n channels of four pixels, so that it uses all the normals
//           of a block; neighbouring threads have neighbouring channels
enum class Walk { run, pixels };

template <Walk walk>
constexpr int kPacks = walk == Walk::run ? 1 : 4;

// The packs of one thread, as offsets in the sample, and its noise.
template <Walk walk, int n>
struct Share {
  int64_t at[kPacks<walk>];
  int count[kPacks<walk>];
  int64_t block;       // run: of the first normals. pixels: of the first channel's
  int64_t block_step;  // pixels: from one channel's block to the next one's

  // How many threads share a sample.
  static DX_INLINE int64_t shares(const Batch& b) {
    constexpr int64_t elements = n * kPacks<walk>;
    return (b.per_sample() + elements - 1) / elements;
  }

  DX_DEVICE Share(const Batch& batch, int64_t index) {
    const int64_t channels = batch.channels, spatial = batch.spatial, size = batch.per_sample();
    if constexpr (walk == Walk::run) {
      at[0] = index * n;
      count[0] = int(size - at[0] < n ? size - at[0] : n);
      block = at[0] / 4;
      block_step = 1;
    } else {
      // Four neighbours in (C, H, W) order: four pixels of a channel, or, where four does not
      // divide the pixels, what comes next.
      const bool even = spatial % 4 == 0;
      const int64_t across = channels / n;
      const int64_t first = even ? index % across * n * spatial + index / across * 4 : index * 4;
      block = first / 4;
      block_step = spatial / 4;
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        const int64_t c = even ? index % across * n : (first + p) / spatial;
        const int64_t pixel = even ? index / across * 4 + p : (first + p) % spatial;
        at[p] = pixel * channels + c;
        count[p] = first + p < size ? n : 0;
      }
    }
  }

  DX_DEVICE void normals(const NoiseKey& key, float (&z)[kPacks<walk>][n]) const {
    float four[4];
    if constexpr (walk == Walk::run) {
#pragma unroll
      for (int k = 0; k < n; k += 4) {
        four_normals(key, block + k / 4, four);
#pragma unroll
        for (int i = 0; i < 4; ++i) z[0][k + i] = four[i];
      }
    } else {
#pragma unroll
      for (int k = 0; k < n; ++k) {
        four_normals(key, block + k * block_step, four);
#pragma unroll
        for (int p = 0; p < 4; ++p) z[p][k] = four[p];
      }
    }
  }
};

// The threads of a block at most: the walk by pixels takes up to 166 registers of each.
template <Walk walk>
constexpr int kMostThreads = walk == Walk::run ? tuning::kElementThreads : tuning::kPixelThreads;

// The shares of sample b that begin at `first`, a block's threads apart: all loads go out first.
template <Walk walk, int n, bool full, class Op>
DX_DEVICE void elementwise_shares(Op& op, const Batch& batch, int64_t b, int64_t first) {
  constexpr int kShares = tuning::kElementVectors, packs = kPacks<walk>;
  const int64_t offset = b * batch.per_sample(), shares = Share<walk, n>::shares(batch);
  typename Op::template Inputs<n> inputs[kShares][packs];
#pragma unroll
  for (int i = 0; i < kShares; ++i) {
    if (first + i * threads() >= shares) break;
    const Share<walk, n> share(batch, first + i * threads());
#pragma unroll
    for (int p = 0; p < packs; ++p)
      inputs[i][p] = op.template read<n, full>(offset + share.at[p], share.count[p]);
  }
  const auto sample = op.sample(b);
#pragma unroll
  for (int i = 0; i < kShares; ++i) {
    if (first + i * threads() >= shares) break;
    const Share<walk, n> share(batch, first + i * threads());
    float z[packs][n] = {};
    if (sample.noisy) share.normals(sample.key, z);
#pragma unroll
    for (int p = 0; p < packs; ++p)
      op.template write<n, full>(offset + share.at[p], share.count[p], sample, inputs[i][p], z[p]);
  }
}

template <Walk walk, int n, bool full, class Op>
DX_GLOBAL DX_BOUNDED(kMostThreads<walk>, 1) void elementwise_kernel(const Op op,
                                                                    const Batch batch) {
  const int64_t shares = Share<walk, n>::shares(batch);
  const int64_t of_block = int64_t{threads()} * tuning::kElementVectors;
  for (int64_t b = block_y(); b < batch.samples; b += blocks_y())
    for (int64_t first = block() * of_block + thread(); first < shares;
         first += blocks() * of_block)
      elementwise_shares<walk, n, full>(op, batch, b, first);
}

// How a kernel of shares is launched over a batch.
template <Walk walk, int n>
Launch elementwise_launch(const char* name, const OnDevice& device, const Batch& batch) {
  const int64_t shares = Share<walk, n>::shares(batch);
  const int64_t whole_warps = (shares + kWarp - 1) / kWarp * kWarp;
  const int threads = int(std::min<int64_t>(whole_warps, kMostThreads<walk>));
  const int64_t of_block = int64_t{threads} * tuning::kElementVectors;
  const int64_t samples = std::min<int64_t>(batch.samples, 65535);
  int64_t blocks = (shares + of_block - 1) / of_block;
  if constexpr (tuning::kElementBlocks > 0) {
    const int64_t most = int64_t{tuning::kElementBlocks} * device.limits.multiprocessors;
    blocks = std::min(blocks, std::max<int64_t>(most / samples, 1));
  }
  return {name, blocks, samples, threads};
}

// Calls run(walk, n, full), as constants, for a batch whose tensors (some of them null) lie alike.
// A run is 16 bytes of T. `noisy`: noise may be made; without, the memory layout does not matter.
template <class T, class Run, class... Elements>
void dispatch_shares(const Batch& batch, bool noisy, const Run& run, const Elements*... tensors) {
  // Each to what its own access wants: float32 data may lie beside a bfloat16 model output.
  const auto aligned = [&](auto n) {
    return (
        (reinterpret_cast<uintptr_t>(tensors) % alignof(Vec<Elements, decltype(n)::value>) == 0) &&
        ...);
  };
  constexpr std::integral_constant<Walk, Walk::run> contiguous;
  constexpr std::integral_constant<Walk, Walk::pixels> pixels;
  constexpr int kVector = 16 / sizeof(T);
  const std::integral_constant<int, kVector> vector;
  const std::integral_constant<int, 4> four;
  const std::integral_constant<int, 1> one;
  if (noisy && batch.layout == Layout::channels_last) {
    if (batch.channels % 4 == 0 && batch.spatial % 4 == 0 && aligned(four))
      return run(pixels, four, std::true_type());
    return run(pixels, one, std::false_type());
  }
  if (batch.per_sample() % kVector == 0 && aligned(vector))
    return run(contiguous, vector, std::true_type());
  run(contiguous, four, std::false_type());
}

// Runs an op over a batch. Arguments: as dispatch_shares.
template <class T, class Op, class... Elements>
void launch_elementwise(const char* name, const OnDevice& device, const Batch& batch, const Op& op,
                        bool noisy, const Elements*... tensors) {
  if (batch.samples == 0 || batch.per_sample() == 0) return;
  const auto run = [&](auto walk, auto n, auto full) {
    constexpr Walk w = decltype(walk)::value;
    constexpr int kPack = decltype(n)::value;
    launch(device, elementwise_launch<w, kPack>(name, device, batch),
           elementwise_kernel<w, kPack, decltype(full)::value, Op>, op, batch);
  };
  dispatch_shares<T>(batch, noisy, run, tensors...);
}

}  // namespace dx
