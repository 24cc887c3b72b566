// Fibers: stacks that take turns on one thread, known to AddressSanitizer and ThreadSanitizer.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if defined(SARM_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(SARM_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

#if defined(__x86_64__) && !defined(SARM_UCONTEXT)
#define SARM_OWN_SWITCH 1
// 5 ns; swapcontext makes a system call to save the signal mask, and takes 200.
extern "C" void sarm_switch_stack(void** save, void* load);
#endif

namespace sarm_emulator {

class Fiber {
 public:
  static constexpr size_t kStack = 256 * 1024;  // of which an ordinary build touches two pages

  // The thread's own stack, which runs already.
  Fiber() {
#ifdef SARM_TSAN
    tsan_ = __tsan_get_current_fiber();
#endif
  }

  // Runs main() at the first switch; main never returns.
  explicit Fiber(void (*main)()) {
    void* memory =
        mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("cuda_emulator: no memory for a stack");
    stack_ = static_cast<char*>(memory);
    mprotect(stack_, 4096, PROT_NONE);  // an overflow faults
    stack_bytes_ = kStack;
#ifdef SARM_OWN_SWITCH
    // What sarm_switch_stack pops: six registers, then the address it returns to. A function
    // starts with its stack 8 bytes off a multiple of 16.
    void** top = reinterpret_cast<void**>(stack_ + kStack) - 2;
    top[0] = reinterpret_cast<void*>(main);
    for (int i = 1; i <= 6; ++i) top[-i] = nullptr;
    top_ = top - 6;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = kStack;
    makecontext(&context_, main, 0);
#endif
#ifdef SARM_TSAN
    tsan_ = __tsan_create_fiber(0);
#endif
  }

  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Leaves `from`, which must be the running one. Returns when something switches back to it.
  static void switch_to(Fiber& from, Fiber& to) {
#ifdef SARM_ASAN
    __sanitizer_start_switch_fiber(&from.fake_stack_, to.stack_, to.stack_bytes_);
#endif
#ifdef SARM_TSAN
    __tsan_switch_to_fiber(to.tsan_, __tsan_switch_to_fiber_no_sync);
#endif
    came_from = &from;
#ifdef SARM_OWN_SWITCH
    sarm_switch_stack(&from.top_, to.top_);
#else
    swapcontext(&from.context_, &to.context_);
#endif
    from.arrived();
  }

  // The first thing a fiber's main calls.
  void arrived() {
#ifdef SARM_ASAN
    const void* bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(fake_stack_, &bottom, &bytes);
    // The thread's own stack becomes known when it is left for the first time.
    if (came_from->stack_ == nullptr) {
      came_from->stack_ = static_cast<char*>(const_cast<void*>(bottom));
      came_from->stack_bytes_ = bytes;
    }
#endif
  }

 private:
  static inline Fiber* came_from = nullptr;
  char* stack_ = nullptr;
  size_t stack_bytes_ = 0;
#ifdef SARM_OWN_SWITCH
  void* top_ = nullptr;
#else
  ucontext_t context_{};
#endif
  void* fake_stack_ = nullptr;
#ifdef SARM_TSAN
  void* tsan_ = nullptr;
#endif
};

}  // namespace sarm_emulator
