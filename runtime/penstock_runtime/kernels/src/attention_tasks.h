// How the work of one call of attention is divided: rows into tasks, tasks among threads.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "scratch.h"
#include "vector.h"

namespace penstock {

constexpr long kTaskFloats = 65536;  // of q in a task, and as many of sums: half of the second level
constexpr long kFewQueries = 16;
constexpr long kWorthPacking = 64;  // rows
constexpr long kLastCuts = 4;       // tasks that a part's last one is cut into

// `count` tokens of a segment from `first` on, for the rows of the KV heads [kv_head, kv_head + heads).
struct Task {
  long segment, kv_head, heads, first, count;
};

class TaskSizes {
 public:
  TaskSizes(const Attention& call, long threads)
      : group_(call.heads / call.kv.kv_heads),
        streams_(call.kv.page_size % kLanes == 0 && call.kv.value_dim % kLanes == 0) {
    const KvLayer& kv = call.kv;
    long tokens = 0, longest = 0, few = 0;
    for (long i = 0; i < call.segments; i++) {
      tokens += call.lengths[i];
      longest = std::max<long>(longest, call.lengths[i]);
      few += is_few(call.lengths[i]);
    }
    const long wanted = threads * kTasksPerThread;
    const long cached =
        kTaskFloats / (group_ * (kv.key_dim + round_up(kv.value_dim, kLanes)) / 2);
    const long shared = tokens * kv.kv_heads / wanted;
    tokens_ = std::min(longest, std::max(1L, std::min(cached, shared)));
    // Neighbours in a page: the longer the runs that are read, the faster.
    few_heads_ = streams_ ? std::max(1L, std::min(few * kv.kv_heads / threads, kv.kv_heads)) : 1;
  }

  // Query heads of a KV head.
  long group() const { return group_; }
  // Tokens whose queries stay in the second level, and leave every thread a few tasks.
  long tokens() const { return tokens_; }
  // Tokens that are worth a task of their own.
  long least_tokens() const { return std::max(1L, kWorthPacking / group_); }
  // KV heads of a task of so many tokens.
  long heads(long tokens) const { return is_few(tokens) ? few_heads_ : 1; }
  // At most, of a task.
  long rows() const { return std::max(tokens_ * group_, scored_rows()); }
  // Rows of one block whose scores are kept at a time.
  long scored_rows() const { return few_heads_ * kFewQueries; }
  // Whether a task of so many tokens reads pages as they lie, in whole panels.
  bool streams(long tokens) const { return streams_ && is_few(tokens); }

 private:
  bool is_few(long tokens) const { return tokens * group_ <= kFewQueries; }

  long group_;
  bool streams_;
  long tokens_, few_heads_;
};

// A batch cut into parts of equal work, in the order of its rows: linear layers give a thread about the
// same rows.
class Parts {
 public:
  Parts(const Attention& call, long grain, long parts) : call_(call), grain_(grain), parts_(parts) {
    for (long i = 0; i < call.segments; i++) all_ += work(i, call.lengths[i]);
  }

  long count() const { return parts_; }

  // Calls body(part, segment, first, tokens).
  template <class Body>
  void each(const Body& body) const {
    long before = 0, part = 0;
    for (long segment = 0; segment < call_.segments; segment++) {
      const long length = call_.lengths[segment];
      for (long first = 0; first < length;) {
        const long next = part + 1 < parts_ ? reach(segment, border(part) - before) : length;
        if (next > first) body(part, segment, first, next - first);
        first = std::max(first, next);
        if (first < length) part++;
      }
      before += work(segment, length);
    }
  }

 private:
  static constexpr long kBesideKeys = 64;  // what else is done for a row, in keys

  // Of the first `tokens` of a segment: the keys that they see.
  long work(long segment, long tokens) const {
    return tokens * (call_.starts[segment] + kBesideKeys) + tokens * (tokens + 1) / 2;
  }
  long border(long part) const { return all_ * (part + 1) / parts_; }

  // Tokens of a segment that have so much work, a multiple of the grain or all.
  long reach(long segment, long wanted) const {
    const long length = call_.lengths[segment];
    long low = 0, high = length;  // the least number with as much
    while (low < high) {
      const long middle = (low + high) / 2;
      if (work(segment, middle) < wanted) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low == length ? length : std::min(length, (low + grain_ / 2) / grain_ * grain_);
  }

  const Attention& call_;
  long grain_, parts_, all_ = 0;
};

// The tasks of a call, those of one part after those of another.
class TaskList {
 public:
  TaskList(const Attention& call, const TaskSizes& sizes, long threads)
      : call_(call),
        sizes_(sizes),
        parts_(call, sizes.least_tokens(), std::min(threads, Queues::kMost)) {
    each([&](long part, const Task&) { end_[part]++; });
    for (long part = 1; part < parts_.count(); part++) end_[part] += end_[part - 1];
  }

  long count() const { return end_[parts_.count() - 1]; }

  void write(Task* tasks) const {
    long next[Queues::kMost];
    for (long part = 0; part < parts_.count(); part++) next[part] = first(part);
    each([&](long part, const Task& task) { tasks[next[part]++] = task; });
  }

  Queues queues() const {
    Queues queues(parts_.count());
    for (long part = 0; part < parts_.count(); part++) queues.set(part, first(part), end_[part]);
    return queues;
  }

 private:
  long first(long part) const { return part == 0 ? 0 : end_[part - 1]; }

  // Calls body(first, count) for so many pieces of `count` tokens from `first` on, the last one first.
  template <class Body>
  static void backwards(long first, long count, long pieces, const Body& body) {
    for (long i = pieces - 1; i >= 0; i--) {
      const long begin = count * i / pieces;
      body(first + begin, count * (i + 1) / pieces - begin);
    }
  }

  // Calls body(part, task). Of a segment, those with the most keys come first, so that none of them is
  // left over at the end; and the last ones are short, so that threads end together.
  template <class Body>
  void each(const Body& body) const {
    const long kv_heads = call_.kv.kv_heads;
    parts_.each([&](long part, long segment, long begin, long tokens) {
      const long pieces = (tokens + sizes_.tokens() - 1) / sizes_.tokens();
      backwards(begin, tokens, pieces, [&](long first, long count) {
        const long heads = sizes_.heads(count);
        for (long head = 0; head < kv_heads; head += heads) {
          const bool ends = parts_.count() > 1 && first == begin && head + heads >= kv_heads;
          const long cuts = ends ? std::clamp(count / sizes_.least_tokens(), 1L, kLastCuts) : 1;
          backwards(first, count, cuts, [&](long from, long some) {
            body(part, Task{segment, head, std::min(heads, kv_heads - head), from, some});
          });
        }
      });
    });
  }

  const Attention& call_;
  TaskSizes sizes_;
  Parts parts_;
  long end_[Queues::kMost] = {};
};

}  // namespace penstock
