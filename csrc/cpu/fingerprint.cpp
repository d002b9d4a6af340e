#include "fingerprint.h"

#include <cstring>

#include "../common.h"
#include "blocks.h"
#include "simd.h"
#include "threads.h"

namespace dx {
namespace {

constexpr int64_t kRun = Sampling::kRun;
constexpr int64_t kAhead = 8;    // runs that are asked of the memory before they are read
constexpr int64_t kPart = 1024;  // runs of a large weight that a thread hashes at a time
constexpr uint64_t kMixing = 0x9E3779B97F4A7C15;

// A hash of runs, in as many lanes of 32 bits as a run has numbers. The shift brings the sign bits,
// which a product leaves where they are, down among the others.
template <class Bits>
class RunHash {
 public:
  DX_INLINE void add(const Bits* run) {
#pragma omp simd
    for (int64_t l = 0; l < kRun; ++l) {
      Bits bits;
      std::memcpy(&bits, run + l, sizeof bits);
      const uint32_t product = (lanes_[l] ^ bits) * 0x9E3779B1u;
      lanes_[l] = product ^ product >> 15;
    }
  }
  uint64_t value() const {
    uint64_t total = 0;
    for (const uint32_t lane : lanes_) total = (total ^ lane) * kMixing ^ total >> 29;
    return total;
  }

 private:
  uint32_t lanes_[kRun] = {};
};

template <class Bits>
uint64_t hash_of_all(const Bits* data, int64_t count) {
  RunHash<Bits> hash;
  on_best_isa([&]() DX_KERNEL {
    RunHash<Bits> runs;
    const int64_t whole = count / kRun * kRun;
    for (int64_t i = 0; i < whole; i += kRun) runs.add(data + i);
    Bits rest[kRun] = {};
    std::copy(data + whole, data + count, rest);
    runs.add(rest);
    hash = runs;
  });
  return hash.value();
}

// Of the sampled runs of some filters. They lie far apart, and would come one by one from memory if
// they were not asked for ahead.
template <class Bits>
uint64_t hash_of_filters(const Bits* data, const Sampling& sampling, int64_t first, int64_t last) {
  RunHash<Bits> hash;
  on_best_isa([&]() DX_KERNEL {
    RunHash<Bits> runs;
    const Bits* asked[kAhead];
    std::fill_n(asked, kAhead, data);
    int64_t i = 0;
    sampling.for_each_run(first, last, [&](int64_t begin) DX_KERNEL {
      const Bits*& run = asked[i++ % kAhead];
      runs.add(run);
      run = data + begin;
      prefetch(run, kRun);
    });
    for (const Bits* run : asked) runs.add(run);
    hash = runs;
  });
  return hash.value();
}

}  // namespace

template <class Bits>
uint64_t fingerprint(const Bits* data, int64_t filters, int64_t numbers) {
  if (filters * numbers == 0) return 0;
  const Sampling sampling(filters, numbers);
  if (sampling.all()) return hash_of_all(data, filters * numbers);
  const int64_t of_part = std::max<int64_t>(kPart / sampling.taken, 1);
  std::vector<uint64_t> parts((filters + of_part - 1) / of_part);
  share_work(parts.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      parts[p] = hash_of_filters(data, sampling, p * of_part, std::min(filters, (p + 1) * of_part));
  });
  uint64_t total = 0;
  for (const uint64_t part : parts) total = (total ^ part) * kMixing ^ total >> 29;
  return total;
}

template uint64_t fingerprint(const uint32_t*, int64_t, int64_t);
template uint64_t fingerprint(const uint16_t*, int64_t, int64_t);

}  // namespace dx
