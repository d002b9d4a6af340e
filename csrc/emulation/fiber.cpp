// ucontext enters a fiber, once; from then on it is left and resumed by _setjmp and _longjmp, which
// make no system call.

// Its longjmp takes a jump to another stack for a mistake.
#undef _FORTIFY_SOURCE

#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <system_error>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace dx::emulation {
namespace {

constexpr size_t kGuard = 4096;  // a page without access: an overrun is a fault
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 512 * 1024;  // its frames are larger
#else
constexpr size_t kStack = 128 * 1024;
#endif

// What a switch leaves and where it goes: a fiber that is entered has no arguments.
Fiber *left = nullptr, *entered = nullptr;

// Stacks that all began at the same place of a page would share a few sets of the cache.
size_t next_offset() {
  static size_t count = 0;
  return count++ % 64 * 192;
}

}  // namespace

Fiber::Fiber(void (*body)()) : body_(body) {
  void* mapped = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  mapped_ = static_cast<char*>(mapped);
  if (mprotect(mapped_, kGuard, PROT_NONE) != 0) {
    munmap(mapped_, kGuard + kStack);
    throw std::system_error(errno, std::generic_category(), "mprotect");
  }
  bottom_ = mapped_ + kGuard;
  size_ = kStack - next_offset();
  restart();
}

Fiber::~Fiber() {
  if (mapped_ == nullptr) return;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(bottom_, size_);  // the next owner of the addresses
#endif
  munmap(mapped_, kGuard + kStack);
}

void Fiber::restart() {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(bottom_, size_);
#endif
  getcontext(&first_);
  first_.uc_stack.ss_sp = const_cast<void*>(bottom_);
  first_.uc_stack.ss_size = size_;
  first_.uc_link = nullptr;
  makecontext(&first_, &Fiber::enter, 0);
  entered_ = false;
  fake_ = nullptr;
}

void Fiber::enter() {
  entered->arrived();
  entered->body_();
}

void Fiber::arrived() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_, &left->bottom_, &left->size_);
#endif
}

void Fiber::switch_to(Fiber& other) {
  left = this;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fake_, other.bottom_, other.size_);
#endif
  if (_setjmp(where_) == 0) {
    if (other.entered_) _longjmp(other.where_, 1);
    other.entered_ = true;
    entered = &other;
    setcontext(&other.first_);
  }
  arrived();
}

}  // namespace dx::emulation
