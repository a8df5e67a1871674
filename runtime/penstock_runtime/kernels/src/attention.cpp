// Causal attention over paged keys and values, for prefill chunks and decode rows alike.
//
// A *row* is one query head of one token. Rows that share a KV head, and of a chunk so many tokens
// that their queries and sums stay in the second cache, are one *task*. A task walks the keys in
// blocks of kKeyBlock at absolute positions: a block's keys and values are widened into panels, then for
// a few rows at a time
//
//   S = Q · Kᵀ        masked where a key lies behind the row's own position
//   m, l, P           the running maximum, sum and weights (Milakov and Gimelshein, arXiv 1805.02867)
//   O = O · α + P · V
//
// Blocks form *sections* of kSection keys, each with sums of its own, that are merged in order. The
// sections of one task can thus be computed by several threads, for a few long sequences.
//
// What is done for a row follows from its position alone: borders of blocks and sections are
// absolute, every product is a chain over rising k (tile.h), and a key that is masked for one row of
// a task contributes exact zeros. So its bits depend neither on the batch, the chunk, the pages or
// the threads, nor on whether it came as a decode step.
//
// Scores are kept as base 2 logarithms: q is multiplied by scale · log2(e) first.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"
#include "scratch.h"
#include "tile.h"
#include "transpose.h"

#include <omp.h>

namespace penstock {
namespace {

constexpr long kKeyBlock = 128;
constexpr long kSection = 1024;
constexpr long kTaskFloats = 24576;  // of q in a task, and as many of sums: 96 KB each
constexpr long kFewQueries = 16;
static_assert(kFewQueries >= kMaxRows);
constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kLog2E = 0x1.715476p+0f;

long round_up(long n, long unit) { return (n + unit - 1) / unit * unit; }

// `count` tokens of a segment from `first` on, for the rows of one KV head.
struct Task {
  long segment, kv_head, first, count;
};

// Sums of a task's rows over some of their keys.
struct State {
  float* maximum;  // (rows,)
  float* sum;      // (rows, 16): a key's weight is in the lane of its position
  float* out;      // (rows, value columns)

  static long floats(long rows, long columns) { return rows * (1 + kLanes + columns); }

  static State at(float* memory, long rows, long columns) {
    // What is read by whole registers comes first, so that it is aligned.
    return {memory + rows * (kLanes + columns), memory + rows * columns, memory};
  }

  void reset(long rows, long columns) const {
    std::fill_n(maximum, rows, kNone);
    std::fill_n(sum, rows * kLanes, 0.0f);
    std::fill_n(out, rows * columns, 0.0f);
  }
};

// 2^(of - new_maximum): what sums relative to the maximum `of` count for.
PENSTOCK_INLINE float weight(float of, float new_maximum) {
  return of == kNone ? 0.0f : exp2_nonpositive(splat(of - new_maximum))[0];
}

PENSTOCK_INLINE void scale_row(float* row, long columns, float factor) {
  const Vec by = splat16(factor);
  for (long i = 0; i < columns; i += kLanes) store16(row + i, load16(row + i) * by);
}

// Turns the scores of one row into weights; returns the factor for what was summed before.
PENSTOCK_INLINE float softmax_row(float* scores, long panels, long visible, float* maximum,
                                  float* sum) {
  if (visible <= 0) {
    std::fill_n(scores, panels * kLanes, 0.0f);
    return 1.0f;
  }
  for (long i = visible; i < panels * kLanes; i++) scores[i] = kNone;
  Vec highest = load16(scores);
  for (long p = 1; p < panels; p++) highest = max(highest, load16(scores + p * kLanes));
  const float before = *maximum, now = std::max(before, max_lanes(highest));
  const float factor = before == now ? 1.0f : weight(before, now);
  Vec total = load16(sum) * splat16(factor);
  const Vec shift = splat16(now);
  for (long p = 0; p < panels; p++) {
    const Vec weights = exp2_nonpositive(load16(scores + p * kLanes) - shift);
    store16(scores + p * kLanes, weights);
    total = total + weights;
  }
  store16(sum, total);
  *maximum = now;
  return factor;
}

// Adds sums over later keys to `total`.
void merge(const State& total, const State& later, long rows, long columns) {
  for (long r = 0; r < rows; r++) {
    const float now = std::max(total.maximum[r], later.maximum[r]);
    const Vec old_weight = splat16(weight(total.maximum[r], now));
    const Vec new_weight = splat16(weight(later.maximum[r], now));
    total.maximum[r] = now;
    const auto add = [&](float* to, const float* from) {
      store16(to, fma(load16(from), new_weight, load16(to) * old_weight));
    };
    add(total.sum + r * kLanes, later.sum + r * kLanes);
    for (long i = 0; i < columns; i += kLanes) {
      add(total.out + r * columns + i, later.out + r * columns + i);
    }
  }
}

// One call's sizes, and what a thread needs to compute a task.
class Kernel {
 public:
  Kernel(const Attention& call, long threads)
      : call_(call),
        kv_(call.kv),
        group_(call.heads / call.kv.kv_heads),
        columns_(round_up(call.kv.value_dim, kLanes)),
        keys_asked_((kLanes * 8 + call.kv.key_dim - 1) / call.kv.key_dim) {
    long tokens = 0, longest = 0;
    for (long i = 0; i < call.segments; i++) {
      tokens += call.lengths[i];
      longest = std::max<long>(longest, call.lengths[i]);
    }
    const long cached = kTaskFloats / (group_ * (kv_.key_dim + columns_) / 2);
    const long shared = tokens * kv_.kv_heads / (threads * kTasksPerThread);
    task_tokens_ = std::min(longest, std::max(1L, std::min(cached, shared)));
  }

  // Tokens whose queries stay in the second level, and leave every thread a few tasks.
  long task_tokens() const { return task_tokens_; }
  long task_rows() const { return task_tokens() * group_; }
  long state_floats() const { return round_up(State::floats(task_rows(), columns_), kLanes); }
  long workspace_floats() const {
    return 2 * state_floats() + task_rows() * kv_.key_dim + kFewQueries * kKeyBlock +
           kKeyBlock * (kv_.key_dim + columns_) + kv_.key_dim + kv_.value_dim + kLanes;
  }
  long sections(const Task& task) const { return (last_position(task) + kSection) / kSection; }

  State state(float* memory) const { return State::at(memory, task_rows(), columns_); }

  void run_sections(const Task& task, float* work) const {
    const State total = state(work), part = state(work + state_floats());
    total.reset(task.count * group_, columns_);
    for (long section = 0; section < sections(task); section++) {
      run_section(task, section, part, work);
      merge(total, part, task.count * group_, columns_);
    }
    finish(task, total);
  }

  // Leaves in `sums` what the task's rows see of one section.
  void run_section(const Task& task, long section, const State& sums, float* work) const {
    switch (kv_.element) {
      case 0:
        return section_of<float>(task, section, sums, work);
      case 1:
        return section_of<bf16>(task, section, sums, work);
      default:
        return section_of<f16>(task, section, sums, work);
    }
  }

  void merge_sections(const Task& task, const float* parts, float* work) const {
    const State total = state(work);
    total.reset(task.count * group_, columns_);
    for (long section = 0; section < sections(task); section++) {
      merge(total, state(const_cast<float*>(parts) + section * state_floats()),
            task.count * group_, columns_);
    }
    finish(task, total);
  }

 private:
  long last_position(const Task& task) const {
    return call_.starts[task.segment] + task.first + task.count - 1;
  }

  void finish(const Task& task, const State& total) const {
    for (long r = 0; r < task.count * group_; r++) {
      const float inverse = 1.0f / sum_lanes(load16(total.sum + r * kLanes));
      const long row = call_.first_rows[task.segment] + task.first + r / group_;
      const long head = task.kv_head * group_ + r % group_;
      float* to = call_.out + (row * call_.heads + head) * kv_.value_dim;
      const float* from = total.out + r * columns_;
      // Adding 0 makes -0 to +0: which of them a sum of zeros is depends on masked keys.
      for (long i = 0; i < kv_.value_dim; i++) to[i] = from[i] * inverse + 0.0f;
    }
  }

  void scale_queries(const Task& task, float* to) const {
    const float scale = call_.scale * kLog2E;
    for (long r = 0; r < task.count * group_; r++, to += kv_.key_dim) {
      const long row = call_.first_rows[task.segment] + task.first + r / group_;
      const long head = task.kv_head * group_ + r % group_;
      const float* from = call_.q + row * call_.q_stride + head * kv_.key_dim;
      for (long i = 0; i < kv_.key_dim; i++) to[i] = from[i] * scale;
    }
  }

  template <class T>
  void section_of(const Task& task, long section, const State& sums, float* work) const {
    const Buffers<T> at = buffers<T>(work);
    std::memset(at.zeros, 0, static_cast<size_t>(kv_.key_dim + kv_.value_dim) * sizeof(T));
    sums.reset(task.count * group_, columns_);
    scale_queries(task, at.q);
    const long begin = section * kSection;
    const long end = std::min(begin + kSection, last_position(task) + 1);
    Rows<T> rows[2];
    locate(task, begin, end, at.zeros, rows[0]);
    for (long first = begin, turn = 0; first < end; first += kKeyBlock, turn ^= 1) {
      locate(task, first + kKeyBlock, end, at.zeros, rows[turn ^ 1]);
      if (task.count * group_ <= kFewQueries) {
        few_queries(task, first, rows[turn], rows[turn ^ 1], at, sums);
      } else {
        many_queries(task, first, rows[turn], at, sums);
      }
    }
  }

  // Where the keys and values of one block lie, in whole panels: zeros behind the last.
  template <class T>
  struct Rows {
    long count;
    const T* keys[kKeyBlock];
    const T* values[kKeyBlock];
  };

  template <class T>
  struct Buffers {
    float* q;       // (rows of the task, key_dim)
    float* scores;  // (kFewQueries, kKeyBlock)
    float* keys;    // panels (key_dim, 16)
    float* values;  // panels (tokens, 16)
    T* zeros;
  };

  template <class T>
  Buffers<T> buffers(float* work) const {
    float* q = work + 2 * state_floats();
    float* scores = q + task_rows() * kv_.key_dim;
    float* keys = scores + kFewQueries * kKeyBlock;
    float* values = keys + kKeyBlock * kv_.key_dim;
    return {q, scores, keys, values, reinterpret_cast<T*>(values + kKeyBlock * columns_)};
  }

  template <class T>
  void locate(const Task& task, long first, long end, const T* zeros, Rows<T>& rows) const {
    rows.count = std::max(0L, std::min(kKeyBlock, end - first));
    const int64_t* page = call_.pages + call_.first_pages[task.segment] + first / kv_.page_size;
    long token = first % kv_.page_size;
    for (long t = 0; t < rows.count; t++) {
      const long slot = task.kv_head * kv_.page_size + token;
      rows.keys[t] =
          static_cast<const T*>(kv_.keys) + *page * kv_.key_page_stride + slot * kv_.key_stride;
      rows.values[t] = static_cast<const T*>(kv_.values) + *page * kv_.value_page_stride +
                       slot * kv_.value_stride;
      if (++token == kv_.page_size) {
        token = 0;
        page++;
      }
    }
    for (long t = rows.count; t < round_up(rows.count, kLanes); t++) {
      rows.keys[t] = rows.values[t] = zeros;
    }
  }

  // Rows that will be read next. Pages lie anywhere, so the processor cannot guess it: it is told, a
  // few rows at a time between other work, for it can wait for a few dozen lines at once only.
  template <class T>
  class Ahead {
   public:
    Ahead(const T* const* rows, long first, long last, long dims)
        : row_(rows + first), end_(rows + std::max(first, last)), bytes_(dims * sizeof(T)) {}

    PENSTOCK_INLINE void ask(long rows) {
      for (; rows > 0 && row_ < end_; rows--, row_++) {
        const char* line = reinterpret_cast<const char*>(*row_);
        for (long i = 0; i < bytes_; i += kLine) __builtin_prefetch(line + i, 0, 3);
      }
    }

   private:
    const T* const* row_;
    const T* const* end_;
    long bytes_;
  };

  template <class T>
  Ahead<T> keys_ahead(const Rows<T>& rows, long t) const {
    return {rows.keys, t, std::min(t + kLanes, rows.count), kv_.key_dim};
  }

  // Keys of 16 tokens.
  template <class T>
  void pack_keys(const Rows<T>& rows, long t, Ahead<T> ahead, float* to) const {
    transpose_panel(rows.keys + t, kv_.key_dim, to, [&] { ahead.ask(keys_asked_); });
  }

  // Values of the tokens [t, t + count); `panel`: from one panel of columns to the next.
  template <class T>
  void pack_values(const Rows<T>& rows, long t, long count, float* to, long panel) const {
    for (long i = 0; i < count; i++) {
      for (long c = 0; c < columns_; c += kLanes) {
        widen_some(rows.values[t + i] + c, kv_.value_dim - c, to + c / kLanes * panel + i * kLanes);
      }
    }
  }

  // Keys of a block, counted from its first, that row r sees. May be less than 1.
  long visible(const Task& task, long first, long r) const {
    return call_.starts[task.segment] + task.first + r / group_ + 1 - first;
  }

  // Scores of rows [row, row + count) become weights, and what was summed before is scaled.
  void softmax(const Task& task, long first, long row, long count, long panels, float* scores,
               const State& sums) const {
    for (long r = row; r < row + count; r++) {
      const long seen = std::min(panels * kLanes, visible(task, first, r));
      const float factor = softmax_row(scores + (r - row) * kKeyBlock, panels, seen,
                                       sums.maximum + r, sums.sum + r * kLanes);
      if (factor != 1.0f) scale_row(sums.out + r * columns_, columns_, factor);
    }
  }

  // Memory is the limit: keys of a few tokens at a time are packed, and used while they are in the
  // first level; values are used where they lie. Each step names what the next one reads.
  template <class T>
  void few_queries(const Task& task, long first, const Rows<T>& rows, const Rows<T>& next,
                   const Buffers<T>& at, const State& sums) const {
    const long count = task.count * group_;
    const long tokens = round_up(rows.count, kLanes);
    for (long t = 0; t < tokens; t += kLanes) {
      const long after = t + kLanes;
      pack_keys(rows, t,
                after < tokens ? keys_ahead(rows, after)
                               : Ahead<T>(rows.values, 0, std::min<long>(kLanes, rows.count),
                                          kv_.value_dim),
                at.keys);
      for_row_groups(count, [&](long row, int group) {
        multiply_rows(group, at.q + row * kv_.key_dim, kv_.key_dim,
                      static_cast<const float*>(at.keys), 0, kv_.key_dim,
                      at.scores + row * kKeyBlock + t, kKeyBlock, kLanes, Into::store);
      });
    }
    softmax(task, first, 0, count, tokens / kLanes, at.scores, sums);
    keys_ahead(next, 0).ask(kLanes);
    if (kv_.value_dim % kLanes) pack_values(rows, 0, tokens, at.values, kLanes * kKeyBlock);
    for_row_groups(count, [&](long row, int group) {
      const float* weights = at.scores + row * kKeyBlock;
      float* out = sums.out + row * columns_;
      if (kv_.value_dim % kLanes) {
        multiply_rows(group, weights, kKeyBlock, static_cast<const float*>(at.values),
                      kLanes * kKeyBlock, rows.count, out, columns_, columns_, Into::continue_);
      } else {
        multiply_rows(group, weights, kKeyBlock, Natural<T>{rows.values, 0}, kLanes, rows.count,
                      out, columns_, columns_, Into::continue_);
      }
    });
  }

  // Arithmetic is the limit: the block is packed once for all rows.
  template <class T>
  void many_queries(const Task& task, long first, const Rows<T>& rows, const Buffers<T>& at,
                    const State& sums) const {
    const long tokens = round_up(rows.count, kLanes);
    for (long t = 0; t < tokens; t += kLanes) {
      pack_keys(rows, t, Ahead<T>(rows.keys, 0, 0, 0), at.keys + t * kv_.key_dim);
    }
    pack_values(rows, 0, tokens, at.values, kLanes * kKeyBlock);
    for_row_groups(task.count * group_, [&](long row, int group) {
      const long count = std::min(rows.count, visible(task, first, row + group - 1));
      if (count <= 0) return;
      const long panels = (count + kLanes - 1) / kLanes;
      multiply_rows(group, at.q + row * kv_.key_dim, kv_.key_dim,
                      static_cast<const float*>(at.keys), kLanes * kv_.key_dim,
                    kv_.key_dim, at.scores, kKeyBlock, panels * kLanes, Into::store);
      softmax(task, first, row, group, panels, at.scores, sums);
      multiply_rows(group, at.scores, kKeyBlock, static_cast<const float*>(at.values),
                    kLanes * kKeyBlock, count,
                    sums.out + row * columns_, columns_, columns_, Into::continue_);
    });
  }

  const Attention& call_;
  const KvLayer& kv_;
  long group_;
  long columns_;
  long keys_asked_;  // rows of keys asked for with every eighth dim of a panel that is packed
  long task_tokens_;
};

// The tasks of a call. Of a segment, those with the most keys come first, so that none of them is
// left over at the end.
long list_tasks(const Attention& call, const Kernel& kernel, Task* tasks) {
  long count = 0;
  for (long segment = 0; segment < call.segments; segment++) {
    const long length = call.lengths[segment], step = kernel.task_tokens();
    for (long first = (length - 1) / step * step; first >= 0; first -= step) {
      for (long head = 0; head < call.kv.kv_heads; head++, count++) {
        if (tasks != nullptr) {
          tasks[count] = {segment, head, first, std::min(step, length - first)};
        }
      }
    }
  }
  return count;
}

}  // namespace
}  // namespace penstock

using namespace penstock;

int penstock_attention(const Attention* call) {
  const long threads = omp_get_max_threads();
  const Kernel kernel(*call, threads);
  static thread_local Scratch task_memory, part_memory, work_memory;
  const long count = list_tasks(*call, kernel, nullptr);
  if (count == 0) return 0;
  Task* tasks = task_memory.take<Task>(count);
  const long work_floats = round_up(kernel.workspace_floats(), kLanes);
  float* work = work_memory.take<float>(work_floats * threads);
  if (tasks == nullptr || work == nullptr) return 1;
  list_tasks(*call, kernel, tasks);

  long longest = 1;
  for (long t = 0; t < count; t++) longest = std::max(longest, kernel.sections(tasks[t]));
  if (longest == 1 || count >= 4 * threads) {
#pragma omp parallel for schedule(dynamic, 1)
    for (long t = 0; t < count; t++) {
      kernel.run_sections(tasks[t], work + omp_get_thread_num() * work_floats);
    }
    return 0;
  }
  // Too few tasks for the threads: each section by itself.
  float* parts = part_memory.take<float>(count * longest * kernel.state_floats());
  if (parts == nullptr) return 1;
  const auto parts_of = [&](long t) { return parts + t * longest * kernel.state_floats(); };
#pragma omp parallel
  {
    float* mine = work + omp_get_thread_num() * work_floats;
#pragma omp for schedule(dynamic, 1)
    for (long i = 0; i < count * longest; i++) {
      const long t = i % count, section = i / count;
      if (section < kernel.sections(tasks[t])) {
        float* part = parts_of(t) + section * kernel.state_floats();
        kernel.run_section(tasks[t], section, kernel.state(part), mine);
      }
    }
#pragma omp for schedule(static)
    for (long t = 0; t < count; t++) kernel.merge_sections(tasks[t], parts_of(t), mine);
  }
  return 0;
}
