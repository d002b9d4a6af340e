// How tensors lie in memory, and the strides that torch gives its results, so that ours have them
// too: what a view of an output accepts, and the format of a convolution after it, depend on these,
// and on those of sizes of 1.
#pragma once

#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace dx {

// How a sample's elements [C, *spatial] lie in memory. An unbatched or 2-D sample is contiguous.
enum class Layout { contiguous, channels_last };

using torch::headeronly::IntHeaderOnlyArrayRef;
using Strides = std::vector<int64_t>;

// Whether sizes are dense in the layout, judged by their strides (dimensions of size 1 have any).
inline bool fits(IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides, Layout layout) {
  const int64_t dims = sizes.size();
  if (std::find(sizes.begin(), sizes.end(), 0) != sizes.end()) return true;
  if (layout == Layout::channels_last && dims < 3) return false;
  int64_t expected = 1;
  const auto step = [&](int64_t d) {
    const bool ok = sizes[d] == 1 || strides[d] == expected;
    expected *= sizes[d];
    return ok;
  };
  if (layout == Layout::channels_last && !step(1)) return false;
  for (int64_t d = dims - 1; d >= 0; --d)
    if (!(layout == Layout::channels_last && d == 1) && !step(d)) return false;
  return true;
}

// Of torch.empty(sizes, memory_format=layout).
inline Strides strides_in(IntHeaderOnlyArrayRef sizes, Layout layout) {
  Strides strides(sizes.size(), 1);
  int64_t next = 1;
  const auto step = [&](int64_t d) {
    strides[d] = next;
    next *= std::max<int64_t>(sizes[d], 1);
  };
  if (layout == Layout::channels_last) step(1);
  for (int64_t d = sizes.size(); d-- > 0;)
    if (!(layout == Layout::channels_last && d == 1)) step(d);
  return strides;
}

// Dimensions from the shortest strides to the longest, as torch's elementwise ops sort them: by
// insertion, from the last dimension on, a stride of 0 being before and after any other.
inline std::vector<int64_t> by_strides(IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides) {
  std::vector<int64_t> order(sizes.size());
  std::iota(order.rbegin(), order.rend(), 0);
  const auto compare = [&](int64_t a, int64_t b) {
    if (strides[a] == 0 || strides[b] == 0) return 0;
    if (strides[a] != strides[b]) return strides[a] < strides[b] ? -1 : 1;
    return sizes[a] > sizes[b] ? 1 : 0;
  };
  for (size_t i = 1; i < order.size(); ++i) {
    for (size_t moved = i, other = i; other-- > 0;) {
      const int comparison = compare(order[other], order[moved]);
      if (comparison < 0) break;
      if (comparison > 0) std::swap(order[other], order[moved]), moved = other;
    }
  }
  return order;
}

// Of a x + b y where y lies as x: of a sum of products, as an elementwise op is written in torch.
inline Strides strides_of_sum(IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides) {
  const auto fitting = [&](IntHeaderOnlyArrayRef given, Strides& found) {
    for (Layout layout : {Layout::contiguous, Layout::channels_last}) {
      if (layout == Layout::channels_last && sizes.size() != 4) continue;
      if (!fits(sizes, given, layout)) continue;
      found = strides_in(sizes, layout);
      return true;
    }
    return false;
  };
  Strides found;
  if (fitting(strides, found)) return found;
  Strides dense(sizes.size());
  int64_t next = 1;
  for (const int64_t d : by_strides(sizes, strides)) dense[d] = next, next *= sizes[d];
  return fitting(dense, found) ? found : dense;
}

// Whether torch takes a tensor for channels_last (its suggest_memory_format()): by its strides
// alone, those of sizes of 1 too, whether it is dense or not. Only 4-D and 5-D have that format.
inline bool suggests_channels_last(IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides) {
  const int64_t dims = sizes.size();
  if (dims < 4 || dims > 5 || strides[1] == 0) return false;
  int64_t least = 0;
  const auto step = [&](int64_t d) {
    const bool ok = sizes[d] > 0 && strides[d] >= least;
    least = strides[d] * sizes[d];
    return ok;
  };
  if (!step(1)) return false;
  for (int64_t d = dims - 1; d > 1; --d)
    if (!step(d)) return false;
  return least != strides[1] && step(0);
}

// Of a GroupNorm of torch's on a CPU, and of an activation after it.
inline Strides strides_of_norm(IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides,
                               bool activated) {
  if (!suggests_channels_last(sizes, strides)) return strides_in(sizes, Layout::contiguous);
  const Strides normalised = strides_in(sizes, Layout::channels_last);
  if (activated && fits(sizes, normalised, Layout::contiguous))  // of 1 channel, or 1 pixel
    return strides_in(sizes, Layout::contiguous);
  return normalised;
}

}  // namespace dx
