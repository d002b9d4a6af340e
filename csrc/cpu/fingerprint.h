// What tells whether a weight still holds the numbers that it was laid out from. Neither its
// version nor its address says so of what was written through `.data`, as adapters and averages do.
#pragma once

#include <cstdint>
#include <cstring>

namespace dx {

// Of `floats` numbers: of all, or of as many lines of 16 as `lines` says, evenly apart, and of the
// last numbers. Eight sums side by side, so that the multiplications overlap.
inline uint64_t fingerprint(const float* data, int64_t floats, int64_t lines) {
  constexpr int64_t line = 16, words = 8;
  constexpr uint64_t prime = 0x9E3779B97F4A7C15;
  uint64_t sums[words] = {1, 2, 3, 4, 5, 6, 7, 8};
  const auto add = [&](const float* from, int64_t count) {
    uint64_t bits[words] = {};
    std::memcpy(bits, from, count * sizeof(float));
    for (int64_t i = 0; i < words; ++i) sums[i] = ((sums[i] ^ bits[i]) * prime) ^ (sums[i] >> 31);
  };
  const int64_t whole = floats / line, taken = whole < lines ? whole : lines;
  for (int64_t i = 0; i < taken; ++i) add(data + i * whole / taken * line, line);
  const int64_t last = floats < line ? floats : line;
  add(data + floats - last, last);
  uint64_t total = uint64_t(floats);
  for (const uint64_t sum : sums) total = (total ^ sum) * prime ^ (total >> 29);
  return total;
}

}  // namespace dx
