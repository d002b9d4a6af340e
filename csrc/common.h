// What every op's host code shares: the stable ABI, memory layouts and dtype dispatch.
#pragma once

// Before any torch header: the library then loads in every torch from 2.10 on. Here, and not on the
// command line, because the pybind11 module must not see it.
#define TORCH_TARGET_VERSION 0x020A000000000000ULL

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "layouts.h"
#include "math/half.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

// The ops' namespace in torch; csrc/emulation builds them into another one.
#ifndef DX_NAMESPACE
#define DX_NAMESPACE diffusion_ext
#endif

namespace dx {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Applies f to the tensor where there is one.
template <class F>
MaybeTensor map(const MaybeTensor& t, const F& f) {
  return t ? MaybeTensor(f(*t)) : std::nullopt;
}

inline bool fits(const Tensor& t, Layout layout) { return fits(t.sizes(), t.strides(), layout); }

// channels_last only where t is so and is not contiguous as well.
inline Layout layout_of(const Tensor& t) {
  return !fits(t, Layout::contiguous) && fits(t, Layout::channels_last) ? Layout::channels_last
                                                                        : Layout::contiguous;
}

// Uninitialised, on the device of `like`, contiguous or of the strides given. Asked of the shim:
// torch::stable's functions pass through the dispatcher, which takes 1 us more.
inline Tensor fresh_strided(const Tensor& like, IntHeaderOnlyArrayRef sizes,
                            IntHeaderOnlyArrayRef strides, int32_t dtype) {
  int32_t device;
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype,
                                                  device, like.get_device_index(), &made));
  return Tensor(made);
}
inline int32_t dtype_of(const Tensor& t) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}
inline Tensor fresh(const Tensor& like, IntHeaderOnlyArrayRef sizes, int32_t dtype) {
  return fresh_strided(like, sizes, strides_in(sizes, Layout::contiguous), dtype);
}
inline Tensor fresh(const Tensor& like, IntHeaderOnlyArrayRef sizes) {
  return fresh(like, sizes, dtype_of(like));
}
// Of t's shape and dtype, with the strides that torch gives a sum of t and what lies as it.
inline Tensor fresh_like(const Tensor& t) {
  return fresh_strided(t, t.sizes(), strides_of_sum(t.sizes(), t.strides()), dtype_of(t));
}

// t itself where it is dense in the layout, else a copy that lies as `like` does (t's shape,
// dense).
inline Tensor in_layout(const Tensor& t, const Tensor& like, Layout layout) {
  if (fits(t, layout)) return t;
  Tensor copy = fresh_strided(like, like.sizes(), like.strides(), dtype_of(t));
  torch::stable::copy_(copy, t);
  return copy;
}

// Asks Linux for uninitialised memory in huge pages where it is large: at 40 MB its first touch
// took 15 ms in pages of 4 KB, five times the copy of the data, and 2.4 ms so. Asking from 32 MB on
// only, below which glibc may keep what it has, made perturb at 4 MB three times as slow.
inline void ask_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t huge = 1 << 21;
  if (bytes < 2 * huge) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + huge - 1) / huge * huge, last = (begin + bytes) / huge * huge;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // only advice
#endif
}

inline Tensor in_huge_pages(const Tensor& t) {
  if (t.is_cpu()) ask_huge_pages(t.data_ptr(), t.numel() * t.element_size());
  return t;
}

inline Tensor new_like(const Tensor& t) { return in_huge_pages(fresh_like(t)); }

// A tensor that a kernel writes, and where it writes: itself, or a contiguous copy where it does
// not lie in the layout that the kernel writes, written back at the end.
class Output {
 public:
  explicit Output(const Tensor& t) : Output(t, layout_of(t)) {}
  Output(const Tensor& t, Layout layout)
      : tensor_(t),
        layout_(layout),
        direct_(fits(t, layout_)),
        dense_(direct_ ? t : torch::stable::contiguous(t)) {}

  Layout layout() const { return layout_; }
  const Tensor& tensor() const { return tensor_; }
  const Tensor& dense() const { return dense_; }
  template <class T>
  T* data() const {
    return static_cast<T*>(dense_.mutable_data_ptr());
  }
  Tensor finish() {
    if (!direct_) torch::stable::copy_(tensor_, dense_);
    return tensor_;
  }

 private:
  Tensor tensor_;
  Layout layout_;
  bool direct_;
  Tensor dense_;
};

// Samples [B, *] as the elementwise kernels walk them.
struct Batch {
  int64_t samples, channels, spatial;
  Layout layout;

  Batch(const Tensor& x, Layout layout) : layout(layout) {
    samples = x.size(0);
    const int64_t per_sample = samples == 0 ? 0 : x.numel() / samples;
    channels = layout == Layout::channels_last ? x.size(1) : 1;
    spatial = channels == 0 ? 0 : per_sample / channels;
  }
  DX_INLINE int64_t per_sample() const { return channels * spatial; }
};

inline void check_same_device(const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.get_device_index() == x.get_device_index() && t.is_cpu() == x.is_cpu(), name,
                  ": wanted x's device");
}

inline void check_same_kind(const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, ": wanted x's dtype");
  check_same_device(name, t, x);
}

inline bool same_sizes(IntHeaderOnlyArrayRef s, IntHeaderOnlyArrayRef t) {
  return s.size() == t.size() && std::equal(s.begin(), s.end(), t.begin());
}
inline bool same_sizes(const Tensor& a, const Tensor& b) {
  return same_sizes(a.sizes(), b.sizes());
}

inline void check_like(const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(same_sizes(t, x), name, ": wanted x's shape");
  check_same_kind(name, t, x);
}

template <class T>
const T* data_of(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
const T* data_of(const MaybeTensor& t) {
  return t ? data_of<T>(*t) : nullptr;
}

// Variants of the kernels (benchmarks/gpu/variants.py), which are only timed, serve bfloat16 alone.
#if defined(DX_ONLY_BFLOAT16)
constexpr bool kEveryDtype = false;
#else
constexpr bool kEveryDtype = true;
#endif

// Calls body with a null pointer of the element type that stands for the dtype.
template <class Body>
void dispatch_floating(torch::headeronly::ScalarType dtype, const char* op, const Body& body) {
  if constexpr (kEveryDtype) {
    if (dtype == ScalarType::Float) return body(static_cast<float*>(nullptr));
    if (dtype == ScalarType::Half) return body(static_cast<Half*>(nullptr));
  }
  if (dtype == ScalarType::BFloat16) return body(static_cast<BFloat16*>(nullptr));
  STD_TORCH_CHECK(false, op, ": the kernels serve float32, float16 and bfloat16");
}

// t, or a contiguous copy. The dispatcher, which torch's contiguous() passes through, takes 1 us.
inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// int64 [count] on x's device, contiguous (a copy where t is strided).
inline Tensor index_vector(const char* name, const Tensor& t, int64_t count, const Tensor& x) {
  check_same_device(name, t, x);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long, name, ": wanted dtype int64");
  STD_TORCH_CHECK(t.numel() == count && t.dim() <= 1, name, ": wanted shape [", count, "]");
  return as_contiguous(t);
}

}  // namespace dx
