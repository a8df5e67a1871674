// What kernels share in how they work: memory kept from call to call, the number of tasks, and who does
// which.
#pragma once

#include <cstddef>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace penstock {

constexpr long kLine = 64;
constexpr size_t kLargePage = 2 << 20;

inline long round_up(long n, long unit) { return (n + unit - 1) / unit * unit; }

// Work is cut into so many tasks a thread, where it can be: a thread that loses its core for a while
// then holds up the others less.
constexpr long kTasksPerThread = 4;

// Tasks in queues, one for each thread, or for several. A thread does those of its own, where it knows
// the data, and then helps others. Every thread of a parallel region calls `run` once.
class Queues {
 public:
  static constexpr long kMost = 64;

  // Of each queue a thread takes one task at a time, or with `share` that part of those that are left: a
  // few at first, which lie one behind the other, and single ones in the end.
  explicit Queues(long count, long share = 0) : count_(count), share_(share) {}

  // Queue `index` has the tasks [first, last).
  void set(long index, long first, long last) { of_[index] = {first, last}; }

  // Calls `body(queue, first task, behind the last)`.
  template <class Body>
  void run(long thread, const Body& body) {
    for (long turn = 0; turn < count_; turn++) {
      const long queue = (thread + turn) % count_;
      Queue& from = of_[queue];
      long first = __atomic_load_n(&from.next, __ATOMIC_RELAXED);
      while (first < from.last) {
        const long behind = first + some(from.last - first);
        if (__atomic_compare_exchange_n(&from.next, &first, behind, false, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED)) {
          body(queue, first, behind);
          first = __atomic_load_n(&from.next, __ATOMIC_RELAXED);
        }
      }
    }
  }

 private:
  struct alignas(kLine) Queue {
    long next, last;
  };

  long some(long left) const { return share_ == 0 ? 1 : (left + share_ - 1) / share_; }

  long count_, share_;
  Queue of_[kMost];
};

// Grows and never shrinks. `Scratch` objects are thread_local, and the few threads that compute live
// as long as the process: nothing is freed at their end, which would need the C++ runtime.
class Scratch {
 public:
  // Returns `count` uninitialised T on a cache line's border, valid until the next take; null if
  // there is no memory.
  template <class T>
  T* take(size_t count) {
    // Rows of a tile lie far apart: in large pages the processor finds them without looking up each.
    const size_t unit = count * sizeof(T) < kLargePage ? kLine : kLargePage;
    const size_t bytes = (count * sizeof(T) + unit - 1) / unit * unit;
    if (bytes > bytes_) {
      std::free(memory_);
      memory_ = std::aligned_alloc(unit, bytes);
      bytes_ = memory_ == nullptr ? 0 : bytes;
      if (unit == kLargePage) ask_for_large_pages();
    }
    return static_cast<T*>(memory_);
  }

 private:
  // A refusal changes nothing but speed.
  void ask_for_large_pages() const {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (memory_ != nullptr) madvise(memory_, bytes_, MADV_HUGEPAGE);
#endif
  }

  void* memory_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace penstock
