#include "fingerprint.h"

#include <cstring>

#include "../common.h"
#include "blocks.h"
#include "simd.h"

namespace dx {
namespace {

constexpr int64_t kLine = Sampling::kLine;
constexpr int64_t kAhead = 16;   // lines that are asked of the memory before they are read
constexpr int64_t kPart = 4096;  // lines of a large weight that a thread hashes at a time
constexpr uint64_t kMixing = 0x9E3779B97F4A7C15;

// A hash of lines, as 16 lanes of 32 bits, four times side by side so that multiplications overlap.
// The shift brings the sign bits, which a product leaves where they are, down among the others.
class LineHash {
 public:
  DX_INLINE void add(const float* line) {
    uint32_t* __restrict lanes = lanes_[count_++ % kSide];
#pragma omp simd
    for (int64_t l = 0; l < kLine; ++l) {
      uint32_t bits;
      std::memcpy(&bits, line + l, sizeof bits);
      const uint32_t product = (lanes[l] ^ bits) * 0x9E3779B1u;
      lanes[l] = product ^ product >> 15;
    }
  }
  uint64_t value() const {
    uint64_t total = 0;
    for (const auto& side : lanes_)
      for (const uint32_t lane : side) total = (total ^ lane) * kMixing ^ total >> 29;
    return total;
  }

 private:
  static constexpr int64_t kSide = 4;
  uint32_t lanes_[kSide][kLine] = {};
  int64_t count_ = 0;
};

uint64_t hash_of_all(const float* data, int64_t count) {
  LineHash hash;
  on_best_isa([&]() DX_KERNEL {
    LineHash lines;
    const int64_t whole = count / kLine * kLine;
    for (int64_t i = 0; i < whole; i += kLine) lines.add(data + i);
    float rest[kLine] = {};
    std::copy(data + whole, data + count, rest);
    lines.add(rest);
    hash = lines;
  });
  return hash.value();
}

// Of the sampled lines of some filters. They lie far apart, and would come one by one from memory
// if they were not asked for ahead.
uint64_t hash_of_filters(const float* data, const Sampling& sampling, int64_t first, int64_t last) {
  LineHash hash;
  on_best_isa([&]() DX_KERNEL {
    LineHash lines;
    const float* asked[kAhead];
    std::fill_n(asked, kAhead, data);
    int64_t i = 0;
    sampling.for_each_line(first, last, [&](int64_t begin) DX_KERNEL {
      const float*& line = asked[i++ % kAhead];
      lines.add(line);
      line = data + begin;
      prefetch(line, kLine);
    });
    for (const float* line : asked) lines.add(line);
    hash = lines;
  });
  return hash.value();
}

}  // namespace

uint64_t fingerprint(const float* data, int64_t filters, int64_t numbers) {
  if (filters * numbers == 0) return 0;
  const Sampling sampling(filters, numbers);
  if (sampling.all()) return hash_of_all(data, filters * numbers);
  const int64_t of_part = std::max<int64_t>(kPart / sampling.taken, 1);
  std::vector<uint64_t> parts((filters + of_part - 1) / of_part);
  torch::stable::parallel_for(0, parts.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      parts[p] = hash_of_filters(data, sampling, p * of_part, std::min(filters, (p + 1) * of_part));
  });
  uint64_t total = 0;
  for (const uint64_t part : parts) total = (total ^ part) * kMixing ^ total >> 29;
  return total;
}

}  // namespace dx
