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
// same in every layer: where they go is in its own cache. A thread that is done helps another.
#include "linear.h"

#include <algorithm>

#include "coded.h"
#include "rows.h"
#include "scratch.h"

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

// The rows of x in words of two bfloat16, those of one tile interleaved: groups, as many in each of
// `parts`.
struct RowGroups {
  Source x;
  long rows, inputs, parts;
  uint32_t* words;

  long count() const { return (rows + parts * kMaxRows - 1) / (parts * kMaxRows) * parts; }
  long first(long group) const { return rows * group / count(); }
  int size(long group) const { return static_cast<int>(first(group + 1) - first(group)); }
  uint32_t* at(long group) const { return words + first(group) * (inputs / 2); }

  // Rounds the columns `of` of a group, a part of them whose first is a multiple of 16.
  void round(long group, Range of) const {
    int r = 0;
    for (; r + kTogether <= size(group); r += kTogether) round_rows<kTogether>(group, r, of);
    for (; r < size(group); r++) round_rows<1>(group, r, of);
  }

 private:
  static constexpr int kTogether = 4;  // rows whose words are written side by side

  template <int R>
  void round_rows(long group, int r, Range of) const {
    const float* row[R];
    float inverse[R];
    for (int i = 0; i < R; i++) {
      row[i] = x.rows + (first(group) + r + i) * x.stride;
      if (x.made == Made::normed) inverse[i] = inverse_rms(row[i], inputs, x.epsilon);
    }
    uint32_t* to = at(group) + r;
    const long step = size(group);
    switch (x.made) {
      case Made::as_is:
        return write<R>(to, step, of, [&](int i, long k) { return load_some(row[i] + k, inputs - k); });
      case Made::normed:
        return write<R>(to, step, of,
                        [&](int i, long k) { return normed(row[i], inverse[i], x.norm, k, inputs); });
      case Made::gated:
        return write<R>(to, step, of, [&](int i, long k) { return gated(row[i], k, inputs); });
    }
  }

  template <int R, class Lanes>
  PENSTOCK_INLINE void write(uint32_t* to, long step, Range of, const Lanes& lanes) const {
    for (long k = of.first; k < of.last; k += kLanes) {
      uint32_t pairs[R][kLanes / 2];
      for (int i = 0; i < R; i++) narrow16(lanes(i, k), reinterpret_cast<bf16*>(pairs[i]));
      const long count = std::min<long>(kLanes, inputs - k) / 2;
      uint32_t* block = to + k / 2 * step;
      if constexpr (R == kTogether) {
        if (count == kLanes / 2) {
          store_side_by_side(pairs, block, step);
          continue;
        }
      }
      for (long n = 0; n < count; n++) {
        for (int i = 0; i < R; i++) block[n * step + i] = pairs[i][n];
      }
    }
  }
};

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
      // The last rows find all panels in the second level, and ask for those that come next.
      const bool last = g > groups.first && g + 1 == groups.last;
      const Interleaved<uint32_t> rows{x.at(g)};
      float* y = call_.y + x.first(g) * call_.outputs + columns.first;
      if (call_.kind == kBfloat16Coded) {
        multiply_coded(x.size(g), rows, columns, last, y);
      } else {
        const auto weight = packed<bf16>() + columns.first / kLanes;
        multiply_rows(x.size(g), rows, last ? weight.asking(columns.size() / kLanes) : weight,
                      call_.inputs, y, call_.outputs, columns.size(), into(0));
      }
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
                      float* y) const {
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
                         call_.outputs, count, into(0));
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

// What one thread is to compute: some rows, or some columns of all rows.
struct Share {
  Range groups, columns;
  long tasks;  // that the columns are cut into
  long first;  // where they are begun: of the same columns nobody reads what another is just reading
};

int linear_of_pairs(const Linear& call, const Source& source) {
  static thread_local Scratch rounded;
  const long threads = omp_get_max_threads();
  const bool by_each = call.rows <= kRoundedByEach;
  const long size = round_up(static_cast<long>(call.rows) * call.inputs / 2, kLine / sizeof(uint32_t));
  uint32_t* words = rounded.take<uint32_t>(size * (by_each ? threads : 1));
  if (words == nullptr) return 1;
  const long most = std::min(threads, Queues::kMost);
  const long row_parts = std::clamp(static_cast<long>(call.rows) / kRowsAThread, 1L, most);
  const long column_parts = most / row_parts;
  RowGroups x{source, call.rows, call.inputs, row_parts, words};
  // Few groups are rounded in parts.
  const long cuts = std::max(1L, threads / x.count());

  const long unit = call.kind == kBfloat16Coded
                        ? kPackedColumns
                        : std::max<long>(panels_for(x.size(0)) * kLanes, kPackedColumns);
  // What a second group of rows passes again is as much as stays in the second level. Else the last tasks are
  // as short as they can be, so that no thread waits for another.
  const bool pass_again = x.count() > row_parts;
  const long cached = kPanelBytes / (call.inputs * static_cast<long>(sizeof(bf16)));
  const long together = pass_again ? std::max(unit, cached / unit * unit) : unit;
  const long count = row_parts * column_parts;
  Share shares[Queues::kMost];
  Queues queues(count, pass_again ? 0 : kTasksPerThread);
  for (long i = 0; i < count; i++) {
    const Range columns = part(call.outputs, unit, column_parts, i / row_parts);
    const long wanted = std::max((columns.size() + together - 1) / together, kTasksPerThread);
    const long tasks = std::min((columns.size() + unit - 1) / unit, wanted);
    const long first = tasks * (i % row_parts) / row_parts;
    shares[i] = {part(x.count(), 1, row_parts, i % row_parts), columns, tasks, first};
    queues.set(i, 0, tasks);
  }
#pragma omp parallel firstprivate(x)
  {
    const Product product(call);
    const long me = omp_get_thread_num();
    if (by_each) {
      x.words += me * size;
      x.round(0, {0, call.inputs});
    } else {
#pragma omp for schedule(static)
      for (long i = 0; i < x.count() * cuts; i++) {
        x.round(i / cuts, part(call.inputs, kLanes, cuts, i % cuts));
      }
    }
    queues.run(me, [&](long index, long first, long behind) {
      const Share& share = shares[index];
      const auto columns_of = [&](long task) {
        return part(share.columns.size(), unit, share.tasks, (share.first + task) % share.tasks);
      };
      product.run_pairs(x, share.groups,
                        {share.columns.first + columns_of(first).first,
                         share.columns.first + columns_of(behind - 1).last});
    });
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

int linear(Linear call, const Source& source) {
  if (call.rows == 0) return 0;
  if (call.kind == kBfloat16Pairs || call.kind == kBfloat16Coded) return linear_of_pairs(call, source);
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
