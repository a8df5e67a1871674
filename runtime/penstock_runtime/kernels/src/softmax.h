// Running sums of attention: the maximum, the sum and the weighted values of what a row has seen so far.
#pragma once

#include <algorithm>
#include <limits>

#include "vector.h"

namespace penstock {

constexpr float kNone = -std::numeric_limits<float>::infinity();

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
  return of == kNone ? 0.0f : exp2_nonpositive(splat16(of - new_maximum)).part[0][0];
}

PENSTOCK_INLINE void scale_row(float* row, long columns, float factor) {
  const Vec by = splat16(factor);
  for (long i = 0; i < columns; i += kLanes) store16(row + i, load16(row + i) * by);
}

// Turns the scores of one row into weights; returns the factor for what was summed before. `weights`
// may be where the scores are.
template <class Format>
PENSTOCK_INLINE float softmax_row(float* scores, typename Format::Factor* weights, long panels,
                                  long visible, float* maximum, float* sum) {
  if (visible <= 0) {
    for (long p = 0; p < panels; p++) Format::weights(weights, p, splat16(0.0f));
    return 1.0f;
  }
  for (long i = visible; i < panels * kLanes; i++) scores[i] = kNone;
  // Two, that do not wait for each other.
  Vec highest = load16(scores), other = highest;
  for (long p = 1; p + 1 < panels; p += 2) {
    highest = max(highest, load16(scores + p * kLanes));
    other = max(other, load16(scores + (p + 1) * kLanes));
  }
  highest = max(max(highest, other), load16(scores + (panels - 1) * kLanes));
  const float before = *maximum, now = std::max(before, max_lanes(highest));
  const float factor = before == now ? 1.0f : weight(before, now);
  Vec total = load16(sum) * splat16(factor);
  const Vec shift = splat16(now);
  for (long p = 0; p < panels; p++) {
    const Vec x = Format::exponential(load16(scores + p * kLanes) - shift);
    Format::weights(weights, p, x);
    total = total + x;
  }
  store16(sum, total);
  *maximum = now;
  return factor;
}

// Adds sums over later keys to `total`.
inline void merge(const State& total, const State& later, long rows, long columns) {
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

}  // namespace penstock
