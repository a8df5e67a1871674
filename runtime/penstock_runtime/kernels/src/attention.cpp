// Causal attention over paged keys and values, for prefill chunks and decode rows alike.
//
// A *row* is one query head of one token. Rows that share a KV head, and of a chunk so many tokens
// that their queries and sums stay in the second cache, are one *task*. A task of few rows has several
// KV heads, and takes a page's heads one after the other: they are neighbours in it, and memory is read
// twice as fast from start to end. A task walks the keys in blocks of kKeyBlock at absolute positions:
// a block's keys and values are packed into panels, then for a few rows at a time
//
//   S = Q · Kᵀ        masked where a key lies behind the row's own position
//   m, l, P           the running maximum, sum and weights (Milakov and Gimelshein, arXiv 1805.02867),
//                     the maximum as the next whole number above it (softmax.h)
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
// Scores are kept as base 2 logarithms: q is multiplied by scale · log2(e) first. What is multiplied,
// float32 or pairs of bfloat16, is a format (formats.h); sums are float32 in both.
#include <algorithm>

#include "attention_pages.h"
#include "attention_tasks.h"
#include "formats.h"
#include "kernels.h"
#include "scratch.h"
#include "softmax.h"
#include "tile.h"

#include <omp.h>

namespace penstock {
namespace {

constexpr long kSection = 1024;
constexpr float kLog2E = 0x1.715476p+0f;
constexpr long kTokensAhead = 8;  // whose q or output is asked for
static_assert(kFewQueries >= kMaxRows);

// One call's sizes, and what a thread needs to compute a task.
class Kernel {
 public:
  Kernel(const Attention& call, const TaskSizes& sizes)
      : call_(call),
        kv_(call.kv),
        sizes_(sizes),
        group_(sizes.group()),
        columns_(round_up(call.kv.value_dim, kLanes)) {}

  long state_floats() const { return round_up(State::floats(sizes_.rows(), columns_), kLanes); }
  long workspace_floats() const {
    return 2 * state_floats() + round_up(sizes_.rows() * kv_.key_dim, kLanes) +
           2 * sizes_.scored_rows() * kKeyBlock + kKeyBlock * (kv_.key_dim + columns_);
  }
  long sections(const Task& task) const { return (last_position(task) + kSection) / kSection; }

  State state(float* memory) const { return State::at(memory, sizes_.rows(), columns_); }

  void run_sections(const Task& task, float* work) const {
    const State total = state(work), part = state(work + state_floats());
    take_queries(task, work);
    // The first one's sums are the total: merged with nothing they would be the same.
    walk(task, 0, last_position(task) + 1, total, work);
    for (long section = 1; section < sections(task); section++) {
      walk(task, section, last_position(task) + 1, part, work);
      merge(total, part, rows(task), columns_);
    }
    finish(task, total);
  }

  // Leaves in `sums` what the task's rows see of one section.
  void run_section(const Task& task, long section, const State& sums, float* work) const {
    take_queries(task, work);
    walk(task, section, end(task, section), sums, work);
  }

  void merge_sections(const Task& task, const float* parts, float* work) const {
    const State total = state(work);
    total.reset(rows(task), columns_);
    for (long section = 0; section < sections(task); section++) {
      merge(total, state(const_cast<float*>(parts) + section * state_floats()), rows(task),
            columns_);
    }
    finish(task, total);
  }

 private:
  long last_position(const Task& task) const {
    return call_.starts[task.segment] + task.first + task.count - 1;
  }

  long end(const Task& task, long section) const {
    return std::min((section + 1) * kSection, last_position(task) + 1);
  }

  void take_queries(const Task& task, float* work) const {
    if (call_.pairs) return scale_queries(task, buffers<Paired>(work));
    scale_queries(task, buffers<Widened<float>>(work));
  }

  // One section, asking for the keys behind it up to `known`.
  void walk(const Task& task, long section, long known, const State& sums, float* work) const {
    if (call_.pairs) return section_of<Paired>(task, section, known, sums, work);
    switch (kv_.element) {
      case 0:
        return section_of<Widened<float>>(task, section, known, sums, work);
      case 1:
        return section_of<Widened<bf16>>(task, section, known, sums, work);
      default:
        return section_of<Widened<f16>>(task, section, known, sums, work);
    }
  }

  // A task's rows: those of its first KV head, of the next one, …; of each a token after the other.
  long head_rows(const Task& task) const { return task.count * group_; }
  long rows(const Task& task) const { return task.heads * head_rows(task); }
  // Of the batch, the task's first one.
  long first_row(const Task& task) const { return call_.first_rows[task.segment] + task.first; }

  void finish(const Task& task, const State& total) const {
    const long width = call_.heads * kv_.value_dim, size = group_ * kv_.value_dim;
    for (long head = 0, r = 0; head < task.heads; head++) {
      float* to = call_.out + first_row(task) * width + (task.kv_head + head) * size;
      for (long token = 0; token < task.count; token++, to += width) {
        // Lines of memory, far apart: they are asked for ahead.
        for (long i = 0; i < size; i += kLanes) __builtin_prefetch(to + kTokensAhead * width + i, 1, 3);
        for (long query = 0; query < group_; query++, r++) {
          finish_row(total, r, to + query * kv_.value_dim);
        }
      }
    }
  }

  void finish_row(const State& total, long r, float* to) const {
    const float inverse = 1.0f / sum_lanes(load16(total.sum + r * kLanes));
    const float* from = total.out + r * columns_;
    // Adding 0 makes -0 to +0: which of them a sum of zeros is depends on masked keys.
    for (long i = 0; i < kv_.value_dim; i++) to[i] = from[i] * inverse + 0.0f;
  }

  template <class Format>
  struct Buffers {
    typename Format::Factor* q;        // (rows of the task, key_dim), interleaved
    float* scores;                     // (scored rows, kKeyBlock)
    typename Format::Factor* weights;  // the same
    typename Format::Panel* keys;      // panels (key_dim, 16)
    typename Format::Panel* values;    // panels (tokens, 16)
  };

  // Factors of one row, from its first on.
  template <class Format>
  static constexpr long factors(long elements) {
    return elements / Format::kPerFactor;
  }

  template <class Format>
  Buffers<Format> buffers(float* work) const {
    using Factor = typename Format::Factor;
    using Panel = typename Format::Panel;
    float* q = work + 2 * state_floats();
    float* scores = q + round_up(sizes_.rows() * kv_.key_dim, kLanes);
    float* weights = scores + sizes_.scored_rows() * kKeyBlock;
    float* keys = weights + sizes_.scored_rows() * kKeyBlock;
    float* values = keys + kKeyBlock * kv_.key_dim;
    return {reinterpret_cast<Factor*>(q),
            scores,
            // Weights of the width of scores take their place: they stay in the first level.
            reinterpret_cast<Factor*>(Format::kPerFactor == 1 ? scores : weights),
            reinterpret_cast<Panel*>(keys),
            reinterpret_cast<Panel*>(values)};
  }

  // Leaves q of the rows that are multiplied at a time side by side.
  template <class Format>
  void scale_queries(const Task& task, const Buffers<Format>& at) const {
    const float scale = call_.scale * kLog2E;
    for (long head = 0; head < task.heads; head++) {
      const float* q = call_.q + first_row(task) * call_.q_stride +
                       (task.kv_head + head) * group_ * kv_.key_dim;
      for_row_groups(head_rows(task), [&](long first, int count) {
        const auto begin = [&](int r) {
          const long row = first + r;
          const float* from = q + row / group_ * call_.q_stride + row % group_ * kv_.key_dim;
          const float* ahead = from + kTokensAhead * call_.q_stride;
          for (long i = 0; i < kv_.key_dim; i += kLanes) __builtin_prefetch(ahead + i, 0, 3);
          return from;
        };
        Format::queries(count, begin, scale, kv_.key_dim,
                        at.q + (head * head_rows(task) + first) * factors<Format>(kv_.key_dim));
      });
    }
  }

  template <class Format>
  void section_of(const Task& task, long section, long known, const State& sums,
                  float* work) const {
    using T = typename Format::Element;
    const Buffers<Format> at = buffers<Format>(work);
    const bool streams = sizes_.streams(task.count);
    if (streams) {
      sums.reset(rows(task), columns_);
    } else {
      sums.reset_sums(rows(task));
    }
    const long begin = section * kSection, end = this->end(task, section);
    const PageTable table(call_, task.segment, task.kv_head);
    Pages<T> pages[2];
    table.find(begin, end, pages[0]);
    for (long first = begin, turn = 0; first < end; first += kKeyBlock, turn ^= 1) {
      // What comes next is known one turn ahead, so that it can be asked for.
      const Pages<T>& now = pages[turn];
      Pages<T>& next = pages[turn ^ 1];
      table.find(first + kKeyBlock, known, next);
      if (streams) {
        few_queries<Format>(task, first, now, next, table, at, sums);
      } else {
        many_queries<Format>(task, first, first == begin, now, next, table, at, sums);
      }
    }
  }

  // Keys of a block, counted from its first, that a token of the task sees. May be less than 1.
  long visible(const Task& task, long first, long token) const {
    return call_.starts[task.segment] + task.first + token + 1 - first;
  }

  // Scores of rows [row, row + count) become weights, and what was summed before is scaled; nothing was where
  // a section `begins`.
  template <class Format>
  void softmax(const Task& task, long first, long row, long count, long panels, bool begins,
               const Buffers<Format>& at, const State& sums) const {
    long token = row % head_rows(task) / group_, query = row % group_;
    for (long i = 0; i < count; i++) {
      const long r = row + i, seen = std::min(panels * kLanes, visible(task, first, token));
      const float factor = softmax_row<Format>(
          at.scores + i * kKeyBlock, at.weights + i * factors<Format>(kKeyBlock), panels, seen,
          sums.maximum + r, sums.sum + r * kLanes);
      if (factor != 1.0f && !begins) scale_row(sums.out + r * columns_, columns_, factor);
      if (++query < group_) continue;
      query = 0;
      if (++token == task.count) token = 0;  // the next head's
    }
  }

  // `group` rows of scores over whole panels of packed keys.
  template <class Format>
  void score(int group, const typename Format::Factor* q, const typename Format::Panel* keys,
             long tokens, float* scores, Turns* turns = nullptr) const {
    const Panels<typename Format::Panel, 1> panels{keys, kLanes * kv_.key_dim, 0, 0, turns};
    multiply_rows(group, Interleaved<typename Format::Factor>{q}, panels, kv_.key_dim, scores,
                  kKeyBlock, tokens, Into::store);
  }

  template <class Format>
  static Panels<typename Format::Panel, 1> packed_values(const Buffers<Format>& at, Turns* turns) {
    return {at.values, kLanes * kKeyBlock, 0, 0, turns};
  }

  // Adds `count` values, weighted, to the sums of `group` rows, or stores them.
  template <class Format, class Values>
  void add_values(int group, const typename Format::Factor* weights, Values values, long count,
                  float* out, Into into) const {
    const Spaced<typename Format::Factor, factors<Format>(kKeyBlock)> rows{weights, {}};
    multiply_rows(group, rows, values, count, out, columns_, columns_, into);
  }

  // Memory is the limit. A page's heads are read one after the other; keys of a few tokens at a time
  // are packed, and used while they are in the first level, values are used where they lie. Each page
  // asks for the one that comes next.
  template <class Format>
  void few_queries(const Task& task, long first, const Pages<typename Format::Element>& pages,
                   const Pages<typename Format::Element>& next, const PageTable& table,
                   const Buffers<Format>& at, const State& sums) const {
    using T = typename Format::Element;
    const auto keys_ahead = [&](const Page<T>& page, long head) {
      return ahead(table.keys(page, head), page.tokens);
    };
    const auto values_ahead = [&](const Page<T>& page, long head) {
      return ahead(table.values(page, head), page.tokens);
    };
    for (long p = 0; p < pages.count; p++) {
      const Page<T>& page = pages.at[p];
      for (long head = 0; head < task.heads; head++) {
        Ahead behind = p + 1 < pages.count ? keys_ahead(pages.at[p + 1], head)
                                           : values_ahead(pages.at[0], head);
        score_page<Format>(task, head, page, table.keys(page, head), behind, at);
      }
    }
    const long panels = (pages.tokens() + kLanes - 1) / kLanes;
    softmax<Format>(task, first, 0, rows(task), panels, false, at, sums);
    for (long p = 0; p < pages.count; p++) {
      const Page<T>& page = pages.at[p];
      for (long head = 0; head < task.heads; head++) {
        Ahead behind = p + 1 < pages.count ? values_ahead(pages.at[p + 1], head)
                       : next.count > 0    ? keys_ahead(next.at[0], head)
                                           : Ahead(nullptr, 0);
        const Natural<T> natural{table.values(page, head), &behind};
        for_row_groups(head_rows(task), [&](long r, int group) {
          const long row = head * head_rows(task) + r;
          add_values<Format>(group,
                             at.weights + factors<Format>(row * kKeyBlock + page.first), natural,
                             page.tokens, sums.out + row * columns_, Into::continue_);
        });
      }
    }
  }

  template <class Format>
  void score_page(const Task& task, long head, const Page<typename Format::Element>& page,
                  const Evenly<typename Format::Element>& keys, Ahead& ahead,
                  const Buffers<Format>& at) const {
    const long count = head_rows(task), row = head * count;
    const long asked = 8 * kLanes * static_cast<long>(sizeof(typename Format::Element));
    const long together = panels_for(std::min<long>(count, kMaxRows)) * kLanes;
    const long tokens = round_up(page.tokens, kLanes);
    for (long t = 0; t < tokens; t += together) {
      const long some = std::min(together, tokens - t);
      for (long i = 0; i < some; i += kLanes) {
        Format::keys(keys + (t + i), kv_.key_dim, at.keys + i * kv_.key_dim,
                     [&] { ahead.ask(asked); });
      }
      for_row_groups(count, [&](long r, int group) {
        score<Format>(group, at.q + (row + r) * factors<Format>(kv_.key_dim), at.keys, some,
                      at.scores + (row + r) * kKeyBlock + page.first + t);
      });
    }
  }

  // Arithmetic is the limit: the block is packed once for all rows, which ask for the next one. `begins`: it is
  // the section's first one.
  template <class Format>
  void many_queries(const Task& task, long first, bool begins,
                    const Pages<typename Format::Element>& pages,
                    const Pages<typename Format::Element>& next, const PageTable& table,
                    const Buffers<Format>& at, const State& sums) const {
    using T = typename Format::Element;
    const T *keys[kKeyBlock], *values[kKeyBlock];
    for (long p = 0; p < pages.count; p++) {
      const Page<T>& page = pages.at[p];
      for (long t = 0; t < page.tokens; t++) {
        keys[page.first + t] = page.keys + t * kv_.key_stride;
        values[page.first + t] = page.values + t * kv_.value_stride;
      }
    }
    const long tokens = pages.tokens();
    // In whole panels: behind the last comes the last again, and is masked.
    const long whole = round_up(tokens, kLanes);
    std::fill(keys + tokens, keys + whole, keys[tokens - 1]);
    std::fill(values + tokens, values + whole, values[tokens - 1]);
    for (long t = 0; t < whole; t += kLanes) {
      Format::keys(keys + t, kv_.key_dim, at.keys + t * kv_.key_dim, [] {});
    }
    Format::values(values, whole, kv_.value_dim, at.values, kLanes * kKeyBlock);
    Ahead places[2 * kKeyBlock];
    table.places(next, places);
    // A tile of some rows has two panels, of keys and then of columns.
    Turns turns(places, 2 * next.count,
                RowGroup::groups(head_rows(task)) * (whole + columns_) / (2 * kLanes));
    for_row_groups(head_rows(task), [&](long row, int group) {
      const long count = std::min(tokens, visible(task, first, (row + group - 1) / group_));
      float* const out = sums.out + row * columns_;
      if (count <= 0) {
        if (begins) std::fill_n(out, group * columns_, 0.0f);
        return;
      }
      const long panels = (count + kLanes - 1) / kLanes;
      score<Format>(group, at.q + row * factors<Format>(kv_.key_dim), at.keys, panels * kLanes,
                    at.scores, &turns);
      softmax<Format>(task, first, row, group, panels, begins, at, sums);
      add_values<Format>(group, at.weights, packed_values<Format>(at, &turns),
                         round_up(count, Format::kPerFactor), out,
                         begins ? Into::store : Into::continue_);
    });
  }

  const Attention& call_;
  const KvLayer& kv_;
  TaskSizes sizes_;
  long group_;
  long columns_;
};

}  // namespace
}  // namespace penstock

using namespace penstock;

int penstock_attention(const Attention* call) {
  const long threads = omp_get_max_threads();
  const TaskSizes sizes(*call, threads);
  const Kernel kernel(*call, sizes);
  static thread_local Scratch task_memory, part_memory, work_memory;
  const TaskList list(*call, sizes, threads);
  const long count = list.count();
  if (count == 0) return 0;
  Task* tasks = task_memory.take<Task>(count);
  const long work_floats = round_up(kernel.workspace_floats(), kLanes);
  float* work = work_memory.take<float>(work_floats * threads);
  if (tasks == nullptr || work == nullptr) return 1;
  list.write(tasks);

  long longest = 1;
  for (long t = 0; t < count; t++) longest = std::max(longest, kernel.sections(tasks[t]));
  if (longest == 1 || count >= 4 * threads) {
    Queues queues = list.queues();
#pragma omp parallel
    {
      float* mine = work + omp_get_thread_num() * work_floats;
      queues.run(omp_get_thread_num(),
                 [&](long, long task, long) { kernel.run_sections(tasks[task], mine); });
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
