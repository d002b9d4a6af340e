// The vocabulary of device.cuh in CUDA.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <cassert>
#include <mutex>
#include <set>
#include <utility>

#define DX_GLOBAL __global__
// The most threads that a kernel is launched with, and the blocks that a multiprocessor has
// registers for; without the 1 a kernel would get fewer than it needs.
#define DX_BOUNDED(threads, blocks) __launch_bounds__(threads, blocks)
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

inline bool compiled_for(int device) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  cudaFuncAttributes compiled = {};
  const bool has = cudaFuncGetAttributes(&compiled, probe<0>) == cudaSuccess;
  cudaGetLastError();  // or torch would find it after a call of its own
  return has;
}

// Fills a launch's configuration and the attributes that it points to.
class Configuration {
 public:
  Configuration(const Launch& how, const DeviceLimits& limits, cudaStream_t stream) {
    config.gridDim = dim3(unsigned(how.blocks), unsigned(how.blocks_y));
    config.blockDim = dim3(unsigned(how.threads));
    config.dynamicSmemBytes = size_t(how.shared_bytes);
    config.stream = stream;
    config.attrs = attributes_;
    if (how.cluster > 1) {
      cudaLaunchAttribute& cluster = attributes_[config.numAttrs++];
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim = {unsigned(how.cluster), 1, 1};
    }
    if (how.follows_ours && limits.overlaps && tuning::kOverlapLaunches) {
      cudaLaunchAttribute& overlap = attributes_[config.numAttrs++];
      overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      overlap.val.programmaticStreamSerializationAllowed = 1;
    }
  }
  Configuration(const Configuration&) = delete;

  cudaLaunchConfig_t config = {};

 private:
  cudaLaunchAttribute attributes_[2] = {};
};

// The blocks of the largest cluster, up to kMostCluster, that the device has room for when each has
// all the shared memory there is: a slice of a GPU may have less than a whole one.
inline int most_cluster(int shared_bytes) {
  const auto* kernel = reinterpret_cast<const void*>(probe<0>);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "cudaFuncSetAttribute");
  for (int size = tuning::kMostCluster; size > 1; size /= 2) {
    const Configuration c({"probe", size, 1, 256, size, shared_bytes}, {}, nullptr);
    int clusters = 0;
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &c.config);
    if (error == cudaSuccess && clusters > 0) return size;
    cudaGetLastError();
  }
  return 1;
}

inline const DeviceLimits& limits_of(int device) {
  static std::mutex mutex;
  static std::array<DeviceLimits, 64> known{};
  const std::lock_guard<std::mutex> lock(mutex);
  STD_TORCH_CHECK(device >= 0 && device < int(known.size()), "device index ", device);
  DeviceLimits& limits = known[device];
  if (limits.multiprocessors == 0) {
    const int shared = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - kStaticShared;
    // Code for older architectures runs on newer ones too, but knows no clusters, and does not wait
    // for the launch before it.
    cudaFuncAttributes compiled = {};
    check(cudaFuncGetAttributes(&compiled, probe<0>), "the CUDA library has no code for this GPU");
    const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
    const bool hopper = major >= 9 && compiled.ptxVersion >= 90;
    const int most = hopper ? most_cluster(shared) : 1;
    limits = {attribute(cudaDevAttrMultiProcessorCount, device), shared, most, hopper};
  }
  return limits;
}

// Makes a tensor's device the current one, for as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t)
      : index(t.get_device_index()), guard_(index), limits(limits_of(index)) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &current));
    stream = static_cast<cudaStream_t>(current);
  }

  const int index;

 private:
  torch::stable::accelerator::DeviceGuard guard_;

 public:
  const DeviceLimits& limits;
  cudaStream_t stream;
};

// A block has 48 KB, static and dynamic together, without asking. We ask once per kernel and
// device, since asking at each launch takes the host time. We ask for all that there is, so that no
// later launch of the kernel has to ask again.
inline void allow_most_shared(const void* kernel, const OnDevice& device, const char* name) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.contains({kernel, device.index})) return;
  const int bytes = device.limits.shared_bytes;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
  allowed.insert({kernel, device.index});
}

template <class... Parameters, class... Arguments>
void launch(const OnDevice& device, const Launch& how, void (*kernel)(Parameters...),
            Arguments&&... arguments) {
  STD_TORCH_CHECK(how.blocks < int64_t(1) << 31, how.name, ": too many blocks");
  if (how.shared_bytes > 48 * 1024 - kStaticShared)
    allow_most_shared(reinterpret_cast<const void*>(kernel), device, how.name);
  const Configuration c(how, device.limits, device.stream);
  check(cudaLaunchKernelEx(&c.config, kernel, std::forward<Arguments>(arguments)...), how.name);
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
template <bool streaming>
DX_DEVICE void store_16_bytes(void* to, const void* from) {
  uint4 words;
  memcpy(&words, from, sizeof words);
  if constexpr (streaming)
    asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                 "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
                 : "memory");
  else
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                 "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
                 : "memory");
}

DX_DEVICE void stream_16_bytes(void* to, const void* from) {
  const uint4 words = __ldcs(static_cast<const uint4*>(from));
  memcpy(to, &words, sizeof words);
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

DX_DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

DX_DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  block_barrier();
#endif
}

DX_DEVICE void cluster_barrier() {
  cluster_arrive();
  cluster_wait();
}

DX_DEVICE void let_next_launch() {
#if __CUDA_ARCH__ >= 900
  if constexpr (tuning::kOverlapLaunches) asm volatile("griddepcontrol.launch_dependents;");
#endif
}

DX_DEVICE void await_last_launch() {
#if __CUDA_ARCH__ >= 900
  if constexpr (tuning::kOverlapLaunches) asm volatile("griddepcontrol.wait;" ::: "memory");
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
