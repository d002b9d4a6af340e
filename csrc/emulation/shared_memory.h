// A block's shared memory: garbage at first, and overruns show.
#pragma once

#include <cstddef>
#include <cstring>
#include <new>

namespace dx::emulation {

// Bytes between guards. Under AddressSanitizer there are none: its own are as near as can be.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes)
      : bytes_(bytes), allocated_(static_cast<char*>(::operator new(bytes + 2 * kGuard, kAlign))) {
    poison();
  }
  SharedMemory(SharedMemory&& from) noexcept : bytes_(from.bytes_), allocated_(from.allocated_) {
    from.allocated_ = nullptr;
  }
  ~SharedMemory() { ::operator delete(allocated_, kAlign); }

  char* begin() const { return allocated_ + kGuard; }
  size_t bytes() const { return bytes_; }
  bool holds(const char* p) const { return p >= begin() && p < begin() + bytes_; }

  // NaN in every floating type, guards too, so that what is read too early or too far shows.
  void poison() { memset(allocated_, 0xFF, bytes_ + 2 * kGuard); }

  // Whether nothing was written into the guards.
  bool intact() const { return clean(allocated_) && clean(allocated_ + kGuard + bytes_); }

 private:
  static constexpr std::align_val_t kAlign{16};
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kGuard = 0;
#else
  static constexpr size_t kGuard = 256;
#endif

  static bool clean(const char* guard) {
    unsigned char all = 0xFF;
    for (size_t i = 0; i < kGuard; ++i) all &= static_cast<unsigned char>(guard[i]);
    return all == 0xFF;
  }

  size_t bytes_;
  char* allocated_;
};

}  // namespace dx::emulation
