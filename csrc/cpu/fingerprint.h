// What tells whether a weight still holds the numbers that it was laid out from. Neither its
// version nor its address says so of what was written through `.data`, as adapters and averages do.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "../math/portable.h"

namespace dx {

// A hash of a weight's numbers [filters, numbers], dense, as they lie in memory: of those that
// Sampling reads, as their bits. The same on any number of threads and any instruction set.
// Bits: uint32_t of float32, uint16_t of half precision.
template <class Bits>
uint64_t fingerprint(const Bits* data, int64_t filters, int64_t numbers);

// Which runs of 64 neighbouring numbers are read: all of a weight of 16384, and of a larger one
// `taken` of each filter's, at least one in 32. Single cache lines, of 16 numbers, would be read no
// faster: what takes the time is to find a page.
//
// The runs are a lattice. Those of a filter are cut into `taken` strata of `width`, at most 32, and
// of stratum j filter k has run (k·step + j·shift) mod width read. `step` has no factor in common
// with `width`, so any `width` neighbouring filters, which are never more than there are, have
// every run read between them: no input channel or tap goes unread, and of 32 neighbouring filters
// no number.
struct Sampling {
  static constexpr int64_t kRun = 64, kRuns = 256, kShare = 32;

  int64_t filters, numbers, taken, width, step, shift;

  Sampling(int64_t filters, int64_t numbers) : filters(filters), numbers(numbers) {
    const auto parts = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    const int64_t runs = parts(numbers, kRun);
    width = runs / std::max({parts(runs, kShare), parts(runs, filters), parts(kRuns, filters)});
    width = std::max<int64_t>(width, 1);
    taken = parts(runs, width);
    step = coprime(width, 0.6180339887);
    shift = coprime(width, 0.7548776662);
  }
  bool all() const { return width == 1; }

  // Calls read with where each run of filters first, ..., last - 1 begins, in the weight.
  template <class Read>
  DX_INLINE void for_each_run(int64_t first, int64_t last, const Read& read) const {
    int64_t of_filter = first * step % width;
    for (int64_t k = first; k < last; ++k, of_filter = next(of_filter, step))
      for (int64_t j = 0, place = of_filter; j < taken; ++j, place = next(place, shift))
        read(k * numbers + std::min((j * width + place) * kRun, numbers - kRun));
  }

 private:
  DX_INLINE int64_t next(int64_t place, int64_t by) const {
    place += by;
    return place < width ? place : place - width;
  }
  static int64_t coprime(int64_t width, double share) {
    int64_t near = std::max<int64_t>(1, int64_t(share * double(width)));
    while (std::gcd(near, width) != 1) ++near;
    return near % width;
  }
};

}  // namespace dx
