// The vocabulary of device.cuh in CUDA.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <cassert>
#include <mutex>
#include <utility>

#define DX_GLOBAL __global__
// The most threads that a kernel is launched with; the 1 lets it have the registers that it needs.
#define DX_BOUNDED(threads) __launch_bounds__(threads, 1)
#define DX_DEVICE __device__ __forceinline__

#define DX_REGISTER_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(DX_NAMESPACE, CUDA, m)

namespace dx {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or torch would find it after a call of its own
  STD_TORCH_CHECK(false, what, ": ", cudaGetErrorString(error));
}

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// Tells what the kernels are compiled for.
template <int>
DX_GLOBAL void probe() {}

inline const DeviceLimits& limits_of(int device) {
  static std::mutex mutex;
  static std::array<DeviceLimits, 64> known{};
  const std::lock_guard<std::mutex> lock(mutex);
  STD_TORCH_CHECK(device >= 0 && device < int(known.size()), "device index ", device);
  DeviceLimits& limits = known[device];
  if (limits.multiprocessors == 0) {
    const int shared = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - kStaticShared;
    // Code for older architectures runs on newer ones too, but knows no clusters.
    cudaFuncAttributes compiled = {};
    check(cudaFuncGetAttributes(&compiled, probe<0>), "the CUDA library has no code for this GPU");
    const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
    const bool clusters = major >= 9 && compiled.ptxVersion >= 90;
    limits = {attribute(cudaDevAttrMultiProcessorCount, device), shared, clusters ? 8 : 1};
  }
  return limits;
}

// Makes a tensor's device the current one, for as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t)
      : guard_(t.get_device_index()), limits(limits_of(t.get_device_index())) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;

 public:
  const DeviceLimits& limits;
  cudaStream_t stream;
};

template <class... Parameters, class... Arguments>
void launch(const OnDevice& device, const Launch& how, void (*kernel)(Parameters...),
            Arguments&&... arguments) {
  STD_TORCH_CHECK(how.blocks < int64_t(1) << 31, how.name, ": too many blocks");
  // A block has 48 KB, static and dynamic together, without asking. Always asked for the most that
  // there is, so that no other thread's launch of the kernel is left with less.
  if (how.shared_bytes > 48 * 1024 - kStaticShared)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize,
                               device.limits.shared_bytes),
          how.name);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(how.blocks), unsigned(how.blocks_y));
  config.blockDim = dim3(unsigned(how.threads));
  config.dynamicSmemBytes = size_t(how.shared_bytes);
  config.stream = device.stream;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(how.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = how.cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), how.name);
}

DX_DEVICE int thread() { return int(threadIdx.x); }
DX_DEVICE int threads() { return int(blockDim.x); }
DX_DEVICE int lane() { return thread() % kWarp; }
DX_DEVICE int warp() { return thread() / kWarp; }
DX_DEVICE int warps() { return threads() / kWarp; }
DX_DEVICE int64_t block() { return blockIdx.x; }
DX_DEVICE int64_t blocks() { return gridDim.x; }
DX_DEVICE int64_t block_y() { return blockIdx.y; }
DX_DEVICE int64_t blocks_y() { return gridDim.y; }
DX_DEVICE void block_barrier() { __syncthreads(); }

template <class T>
DX_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}

template <class T>
DX_DEVICE T& shared() {
  __shared__ alignas(alignof(T) < 16 ? 16 : alignof(T)) unsigned char bytes[sizeof(T)];
  return *reinterpret_cast<T*>(bytes);
}

template <class T>
DX_DEVICE T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char dynamic_bytes[];
  return reinterpret_cast<T*>(dynamic_bytes);
}

// In one instruction: left to itself the compiler stores some vectors by elements.
DX_DEVICE void store_16_bytes(void* to, const void* from) {
  uint4 words;
  memcpy(&words, from, sizeof words);
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
}

// Clusters exist from sm_90 on; elsewhere every block is a cluster of its own.
DX_DEVICE int cluster_size() {
#if __CUDA_ARCH__ >= 900
  unsigned size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return int(size);
#else
  return 1;
#endif
}

DX_DEVICE int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
#else
  return 0;
#endif
}

DX_DEVICE void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;\n" ::
          : "memory");
#else
  block_barrier();
#endif
}

template <class T>
DX_DEVICE const T* of_rank(const T* mine, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t theirs;
  asm volatile("mapa.u64 %0, %1, %2;"
               : "=l"(theirs)
               : "l"(reinterpret_cast<uint64_t>(mine)), "r"(rank));
  return reinterpret_cast<const T*>(theirs);
#else
  return mine;
#endif
}

// A GPU itself faults.
DX_DEVICE void check_aligned(const void*, int) {}

// A failed one is reported by the next call that waits for the device, as torch's own are.
DX_DEVICE void require(bool condition, const char* message) {
  if (!condition) __assert_fail(message, "diffusion_ext", 0, "a kernel");
}

}  // namespace dx
