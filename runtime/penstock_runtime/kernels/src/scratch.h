// What kernels share in how they work: memory kept from call to call, and the number of tasks.
#pragma once

#include <cstddef>
#include <cstdlib>

namespace penstock {

constexpr long kLine = 64;

// Work is cut into so many tasks a thread, where it can be: a thread that loses its core for a while
// then holds up the others less.
constexpr long kTasksPerThread = 4;

// Grows and never shrinks. `Scratch` objects are thread_local, and the few threads that compute live
// as long as the process: nothing is freed at their end, which would need the C++ runtime.
class Scratch {
 public:
  // Returns `count` uninitialised T on a cache line's border, valid until the next take; null if
  // there is no memory.
  template <class T>
  T* take(size_t count) {
    const size_t bytes = (count * sizeof(T) + kLine - 1) / kLine * kLine;
    if (bytes > bytes_) {
      std::free(memory_);
      memory_ = std::aligned_alloc(kLine, bytes);
      bytes_ = memory_ == nullptr ? 0 : bytes;
    }
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace penstock
