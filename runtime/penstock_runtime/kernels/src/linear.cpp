// Linear layers over packed weights.
//
// Products of float32: k is cut into blocks of kBlock at fixed places. An element of y is the sum of
// its blocks in order, each block one chain of fused multiply-adds (tile.h): the same for one row and
// for a thousand, and whoever computes which part. Blocks also keep what is multiplied in the caches:
// kBlock rows of one panel in the first level, a block of x in the second.
//
// Products of pairs: an element of y is one chain over all k. x is rounded first, the rows of a tile
// interleaved, so that a tile reads it from start to end. Panels come once from memory into the second
// level, where all rows pass them; the rows of a tile stay in the first. Of many rows each thread has
// its own, in every product of a layer: what it reads then it wrote itself, and two threads may be far
// from each other (in caches of different parts of a processor). Of a few rows it has some columns, the
// same in every layer: where they go is in its own cache. A thread that is done helps another. What is gated
// goes from its product to the next one in words, without having been in memory as float32.
#include "linear.h"

#include <algorithm>

#include "coded.h"
#include "rows.h"
#include "scratch.h"
#include "words.h"

#include <omp.h>

namespace penstock {
namespace {

constexpr long kBlock = 256;
constexpr long kRowBlock = 144;     // rows · kBlock floats: 147 KB of the second level
constexpr long kColumnBlock = 256;  // columns that share a copy of the rows
constexpr long kPanelBytes = 256 << 10;  // of panels that stay in the second level
constexpr long kRowsAThread = 48;         // and more: rows are dealt out, not panels
constexpr long kRoundedByEach = 2;        // rows: each thread rounds them for itself, and waits for none
constexpr long kFewRows = 3 * kMaxRows;  // measured: widening a panel once pays off behind that

// Copies the first `count` rows of one panel, an even number, as float32.
void copy_panel(Packed<bf16> panel, long count, float* to) {
  const bf16* first = panel.first();
  for (long k = 0; k < count; k += 2) {
    PENSTOCK_EACH(i) {
      const Bits words = load_bits(first + panel.offset(0, k / 2) + i * 2 * kWidth);
      store(to + k * kLanes + i * kWidth, low_half(words));
      store(to + (k + 1) * kLanes + i * kWidth, high_half(words));
    }
  }
}

void copy_panel(Packed<float> panel, long count, float* to) {
  const float* first = panel.first();
  for (long k = 0; k < count; k++) {
    store16(to + k * kLanes, load16(first + panel.offset(0, k)));
  }
}

struct Range {
  long first, last;
  long size() const { return last - first; }
};

// Part `index` of `parts` of [0, total), borders at multiples of `unit`.
Range part(long total, long unit, long parts, long index) {
  const long units = (total + unit - 1) / unit;
  return {std::min(total, units * index / parts * unit),
          std::min(total, units * (index + 1) / parts * unit)};
}

struct Workspace {
  float* rows;   // kRowBlock · kBlock
  float* panel;  // kBlock · kLanes
  static constexpr size_t kFloats = kRowBlock * kBlock + kBlock * kLanes;
};

// Rows in words of two bfloat16, those of one tile interleaved: groups, as many in each of `parts`.
struct RowGroups {
  long rows, inputs, parts;
  uint32_t* words;

  long count() const { return (rows + parts * kMaxRows - 1) / (parts * kMaxRows) * parts; }
  long first(long group) const { return rows * group / count(); }
  int size(long group) const { return static_cast<int>(first(group + 1) - first(group)); }
  uint32_t* at(long group) const { return words + first(group) * (inputs / 2); }

  // Writes the columns `of` of a group, whose first is a multiple of 16, see write_words.
  template <class Begin, class Lanes>
  void write(long group, Range of, const Begin& begin, const Lanes& lanes) const {
    write_words(at(group), size(group), of.first, of.last, inputs, begin, lanes);
  }
};

// Rounds the columns `of` of a group of what is made of the source's rows.
void round(const Source& source, const RowGroups& x, long group, Range of) {
  const float* row[kMaxRows];
  float inverse[kMaxRows];
  const auto begin = [&](int r) {
    row[r] = source.rows + (x.first(group) + r) * source.stride;
    if (source.made == Made::normed) inverse[r] = inverse_rms(row[r], x.inputs, source.epsilon);
  };
  switch (source.made) {
    case Made::as_is:
      return x.write(group, of, begin,
                     [&](int r, long k) { return load_some(row[r] + k, x.inputs - k); });
    case Made::normed:
      return x.write(group, of, begin, [&](int r, long k) {
        return normed(row[r], inverse[r], source.norm, k, x.inputs);
      });
    case Made::gated:
      return x.write(group, of, begin, [&](int r, long k) { return gated(row[r], k, x.inputs); });
  }
}

class Product {
 public:
  explicit Product(const Linear& call) : call_(call) {}

  void run(Range rows, Range columns, const Workspace& work) const {
    start(rows, columns);
    if (call_.kind == kFloat32) {
      run<float>(rows, columns, work);
    } else {
      run<bf16>(rows, columns, work);
    }
  }

  void run_pairs(const RowGroups& x, Range groups, Range columns) const {
    start({x.first(groups.first), x.first(groups.last)}, columns);
    for (long g = groups.first; g < groups.last; g++) {
      multiply_group(x, g, columns, is_last(groups, g),
                     call_.y + x.first(g) * call_.outputs + columns.first, call_.outputs);
    }
  }

  // The last rows find all panels in the second level, and ask for those that come next.
  static bool is_last(Range groups, long group) {
    return group > groups.first && group + 1 == groups.last;
  }

  // One group's columns, without a bias, to rows of `stride`.
  void multiply_group(const RowGroups& x, long group, Range columns, bool asks_for_next, float* y,
                      long stride) const {
    const Interleaved<uint32_t> rows{x.at(group)};
    if (call_.kind == kBfloat16Coded) {
      multiply_coded(x.size(group), rows, columns, asks_for_next, y, stride);
    } else {
      const auto weight = packed<bf16>() + columns.first / kLanes;
      multiply_rows(x.size(group), rows,
                    asks_for_next ? weight.asking(columns.size() / kLanes) : weight, call_.inputs, y,
                    stride, columns.size(), into(0));
    }
  }

 private:
  template <class T>
  Packed<T> packed() const {
    return {static_cast<const T*>(call_.weight), call_.inputs * kLanes};
  }

  template <class T>
  void run(Range rows, Range columns, const Workspace& work) const {
    if (rows.size() <= kFewRows) {
      few_rows(packed<T>(), rows, columns);
    } else {
      many_rows(packed<T>(), rows, columns, work);
    }
  }

  void multiply_coded(int rows, Interleaved<uint32_t> x, Range columns, bool asks_for_next,
                      float* y, long stride) const {
    const auto* pairs = static_cast<const CodedPair*>(call_.weight) + columns.first / kPackedColumns;
    long ahead = kAhead;
    if (asks_for_next) {
      const CodedPair& last = pairs[(columns.size() - 1) / kPackedColumns];
      ahead = last.units() + call_.inputs / kUnitRows * kUnitBytes - pairs->units();
    }
    with_rows(rows, [&](auto r) {
      for (long n = 0; n < columns.size(); n += kPackedColumns) {
        const long count = std::min<long>(kPackedColumns, columns.size() - n);
        tile<r.value, 2>(x, Coded{pairs + n / kPackedColumns, ahead}, call_.inputs, y + n,
                         stride, count, into(0));
      }
    });
  }

  // What y is before the first block is added to it, or stored.
  void start(Range rows, Range columns) const {
    if (call_.bias == nullptr) return;
    for (long m = rows.first; m < rows.last; m++) {
      float* y = call_.y + m * call_.outputs;
      for (long n = columns.first; n < columns.last; n++) {
        y[n] = call_.accumulate ? y[n] + call_.bias[n] : call_.bias[n];
      }
    }
  }

  Into into(long k) const {
    return k == 0 && !call_.accumulate && call_.bias == nullptr ? Into::store : Into::add;
  }

  // Memory is the limit: panels are read once, from start to end, as many at a time as a tile has,
  // and used while they are in the first level.
  template <class T>
  void few_rows(Packed<T> weight, Range rows, Range columns) const {
    const long groups = RowGroup::groups(rows.size());
    const long together = panels_for((rows.size() + groups - 1) / groups) * kLanes;
    for (long n = columns.first; n < columns.last; n += together) {
      const long count = std::min(together, columns.last - n);
      for (long k = 0; k < call_.inputs; k += kBlock) {
        for_row_groups(rows.size(), [&](long first, int group) {
          const long m = rows.first + first;
          multiply_rows(group, RowMajor<float>{call_.x + m * call_.x_stride + k, call_.x_stride},
                        weight.below(k) + n / kLanes, std::min(kBlock, call_.inputs - k),
                        call_.y + m * call_.outputs + n, call_.outputs, count, into(k));
        });
      }
    }
  }

  // Arithmetic is the limit: a block of x is copied next to each other and stays in the second level
  // while all panels pass, each copied once into the first level.
  template <class T>
  void many_rows(Packed<T> weight, Range rows, Range columns, const Workspace& work) const {
    for (long k = 0; k < call_.inputs; k += kBlock) {
      const long depth = std::min(kBlock, call_.inputs - k);
      for (long m = 0; m < rows.size(); m++) {
        std::memcpy(work.rows + m * kBlock, call_.x + (rows.first + m) * call_.x_stride + k,
                    static_cast<size_t>(depth) * sizeof(float));
      }
      for (long n = columns.first; n < columns.last; n += kLanes) {
        const long count = std::min<long>(kLanes, columns.last - n);
        copy_panel(weight.below(k) + n / kLanes, depth, work.panel);
        const Panels<float, 1> panel{work.panel, depth * kLanes};
        for_row_groups(rows.size(), [&](long first, int group) {
          multiply_rows(group, Spaced<float, kBlock>{work.rows + first * kBlock, {}}, panel, depth,
                        call_.y + (rows.first + first) * call_.outputs + n, call_.outputs, count,
                        into(k));
        });
      }
    }
  }

  Linear call_;
};

// Calls word(output, row, to) for everything in packed panels, those behind the last output too.
template <class T, class Word>
void pack(long outputs, long inputs, T* packed, const Word& word) {
  constexpr long kInWord = sizeof(float) / sizeof(T);
  const Packed<T> all{packed, inputs * kLanes};
  const long panels = penstock_packed_elements(outputs, inputs) / all.elements;
#pragma omp parallel for schedule(static)
  for (long p = 0; p < panels; p++) {
    const Packed<T> panel = all + p;
    T* to = packed + (panel.first() - packed);
    for (long row = 0; row < inputs / kInWord; row++) {
      for (long n = 0; n < kLanes; n++) {
        word(p * kLanes + n, row, to + panel.offset(0, row) + n * kInWord);
      }
    }
  }
}

int linear_of_floats(const Linear& call) {
  const long threads = omp_get_max_threads();
  const long row_parts = (call.rows + kRowBlock - 1) / kRowBlock;
  const long most = (call.outputs + kPackedColumns - 1) / kPackedColumns;
  const long wanted = std::max((call.outputs + kColumnBlock - 1) / kColumnBlock,
                               (threads * kTasksPerThread + row_parts - 1) / row_parts);
  const long column_parts = std::min(most, wanted);
  static thread_local Scratch scratch;
  float* workspaces = scratch.take<float>(Workspace::kFloats * threads);
  if (workspaces == nullptr) return 1;
  const Product product(call);
#pragma omp parallel for schedule(dynamic, 1)
  for (long task = 0; task < row_parts * column_parts; task++) {
    float* mine = workspaces + Workspace::kFloats * omp_get_thread_num();
    product.run(part(call.rows, 1, row_parts, task % row_parts),
                part(call.outputs, kPackedColumns, column_parts, task / row_parts),
                {mine, mine + kRowBlock * kBlock});
  }
  return 0;
}

// Of products of pairs, by how many the rows are divided.
long row_parts(long rows, long threads) {
  return std::clamp(rows / kRowsAThread, 1L, std::min(threads, Queues::kMost));
}

// How a product is dealt out: to each thread some rows, or some columns of all rows, in tasks.
class Deal {
 public:
  // A task has a multiple of `unit` columns, and if more than one group of rows passes them up to `together`,
  // which stay in the second level. Else the last tasks are as short as they can be, so that no thread waits
  // for another.
  Deal(const RowGroups& x, long columns, long unit, long together, long threads)
      : unit_(unit),
        count_(std::min(threads, Queues::kMost) / x.parts * x.parts),
        queues_(count_, passes_again(x) ? 0 : kTasksPerThread) {
    const long wide = passes_again(x) ? std::max(unit, together / unit * unit) : unit;
    for (long i = 0; i < count_; i++) {
      const Range mine = part(columns, unit, count_ / x.parts, i / x.parts);
      const long wanted = std::max((mine.size() + wide - 1) / wide, kTasksPerThread);
      const long tasks = std::min((mine.size() + unit - 1) / unit, wanted);
      const long first = tasks * (i % x.parts) / x.parts;
      shares_[i] = {part(x.count(), 1, x.parts, i % x.parts), mine, tasks, first};
      queues_.set(i, 0, tasks);
      most_ = std::max(most_, tasks == 0 ? 0 : (mine.size() / unit + tasks) / tasks * unit);
    }
  }

  static bool passes_again(const RowGroups& x) { return x.count() > x.parts; }

  // Of a task where rows pass again, at most.
  long most_columns() const { return most_; }

  // Calls `body(groups, columns)` for every task that is the thread's. Every thread calls it once.
  template <class Body>
  void run(long thread, const Body& body) {
    queues_.run(thread, [&](long index, long first, long behind) {
      const Share& share = shares_[index];
      const auto columns_of = [&](long task) {
        return part(share.columns.size(), unit_, share.tasks, (share.first + task) % share.tasks);
      };
      body(share.groups, {share.columns.first + columns_of(first).first,
                          share.columns.first + columns_of(behind - 1).last});
    });
  }

 private:
  struct Share {
    Range groups, columns;
    long tasks;  // that the columns are cut into
    long first;  // where they are begun: of the same columns nobody reads what another is just reading
  };

  long unit_, count_, most_ = 0;
  Queues queues_;
  Share shares_[Queues::kMost];
};

// The columns of a tile, or more where that many lie together.
long columns_together(const Linear& call, int rows) {
  if (call.kind == kBfloat16Coded) return kPackedColumns;
  return std::max<long>(panels_for(rows) * kLanes, kPackedColumns);
}

// Columns whose panels stay in the second level.
long cached_columns(const Linear& call) {
  return kPanelBytes / (call.inputs * static_cast<long>(sizeof(bf16)));
}

long words_of(const Linear& call) {
  return round_up(static_cast<long>(call.rows) * call.inputs / 2, kLine / sizeof(uint32_t));
}

// Every thread of a parallel region calls it, and finds all rows rounded.
void round_together(const Source& source, const RowGroups& x, long threads) {
  // Few groups are rounded in parts.
  const long cuts = std::max(1L, threads / x.count());
#pragma omp for schedule(static)
  for (long i = 0; i < x.count() * cuts; i++) {
    round(source, x, i / cuts, part(x.inputs, kLanes, cuts, i % cuts));
  }
}

int linear_of_pairs(const Linear& call, const Source& source) {
  static thread_local Scratch rounded;
  const long threads = omp_get_max_threads();
  const bool by_each = call.rows <= kRoundedByEach;
  const long size = words_of(call);
  uint32_t* words = rounded.take<uint32_t>(size * (by_each ? threads : 1));
  if (words == nullptr) return 1;
  RowGroups x{call.rows, call.inputs, row_parts(call.rows, threads), words};
  Deal deal(x, call.outputs, columns_together(call, x.size(0)), cached_columns(call), threads);
  const Product product(call);
#pragma omp parallel firstprivate(x)
  {
    const long me = omp_get_thread_num();
    if (by_each) {
      x.words += me * size;
      round(source, x, 0, {0, call.inputs});
    } else {
      round_together(source, x, threads);
    }
    deal.run(me, [&](Range groups, Range columns) { product.run_pairs(x, groups, columns); });
  }
  return 0;
}

bool multiplies_pairs(const Linear& call) {
  return call.kind == kBfloat16Pairs || call.kind == kBfloat16Coded;
}

// Whether what is gated can go from one product to the next in words.
bool in_words(const Linear& gate_up, const Linear& down) {
  return multiplies_pairs(gate_up) && multiplies_pairs(down) && gate_up.bias == nullptr &&
         down.inputs % kPackedColumns == 0;
}

// A thread that has a tile's columns of gates and of what they gate, in its first level, rounds the product at
// once. As float32 in memory the two take eight times the room: 12 MB a layer for 512 rows, written and read.
int gated_of_pairs(const Linear& gate_up, const Source& source, const Linear& down) {
  static thread_local Scratch rounded, gated_words, tiles;
  const long threads = omp_get_max_threads(), parts = row_parts(gate_up.rows, threads);
  const RowGroups x{gate_up.rows, gate_up.inputs, parts,
                    rounded.take<uint32_t>(words_of(gate_up))};
  const RowGroups gated{down.rows, down.inputs, parts, gated_words.take<uint32_t>(words_of(down))};
  Deal first(x, down.inputs, columns_together(gate_up, x.size(0)), cached_columns(gate_up) / 2, threads);
  Deal second(gated, down.outputs, columns_together(down, gated.size(0)), cached_columns(down), threads);
  const long stride = 2 * first.most_columns();
  float* all_tiles = tiles.take<float>(kMaxRows * stride * threads);
  if (x.words == nullptr || gated.words == nullptr || all_tiles == nullptr) return 1;
  const Product product(gate_up), down_product(down);
#pragma omp parallel
  {
    const long me = omp_get_thread_num();
    round_together(source, x, threads);
    float* gates = all_tiles + me * kMaxRows * stride;
    first.run(me, [&](Range groups, Range columns) {
      float* ups = gates + columns.size();
      for (long g = groups.first; g < groups.last; g++) {
        const bool last = Product::is_last(groups, g);
        product.multiply_group(x, g, columns, last, gates, stride);
        product.multiply_group(x, g, {down.inputs + columns.first, down.inputs + columns.last}, last,
                               ups, stride);
        gated.write(g, columns, [](int) {}, [&](int r, long k) {
          const long at = r * stride + k - columns.first;
          return silu(load16(gates + at)) * load16(ups + at);
        });
      }
    });
#pragma omp barrier
    second.run(me, [&](Range groups, Range columns) { down_product.run_pairs(gated, groups, columns); });
  }
  return 0;
}

}  // namespace

Matrix columns(const Matrix& of, long first, long count) {
  const long element = of.kind == kFloat32 ? sizeof(float) : sizeof(bf16);
  const long before = of.kind == kBfloat16Coded
                          ? first / kPackedColumns * static_cast<long>(sizeof(CodedPair))
                          : first * of.inputs * element;
  const auto* weight = static_cast<const char*>(of.weight) + before;
  return {weight, of.kind, of.bias == nullptr ? nullptr : of.bias + first, count, of.inputs};
}

int gated_linear(const Linear& gate_up, const Source& source, const Linear& down) {
  if (gate_up.rows > kMaxRows && in_words(gate_up, down)) return gated_of_pairs(gate_up, source, down);
  if (linear(gate_up, source)) return 1;
  return linear(down, {gate_up.y, gate_up.outputs, Made::gated, nullptr, 0.0f});
}

int linear(Linear call, const Source& source) {
  if (call.rows == 0) return 0;
  if (multiplies_pairs(call)) return linear_of_pairs(call, source);
  call.x = source.rows;
  call.x_stride = source.stride;
  if (source.made == Made::as_is) return linear_of_floats(call);
  static thread_local Scratch memory;
  float* made = memory.take<float>(call.rows * call.inputs);
  if (made == nullptr) return 1;
  if (source.made == Made::normed) {
    penstock_rms_norm(source.rows, source.norm, made, call.rows, call.inputs, source.stride,
                      source.epsilon);
  } else {
    penstock_silu_multiply(source.rows, made, call.rows, call.inputs);
  }
  call.x = made;
  call.x_stride = call.inputs;
  return linear_of_floats(call);
}

}  // namespace penstock

using namespace penstock;

int64_t penstock_packed_elements(int64_t outputs, int64_t inputs) {
  return (outputs + kPackedColumns - 1) / kPackedColumns * kPackedColumns * inputs;
}

void penstock_pack_f32(const float* weight, int64_t outputs, int64_t inputs, float* packed) {
  pack<float>(outputs, inputs, packed, [&](long output, long k, float* to) {
    *to = output < outputs ? weight[output * inputs + k] : 0.0f;
  });
}

void penstock_pack_bf16(const uint16_t* weight, int64_t outputs, int64_t inputs, uint16_t* packed) {
  pack<bf16>(outputs, inputs, packed, [&](long output, long k, bf16* to) {
    const uint16_t* from = weight + output * inputs + 2 * k;
    to[0] = output < outputs ? from[0] : 0;
    to[1] = output < outputs ? from[1] : 0;
  });
}

int64_t penstock_columns_together() { return kPackedColumns; }

int penstock_linear(const Linear* call) {
  return linear(*call, {call->x, call->x_stride, Made::as_is, nullptr, 0.0f});
}
