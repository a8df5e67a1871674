// Linear layers over packed weights.
//
// k is cut into blocks of kBlock at fixed places. An element of y is the sum of its blocks in order,
// each block one chain of fused multiply-adds (tile.h): the same for one row and for a thousand, and
// whoever computes which part. Blocks also keep what is multiplied in the caches: kBlock rows of one
// panel in the first level, a block of x in the second.
#include <algorithm>

#include "kernels.h"
#include "scratch.h"
#include "tile.h"

#include <omp.h>

namespace penstock {
namespace {

constexpr long kBlock = 256;
constexpr long kRowBlock = 144;     // rows · kBlock floats: 147 KB of the second level
constexpr long kColumnBlock = 256;  // columns that share a copy of the rows
constexpr long kFewRows = 3 * kMaxRows;  // measured: widening a panel once pays off behind that

// Widens `count` rows of one panel, an even number.
void widen_panel(const bf16* panel, long count, float* to) {
  for (long k = 0; k < count; k += 2) {
    PENSTOCK_EACH(i) {
      const Bits words = load_bits(panel + k * kLanes + i * 2 * kWidth);
      store(to + k * kLanes + i * kWidth, low_half(words));
      store(to + (k + 1) * kLanes + i * kWidth, high_half(words));
    }
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

class Product {
 public:
  Product(const Linear& call, const uint32_t* words) : call_(call), words_(words) {}

  void run(Range rows, Range columns, const Workspace& work) const {
    start(rows, columns);
    switch (call_.kind) {
      case kFloat32:
        return run<float>(rows, columns, work);
      case kBfloat16:
        return run<bf16>(rows, columns, work);
      default:
        return few_rows(words_, call_.inputs / 2, 2, static_cast<const bf16*>(call_.weight), rows,
                        columns);
    }
  }

 private:
  template <class B>
  void run(Range rows, Range columns, const Workspace& work) const {
    const B* weight = static_cast<const B*>(call_.weight);
    if (rows.size() <= kFewRows) {
      few_rows(call_.x, call_.x_stride, 1, weight, rows, columns);
    } else {
      many_rows(weight, rows, columns, work);
    }
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
  // and used while they are in the first level. `per_word`: k in one element of x.
  template <class A, class B>
  void few_rows(const A* x, long x_stride, long per_word, const B* weight, Range rows,
                Range columns) const {
    const long panel = call_.inputs * kLanes;
    const long groups = (rows.size() + kMaxRows - 1) / kMaxRows;
    const long together = panels_for((rows.size() + groups - 1) / groups) * kLanes;
    for (long n = columns.first; n < columns.last; n += together) {
      const long count = std::min(together, columns.last - n);
      for (long k = 0; k < call_.inputs; k += kBlock) {
        for_row_groups(rows.size(), [&](long first, int group) {
          const long m = rows.first + first;
          multiply_rows(group, x + m * x_stride + k / per_word, x_stride,
                        weight + n / kLanes * panel + k * kLanes, panel,
                        std::min(kBlock, call_.inputs - k), call_.y + m * call_.outputs + n,
                        call_.outputs, count, into(k));
        });
      }
    }
  }

  // Arithmetic is the limit: a block of x is copied next to each other and stays in the second level
  // while all panels pass, each widened once into the first level.
  template <class B>
  void many_rows(const B* weight, Range rows, Range columns, const Workspace& work) const {
    for (long k = 0; k < call_.inputs; k += kBlock) {
      const long depth = std::min(kBlock, call_.inputs - k);
      for (long m = 0; m < rows.size(); m++) {
        std::memcpy(work.rows + m * kBlock, call_.x + (rows.first + m) * call_.x_stride + k,
                    static_cast<size_t>(depth) * sizeof(float));
      }
      for (long n = columns.first; n < columns.last; n += kLanes) {
        const long count = std::min<long>(kLanes, columns.last - n);
        const float* panel =
            block_of(weight + (n / kLanes * call_.inputs + k) * kLanes, depth, work);
        for_row_groups(rows.size(), [&](long first, int group) {
          multiply_rows(group, work.rows + first * kBlock, kBlock, panel, 0, depth,
                        call_.y + (rows.first + first) * call_.outputs + n, call_.outputs, count,
                        into(k));
        });
      }
    }
  }

  static const float* block_of(const float* panel, long, const Workspace&) { return panel; }
  static const float* block_of(const bf16* panel, long depth, const Workspace& work) {
    widen_panel(panel, depth, work.panel);
    return work.panel;
  }

  const Linear& call_;
  const uint32_t* words_;
};

// x rounded to bfloat16, two in a word.
void round_row(const float* x, long inputs, uint32_t* words) {
  bf16* to = reinterpret_cast<bf16*>(words);
  for (long k = 0; k < inputs; k++) narrow(x[k], to + k);
}

}  // namespace
}  // namespace penstock

using namespace penstock;

int64_t penstock_packed_elements(int64_t outputs, int64_t inputs) {
  return (outputs + kLanes - 1) / kLanes * kLanes * inputs;
}

void penstock_pack_f32(const float* weight, int64_t outputs, int64_t inputs, float* packed) {
  const long panels = (outputs + kLanes - 1) / kLanes;
#pragma omp parallel for schedule(static)
  for (long p = 0; p < panels; p++) {
    float* to = packed + p * inputs * kLanes;
    for (long k = 0; k < inputs; k++) {
      for (long n = 0; n < kLanes; n++) {
        const long output = p * kLanes + n;
        to[k * kLanes + n] = output < outputs ? weight[output * inputs + k] : 0.0f;
      }
    }
  }
}

void penstock_pack_bf16(const uint16_t* weight, int64_t outputs, int64_t inputs, uint16_t* packed) {
  const long panels = (outputs + kLanes - 1) / kLanes;
#pragma omp parallel for schedule(static)
  for (long p = 0; p < panels; p++) {
    uint16_t* to = packed + p * inputs * kLanes;
    for (long k = 0; k < inputs; k += 2) {
      for (long n = 0; n < kLanes; n++) {
        const long output = p * kLanes + n;
        const uint16_t* from = weight + output * inputs + k;
        uint16_t* pair = to + k * kLanes + 2 * n;
        pair[0] = output < outputs ? from[0] : 0;
        pair[1] = output < outputs ? from[1] : 0;
      }
    }
  }
}

int penstock_linear(const Linear* call) {
  if (call->rows == 0) return 0;
  const long threads = omp_get_max_threads();
  const bool pairs = call->kind == kBfloat16Pairs;
  const long row_parts = (call->rows + kRowBlock - 1) / kRowBlock;
  const long panels = (call->outputs + kLanes - 1) / kLanes;
  const long wanted = std::max((call->outputs + kColumnBlock - 1) / kColumnBlock,
                               (threads * kTasksPerThread + row_parts - 1) / row_parts);
  const long column_parts = std::min(panels, wanted);
  const size_t words = pairs ? static_cast<size_t>(call->rows) * call->inputs / 2 : 0;

  static thread_local Scratch scratch, rounded;
  float* workspaces = scratch.take<float>(Workspace::kFloats * threads);
  uint32_t* rounded_x = rounded.take<uint32_t>(words);
  if (workspaces == nullptr || (pairs && rounded_x == nullptr)) return 1;

#pragma omp parallel
  {
    float* mine = workspaces + Workspace::kFloats * omp_get_thread_num();
    const Workspace work{mine, mine + kRowBlock * kBlock};
    if (pairs) {
#pragma omp for schedule(static)
      for (long m = 0; m < call->rows; m++) {
        round_row(call->x + m * call->x_stride, call->inputs, rounded_x + m * (call->inputs / 2));
      }
    }
    const Product product(*call, rounded_x);
#pragma omp for schedule(dynamic, 1) nowait
    for (long task = 0; task < row_parts * column_parts; task++) {
      product.run(part(call->rows, 1, row_parts, task % row_parts),
                  part(call->outputs, kLanes, column_parts, task / row_parts), work);
    }
  }
  return 0;
}
