// A stack of its own with a function that runs on it, and the switch from one to another.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>

namespace dx::emulation {

class Fiber {
 public:
  // The stack that the program is on already.
  Fiber() = default;
  // A new stack. The first switch to it calls body, which never returns.
  explicit Fiber(void (*body)());
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Leaves this fiber, which is the running one, and returns when a fiber switches back to it.
  void switch_to(Fiber& other);

  // Forgets what the fiber, which is not the running one, was doing: the next switch to it calls
  // body again. No destructor runs.
  void restart();

 private:
  static void enter();
  void arrived();

  void (*body_)() = nullptr;
  bool entered_ = true;
  jmp_buf where_;     // while it does not run
  ucontext_t first_;  // before it has run
  char* mapped_ = nullptr;
  // For AddressSanitizer, which has to know every stack.
  const void* bottom_ = nullptr;
  size_t size_ = 0;
  void* fake_ = nullptr;
};

}  // namespace dx::emulation
