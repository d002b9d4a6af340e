// The vocabulary that the kernels are written in. Compiled by nvcc it is CUDA; compiled for the
// host it is csrc/emulation, which runs the same kernels with a fiber for every thread.
//
// Host:    OnDevice (device, stream and limits of a tensor), launch, compiled_for(device index)
// Device:  thread(), threads(), block(), blocks(), block_y(), blocks_y(), lane(), warp(), warps()
//          block_barrier(), cluster_rank(), cluster_size(), cluster_barrier(); the last in two
//          halves, cluster_arrive() and, before the block ends, cluster_wait()
//          await_last_launch(): before what the launch before may still write, where a Launch
//          follows_ours; let_next_launch(): it may be started, to wait there
//          shuffle_xor(value, mask): all lanes of a warp take part
//          shared<T>(): the block's one T; dynamic_shared<T>(): Launch::shared_bytes of them
//          of_rank(pointer to shared memory, rank): the same place in another block of the cluster
//          require(condition, message): ends the launch with an error
//          Vec<T, n>, load(pointer), store(pointer, vec): one access of n elements, stored to
//          device memory; load_streaming, store_streaming: 16 bytes that nobody reads again
#pragma once

#include "../common.h"
#include "../math/half.h"
#include "limits.h"
#include "tuning.h"

namespace dx {

constexpr int kWarp = 32;

struct Launch {
  const char* name;
  int64_t blocks;  // a multiple of cluster
  int64_t blocks_y;
  int threads;  // a multiple of kWarp
  int cluster = 1;
  int shared_bytes = 0;       // dynamic
  bool follows_ours = false;  // on its stream; and the kernel calls await_last_launch
};

// n elements, moved by one access where they are at most 16 bytes and so aligned.
template <class T, int n>
struct alignas(sizeof(T) * n <= 16 ? sizeof(T) * n : 16) Vec {
  T at[n];
};

}  // namespace dx

#if defined(__CUDACC__)
#include "device_cuda.cuh"
#else
#include "../emulation/device.h"
#endif

namespace dx {

template <int n, class T>
DX_DEVICE Vec<T, n> load(const T* from) {
  check_aligned(from, alignof(Vec<T, n>));
  return *reinterpret_cast<const Vec<T, n>*>(from);
}

template <class T, int n>
DX_DEVICE void store(T* to, const Vec<T, n>& vec) {
  check_aligned(to, alignof(Vec<T, n>));
  if constexpr (sizeof vec == 16)
    store_16_bytes<false>(to, &vec);
  else
    *reinterpret_cast<Vec<T, n>*>(to) = vec;
}

template <int n, class T>
DX_DEVICE Vec<T, n> load_streaming(const T* from) {
  check_aligned(from, 16);
  Vec<T, n> vec;
  static_assert(sizeof vec == 16);
  stream_16_bytes(&vec, from);
  return vec;
}

template <class T, int n>
DX_DEVICE void store_streaming(T* to, const Vec<T, n>& vec) {
  check_aligned(to, 16);
  static_assert(sizeof vec == 16);
  store_16_bytes<true>(to, &vec);
}

// All lanes have the sum of all.
template <class T>
DX_DEVICE T warp_sum(T value) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

}  // namespace dx
