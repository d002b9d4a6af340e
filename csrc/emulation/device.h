// The vocabulary of device.cuh on the host, for the tests of the kernels: the same .cu files,
// compiled as C++, run without a GPU, slowly, and with more mistakes found than a GPU finds.
//
// A thread is a fiber that runs until it has to wait, at a barrier or a shuffle; then another one,
// chosen at random from a seed, goes on. Blocks follow one another in a random order, those of a
// cluster run together. The seed and the GPU's limits are set by the op `configure`.
//
// Errors, thrown out of launch(), that name the kernel, the block, the thread and the line:
//   - a launch that a GPU refuses
//   - a barrier or a shuffle that some threads wait at while others have ended, or wait elsewhere
//   - cluster_arrive twice without cluster_wait, or cluster_wait without it; a thread that ends
//     between the two
//   - a thread of a launch that follows ours which ends without await_last_launch
//   - load, store: a pointer that is not aligned to the access
//   - of_rank: not a pointer into shared memory, no such rank, a block that has ended or that may
//     end before the read, as no cluster barrier follows
//   - a write shortly before or after shared memory; all else there is for AddressSanitizer
//   - require
// What no error says shows in the results: shared memory is NaN (0xFF) until it is written, and
// a missing barrier makes results depend on the seed.
//
// Not seen: races between clusters; what is read before await_last_launch; a pointer of of_rank
// that is kept beyond a cluster_barrier; more threads than DX_BOUNDED says. A thread that fails
// ends the others where they are, without their destructors.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "configuration.h"
#include "machine.h"

#define DX_GLOBAL static
#define DX_BOUNDED(threads, blocks)
#define DX_DEVICE inline

#define DX_REGISTER_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(DX_NAMESPACE, DX_DISPATCH_KEY, m)

// Of tests/stand_in, whose tensors say that they are CUDA's: the stream that is current there, and
// where a launch is told, for the graph that captures it. Null where that is not loaded.
extern "C" {
__attribute__((weak)) int64_t stand_in_current_stream(int device);
__attribute__((weak)) void stand_in_launched(int device, int64_t stream, const char* kernel,
                                             std::function<void()>* again);
}

namespace dx {

inline bool compiled_for(int) { return true; }

class OnDevice {
 public:
  explicit OnDevice(const Tensor& t)
      : index(t.get_device_index()),
        stream(t.is_cpu() ? 0 : stand_in_current_stream(index)),
        limits(emulation::configuration.limits) {}
  const int index;  // negative: the CPU
  const int64_t stream;
  const DeviceLimits limits;
};

template <class... Parameters, class... Arguments>
void launch(const OnDevice& device, const Launch& how, void (*kernel)(Parameters...),
            Arguments&&... arguments) {
  const auto call = std::make_pair(
      kernel, std::tuple<std::remove_cv_t<Parameters>...>(std::forward<Arguments>(arguments)...));
  using Pair = decltype(call);
  const auto run_thread = [](const void* call) {
    const auto& [kernel, arguments] = *static_cast<Pair*>(call);
    std::apply(kernel, arguments);
  };
  emulation::run(how, device.limits, {run_thread, &call});
  if (device.index < 0) return;
  std::function<void()> again = [how, limits = device.limits, run_thread, call] {
    emulation::run(how, limits, {run_thread, &call});
  };
  stand_in_launched(device.index, device.stream, how.name, &again);
}

DX_DEVICE int thread() { return emulation::running->index; }
DX_DEVICE int threads() { return int(emulation::running->block->threads.size()); }
DX_DEVICE int lane() { return thread() % kWarp; }
DX_DEVICE int warp() { return thread() / kWarp; }
DX_DEVICE int warps() { return threads() / kWarp; }
DX_DEVICE int64_t block() { return emulation::running->block->x; }
DX_DEVICE int64_t blocks() { return emulation::running->block->cluster->how.blocks; }
DX_DEVICE int64_t block_y() { return emulation::running->block->y; }
DX_DEVICE int64_t blocks_y() { return emulation::running->block->cluster->how.blocks_y; }
DX_DEVICE int cluster_rank() { return emulation::running->block->rank; }
DX_DEVICE int cluster_size() { return emulation::running->block->cluster->how.cluster; }

DX_DEVICE void block_barrier(emulation::Place here = emulation::Place::current()) {
  emulation::block_barrier(here);
}
DX_DEVICE void cluster_barrier(emulation::Place here = emulation::Place::current()) {
  emulation::cluster_barrier(here);
}
DX_DEVICE void cluster_arrive(emulation::Place here = emulation::Place::current()) {
  emulation::cluster_arrive(here);
}
DX_DEVICE void cluster_wait() { emulation::cluster_wait(); }

// Launches follow one another here.
DX_DEVICE void await_last_launch() { emulation::running->awaited_last_launch = true; }
DX_DEVICE void let_next_launch() {}

template <class T>
DX_DEVICE T shuffle_xor(T value, int mask, emulation::Place here = emulation::Place::current()) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "as in CUDA");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = emulation::shuffle_xor(bits, mask, here);
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
DX_DEVICE T& shared() {
  static const char type = 0;
  return *reinterpret_cast<T*>(emulation::static_shared(&type, sizeof(T)));
}

template <class T>
DX_DEVICE T* dynamic_shared() {
  return reinterpret_cast<T*>(emulation::running->block->dynamic.begin());
}

template <class T>
DX_DEVICE const T* of_rank(const T* mine, int rank,
                           emulation::Place here = emulation::Place::current()) {
  const char* bytes = reinterpret_cast<const char*>(mine);
  return reinterpret_cast<const T*>(emulation::of_rank(bytes, rank, here));
}

DX_DEVICE void require(bool condition, const char* message) {
  if (!condition) emulation::fail(message);
}

template <bool streaming>
DX_DEVICE void store_16_bytes(void* to, const void* from) {
  memcpy(to, from, 16);
}
DX_DEVICE void stream_16_bytes(void* to, const void* from) { memcpy(to, from, 16); }

DX_DEVICE void check_aligned(const void* pointer, int bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % unsigned(bytes) != 0)
    emulation::fail("an access of " + std::to_string(bytes) + " bytes is not aligned");
}

}  // namespace dx
